"""A pytest plugin for `make nbval`: cells enter the kernel's history, as they do in Jupyter.

nbval sends them without. IPython looks into its history for a closing `;`, does not find the cell there, and
shows the value that Jupyter (and the stored notebook) does not show.
"""

from __future__ import annotations

from nbval.kernel import RunningKernel


def execute_cell_input(self: RunningKernel, cell_input: str, allow_stdin: bool | None = None) -> str:
    """In place of nbval's method: the same request, but with history."""
    return self.kc.execute(cell_input, allow_stdin=allow_stdin, stop_on_error=False, store_history=True)


RunningKernel.execute_cell_input = execute_cell_input
