"""Run the course without a browser: every notebook, top to bottom, a progress bar, and a table at the end.

    python -m minimal_aia.course                     # execute all, change nothing
    python -m minimal_aia.course --write [FILES]     # execute and store the outputs
    python -m minimal_aia.course --clean FILES       # only take the run-to-run noise out of stored notebooks

Stored outputs are normalised, so that a run that gives the same numbers gives the same file: cell ids count
up, metadata holds nothing but tags, and machine paths, memory addresses, progress bars and widget states go.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from tqdm import tqdm

from minimal_aia import console

ROOT = Path(__file__).resolve().parents[1]
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE = {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"}
# The course needs no model hub, and no two runs share a progress bar. `make nbval` sets the same.
KERNEL_ENV = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
KEPT_CELL_METADATA = ("tags", "jupyter")  # "jupyter" folds a cell
WIDGET = "application/vnd.jupyter.widget-view+json"
# "train:  12%|█▏  | 3/25 [00:01<00:08, 2.5it/s]", of a terminal or as the text of a widget
PROGRESS_BAR = re.compile(r"(\d+%\|.*\| \d+|\d+\w* ?\[\d\d:\d\d)")


@dataclass
class Outcome:
    """What became of one notebook. error: its first lines, "" if all cells ran."""

    path: Path
    cells: int
    seconds: float
    error: str = ""


def notebooks(root: Path = ROOT) -> list[Path]:
    """The course in reading order, then the solutions."""
    return sorted(root.glob("notebooks/*.ipynb")) + sorted(root.glob("notebooks/solutions/*.ipynb"))


def read(path: Path) -> nbformat.NotebookNode:
    """A notebook file; ValueError if it is none."""
    try:
        notebook = nbformat.reads(path.read_text(encoding="utf-8-sig"), as_version=4)
        nbformat.validate(notebook)
    except Exception as error:  # as many classes as ways to be none
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not a notebook ({reason})") from error
    return notebook


def run(path: Path, bar: Any = None, timeout: float = 600) -> tuple[nbformat.NotebookNode, Outcome]:
    """Execute a notebook in its own folder with a fresh kernel; -> the executed notebook, what became of it.

    timeout: seconds a cell. `bar.update()` is called after each code cell. An error ends this notebook, not
    the course: it is in the outcome, and the outputs so far are in the notebook.
    """
    notebook = read(path)
    code = code_cells(notebook)
    for cell in code:  # what does not run must not look as if it had
        cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name=KERNEL["name"],
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--IPKernelApp.log_level=ERROR"],  # not a warning a kernel about local sockets
        store_widget_state=False,
        coalesce_streams=True,
        on_cell_executed=(lambda **event: bar.update()) if bar is not None else None,
    )
    begin, error = time.perf_counter(), ""
    try:
        client.execute(env={**os.environ, **KERNEL_ENV})
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as failure:
        error = _first_cause(notebook, failure, timeout)
    except Exception:  # a kernel that does not start, a broken notebook: the others should still run
        error = traceback.format_exc(limit=1).strip().splitlines()[-1]
    return notebook, Outcome(path, len(code), time.perf_counter() - begin, error)


def _first_cause(notebook: nbformat.NotebookNode, failure: Exception, timeout: float) -> str:
    """Where it first went wrong, as in: code cell 7: ValueError: no such file."""
    for number, cell in enumerate(code_cells(notebook), start=1):
        for output in cell.outputs:
            if output.output_type == "error" and "raises-exception" not in cell.metadata.get("tags", []):
                if isinstance(failure, CellTimeoutError):
                    return f"code cell {number}: took longer than {timeout:g} s"
                return f"code cell {number}: {output.ename}: {output.evalue}".splitlines()[0]
    return f"{type(failure).__name__}: {failure}".splitlines()[0]


def normalise(notebook: nbformat.NotebookNode, root: Path = ROOT) -> nbformat.NotebookNode:
    """Take out of a notebook what differs from run to run or from machine to machine. Changes it in place."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": LANGUAGE})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        kept = {key: cell.metadata[key] for key in KEPT_CELL_METADATA if key in cell.metadata}
        cell.metadata = nbformat.from_dict(kept)
        if cell.cell_type == "code":
            cell.outputs = [clean for output in cell.outputs if (clean := _normalise_output(output, root))]
    return notebook


