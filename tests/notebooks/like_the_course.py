"""A pytest plugin for `make nbval`: cells run and compare as the course stored them.

nbval sends cells without history. IPython looks there for a closing `;`, does not find the cell, and shows
the value that Jupyter (and the stored notebook) does not show. And a progress bar that is a widget knows no
TQDM_DISABLE; the course stores none, so none is compared.
"""

from __future__ import annotations

from typing import Any

from nbval.kernel import RunningKernel
from nbval.plugin import IPyNbCell

from minimal_aia.course import PROGRESS_BAR, WIDGET

compare_outputs = IPyNbCell.compare_outputs


def execute_cell_input(self: RunningKernel, cell_input: str, allow_stdin: bool | None = None) -> str:
    """In place of nbval's method: the same request, but with history."""
    return self.kc.execute(cell_input, allow_stdin=allow_stdin, stop_on_error=False, store_history=True)


def is_bar(output: Any) -> bool:
    data = output.get("data", {})
    return WIDGET in data and bool(PROGRESS_BAR.search(data.get("text/plain", "")))


def compare_without_bars(self: IPyNbCell, test: list, ref: list, skip_compare: Any = None) -> bool:
    return compare_outputs(self, [output for output in test if not is_bar(output)], ref, skip_compare)


RunningKernel.execute_cell_input = execute_cell_input
IPyNbCell.compare_outputs = compare_without_bars
