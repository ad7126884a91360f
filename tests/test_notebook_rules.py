"""What every stored notebook must be like, so that a reader who runs nothing still sees the course."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from minimal_aia.course import ROOT, code_cells, normalise, notebooks

COURSE = notebooks()
MAX_BYTES = 1_500_000
# A path from the root of some machine's disk. A URL's path and a fraction such as 3/4 are not meant.
MACHINE_PATH = re.compile(
    r"(?<![\w.~/:])/(home|root|Users|tmp|work|opt|mnt|usr|var|srv|data)/[\w.-]+|\b[A-Z]:\\[\w.-]"
)


def texts(cell: NotebookNode) -> list[str]:
    """The source and every stored text of a code cell."""
    found = [cell.source]
    for output in cell.get("outputs", []):
        found += [output.get("text", ""), *output.get("traceback", [])]
        found += [v for kind, v in output.get("data", {}).items() if kind.startswith("text/")]
    return found


def problems(notebook: NotebookNode, chapter: bool = True) -> list[str]:
    """Every rule that a notebook breaks. chapter: False for a notebook of solutions, which may be short."""
    found = []
    code = code_cells(notebook)
    counts = [cell.execution_count for cell in code]
    if counts != list(range(1, len(code) + 1)):
        found.append(f"not executed top to bottom in one go: {counts}")
    if chapter and not 15 <= len(code) <= 40:
        found.append(f"{len(code)} code cells, 15 to 40 are a chapter")
    if len([cell for cell in code if cell.outputs]) < len(code) / 3:
        found.append("fewer than a third of the code cells store an output")
    opening = notebook.cells[0] if notebook.cells else new_markdown_cell("")
    if opening.cell_type != "markdown" or not opening.source.startswith("# "):
        found.append("does not open with a title")
    elif chapter:
        for what, pattern in {
            "what you learn": r"learn",
            "time": r"\btime\b|minutes?",
            "needs": r"\bneeds?\b",
        }.items():
            if not re.search(pattern, opening.source, re.IGNORECASE):
                found.append(f"the opening cell does not say: {what}")
    for number, cell in enumerate(code, start=1):
        where, tags = f"code cell {number}", cell.metadata.get("tags", [])
        if len(cell.source.splitlines()) > 60:
            found.append(f"{where} is longer than 60 lines")
        for output in cell.outputs:
            if output.output_type == "error" and "raises-exception" not in tags:
                found.append(f"{where} stores an error: {output.ename}")
            if output.output_type == "stream" and output.name == "stderr" and len(output.text) > 400:
                found.append(f"{where} stores {len(output.text)} characters of stderr")
    for number, cell in enumerate(notebook.cells, start=1):
        for text in texts(cell):
            if path := MACHINE_PATH.search(text):
                found.append(f"cell {number} names a path of this machine: {path[0]}")
    if normalise(copy.deepcopy(notebook)) != notebook:
        found.append("stored with noise (run: python -m minimal_aia.course --clean)")
    return found


def test_the_course_is_there():
    """Without this, no notebook would mean no test below."""
    assert (ROOT / "notebooks/00_start_here.ipynb") in COURSE
    stray = [
        p
        for p in ROOT.glob("notebooks/**/*.ipynb")
        if p not in COURSE and ".ipynb_checkpoints" not in p.parts
    ]
    assert not stray, "neither a chapter nor a solution: nothing runs it"


@pytest.mark.parametrize("path", COURSE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_notebook_keeps_the_rules(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size <= MAX_BYTES, f"{path.stat().st_size / 1e6:.1f} MB"
    assert problems(notebook, chapter=path.stem[0].isdigit() and path.parent.name != "solutions") == []


def test_the_summary_is_the_code_that_survives():
    cells = code_cells(nbformat.read(ROOT / "notebooks/summary.ipynb", as_version=4))
    lines = [line for cell in cells for line in cell.source.splitlines() if line.strip()]
    assert len(lines) < 120


def test_lax_list_names_existing_notebooks_each_with_a_reason():
    for line in (ROOT / "tests/notebooks/lax.txt").read_text().splitlines():
        path, _, reason = line.partition("#")
        if path.strip():
            assert (ROOT / path.strip()).is_file(), f"{path.strip()} does not exist"
            assert reason.strip(), f"{path.strip()}: say why its outputs are not compared"


# --- the rules themselves: a notebook that keeps them, and one change at a time that breaks one -------------


def good() -> NotebookNode:
    cells = [new_markdown_cell("# Title\n\nYou will learn X. Time: 5 minutes. Needs: a CPU.")]
    for number in range(1, 21):
        text = new_output("stream", name="stdout", text="see https://arxiv.org/abs/2511.22663, 3/4 of /a\n")
        cells.append(new_code_cell(f"x = {number}", execution_count=number, outputs=[text]))
    return normalise(new_notebook(cells=cells))


def test_a_good_notebook_has_no_problem():
    assert problems(good()) == []


def _skip_a_cell(nb):
    nb.cells[3].execution_count = None


def _run_out_of_order(nb):
    nb.cells[3].execution_count, nb.cells[4].execution_count = 4, 3


def _drop_outputs(nb):
    for cell in nb.cells[1:]:
        cell.outputs = []


def _too_short(nb):
    del nb.cells[15:]


def _no_title(nb):
    nb.cells[0].source = "You will learn X. Time: 5 minutes. Needs: a CPU."


def _no_time(nb):
    nb.cells[0].source = "# Title\n\nYou will learn X. Needs: a CPU."


def _error(nb):
    nb.cells[2].outputs = [new_output("error", ename="ValueError", evalue="x", traceback=["x"])]


def _stderr(nb):
    nb.cells[2].outputs = [new_output("stream", name="stderr", text="warning " * 60)]


def _long_cell(nb):
    nb.cells[2].source = "x = 1\n" * 61


def _path_in_output(nb):
    nb.cells[2].outputs[0].text = "saved to " + "/home/" + "me/aia/x.png"


def _path_in_source(nb):
    nb.cells[2].source = "open('" + "/tmp/" + "x.png')"


def _path_in_text(nb):
    nb.cells[0].source += " It is in " + "C:\\" + "aia."


def _editor_noise(nb):
    nb.cells[2].metadata["execution"] = {"iopub.status.idle": "2030-01-01T00:00:00Z"}


def _kernel_of_one_machine(nb):
    nb.metadata.kernelspec.name = "my-env"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_skip_a_cell, "not executed top to bottom"),
        (_run_out_of_order, "not executed top to bottom"),
        (_drop_outputs, "fewer than a third"),
        (_too_short, "14 code cells"),
        (_no_title, "does not open with a title"),
        (_no_time, "does not say: time"),
        (_error, "code cell 2 stores an error: ValueError"),
        (_stderr, "480 characters of stderr"),
        (_long_cell, "code cell 2 is longer than 60 lines"),
        (_path_in_output, "cell 3 names a path of this machine"),
        (_path_in_source, "cell 3 names a path of this machine"),
        (_path_in_text, "cell 1 names a path of this machine"),
        (_editor_noise, "stored with noise"),
        (_kernel_of_one_machine, "stored with noise"),
    ],
)
def test_each_rule_catches_what_it_is_for(change, said):
    notebook = good()
    change(notebook)
    found = problems(notebook)
    assert any(said in problem for problem in found), found
    assert len(found) == 1, found


def test_an_announced_exception_and_a_short_solution_are_allowed():
    notebook = good()
    _error(notebook)
    notebook.cells[2].metadata["tags"] = ["raises-exception"]
    assert problems(notebook) == []
    _too_short(notebook)
    notebook.cells[0].source = "# Solutions"
    assert problems(notebook, chapter=False) == []


def test_a_path_in_a_url_is_no_machine_path():
    assert not MACHINE_PATH.search("https://example.org/home/x and notebooks/data/x and a/tmp/b")
    assert MACHINE_PATH.search("'" + "/home/" + "x'")


def test_solutions_are_part_of_the_course(tmp_path):
    folder: Path = tmp_path / "notebooks/solutions"
    folder.mkdir(parents=True)
    for name in ("notebooks/01_b.ipynb", "notebooks/00_a.ipynb", "notebooks/solutions/01_b.ipynb"):
        (tmp_path / name).touch()
    order = [path.relative_to(tmp_path / "notebooks").as_posix() for path in notebooks(tmp_path)]
    assert order == ["00_a.ipynb", "01_b.ipynb", "solutions/01_b.ipynb"]