def _normalise_output(output: nbformat.NotebookNode, root: Path) -> nbformat.NotebookNode | None:
    """The output without noise; None if nothing is left."""
    if output.output_type == "stream":
        lines = output.text.split("\n")
        if output.name == "stderr":  # bars redraw themselves with \r; a warning stays visible
            lines = [line for line in lines if not PROGRESS_BAR.search(line)]
        output.text = _portable("\n".join(line.rsplit("\r", 1)[-1] for line in lines), root)
        return output if output.text.strip() else None
    if output.output_type == "error":
        output.traceback = [_portable(line, root) for line in output.traceback]
        return output
    output.metadata = nbformat.from_dict({})
    was_widget = output.data.pop(WIDGET, None) is not None  # its model is gone: it would show an error
    for kind, value in output.data.items():
        if isinstance(value, str) and kind.startswith("text/"):
            output.data[kind] = _portable(value, root)
    if was_widget and PROGRESS_BAR.search(output.data.get("text/plain", "")):
        return None
    return output if output.data else None


def _portable(text: str, root: Path) -> str:
    """Text without machine paths, memory addresses and the random ids of pandas' styled tables."""
    places = {str(root) + os.sep: "", str(root): ".", sys.prefix: ".venv", str(Path.home()): "~"}
    for place, name in places.items():
        if len(place) > 1:  # a home of "/" would eat every slash
            text = text.replace(place, name)
    text = re.sub(re.escape(tempfile.gettempdir()) + r"/[\w.-]+", "<tmp>", text)
    text = re.sub(r"\bT_[0-9a-f]{5}(?=\b|_)", "T_id", text)
    return re.sub(r"\b0x[0-9a-fA-F]{6,}\b", "0x...", text)


def table(outcomes: Sequence[Outcome], root: Path = ROOT) -> str:
    """notebook, cells, seconds, ok; one line a notebook, errors below."""
    names = [str(o.path.relative_to(root) if o.path.is_relative_to(root) else o.path) for o in outcomes]
    width = max(len(name) for name in [*names, "notebook"])
    lines = [f"{'notebook':<{width}}  {'cells':>5}  {'seconds':>7}  ok"]
    for name, o in zip(names, outcomes):
        lines.append(f"{name:<{width}}  {o.cells:>5}  {o.seconds:>7.1f}  {'NO' if o.error else 'yes'}")
    failed = [f"{name}: {o.error}" for name, o in zip(names, outcomes) if o.error]
    total = sum(o.seconds for o in outcomes)
    lines.append(f"{len(outcomes) - len(failed)} of {len(outcomes)} notebooks ran, {total:.0f} s in all")
    return "\n".join([*lines, *failed])


def main(argv: Sequence[str] | None = None) -> int:
    """0: every notebook ran; 1: one failed; 2: there is nothing to run."""
    parser = console.Parser(prog="python -m minimal_aia.course", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="notebooks (default: all of the course)")
    parser.add_argument("--write", action="store_true", help="store the outputs of notebooks that ran")
    parser.add_argument("--clean", action="store_true", help="do not execute; take noise out of the files")
    parser.add_argument(
        "--timeout",
        type=partial(console.number, above=True),
        default=600,
        metavar="S",
        help="seconds a cell may take",
    )
    args = parser.parse_args(argv)
    files = args.files or notebooks()
    if missing := [str(path) for path in files if not path.is_file()]:
        parser.error(f"no such notebook: {', '.join(missing)}")
    if not files:
        parser.error(f"no notebooks in {ROOT / 'notebooks'}")
    if args.clean:
        for path in files:
            _store(normalise(read(path)), path)
        return 0

    cells = sum(len(code_cells(read(path))) for path in files)
    outcomes = []
    with tqdm(total=cells, unit="cell") as bar:
        for path in files:
            bar.set_description(path.stem)
            before = bar.n
            notebook, outcome = run(path.resolve(), bar, args.timeout)
            bar.update(before + outcome.cells - bar.n)  # cells after an error do not run
            outcomes.append(outcome)
            if args.write and not outcome.error:
                _store(normalise(notebook), path)
    print(table(outcomes))
    return 1 if any(outcome.error for outcome in outcomes) else 0


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The cells that run: empty code cells do not count."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def _store(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write only what changed, so that a clean notebook keeps its time stamp."""
    nbformat.validate(notebook)
    text = nbformat.writes(notebook, version=nbformat.NO_CONVERT) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    console.start("python -m minimal_aia.course", main)
