"""`make course`: executes, reports, stores without noise. Then nbval with our settings on what was stored."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from minimal_aia.course import KERNEL, KERNEL_ENV, Outcome, main, normalise, run, table

ROOT = Path(__file__).resolve().parents[1]
SANITIZE = ROOT / "tests/notebooks/sanitize.cfg"


def write(path: Path, *sources: str, tags: dict[int, list[str]] | None = None) -> Path:
    """A notebook with one code cell a source; `tags` by the number of the cell."""
    cells = [new_markdown_cell("# A notebook")]
    for number, source in enumerate(sources):
        cells.append(new_code_cell(source, metadata={"tags": (tags or {}).get(number, [])}))
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": KERNEL}), path)
    return path


def outputs(path: Path) -> list[list]:
    return [cell.outputs for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """Two notebooks, one of which fails at its second cell, executed once with --write."""
    folder = tmp_path_factory.mktemp("course")
    noisy = (
        "import sys, tempfile, pathlib\n"
        "print('here:', pathlib.Path.cwd())\n"
        "print(object())\n"
        "print(sys.prefix)\n"
        "print(tempfile.mkdtemp())\n"
        "import os, tqdm\n"
        "print('offline:', os.environ['HF_HUB_OFFLINE'], list(tqdm.tqdm(range(2))))"
    )
    bar = "from tqdm import tqdm\nfor _ in tqdm(range(3), disable=False): pass\nprint('trained')"
    widget_bar = "from tqdm.notebook import tqdm as bar\nfor _ in bar(range(3), disable=False): pass"
    slider = "import ipywidgets\nipywidgets.IntSlider(value=3)"
    warning = "import warnings\nwarnings.warn('look here')"
    good = write(folder / "a.ipynb", noisy, bar, widget_bar, slider, warning, "import os, time; 0.1 + 0.2")
    bad = write(folder / "b.ipynb", "x = 1", "raise ValueError('two\\nlines')", "print('not reached')")
    return {"good": good, "bad": bad, "before": bad.read_bytes()}


@pytest.fixture(scope="module")
def executed(course):
    done = subprocess.run(
        [sys.executable, "-m", "minimal_aia.course", "--write", course["good"], course["bad"]],
        capture_output=True,
        text=True,
    )
    return {**course, "done": done}


def test_a_failing_notebook_fails_the_course_but_not_the_others(executed):
    done = executed["done"]
    assert done.returncode == 1
    assert "8/9" not in done.stdout
    assert "9/9" in done.stderr, "the progress bar reaches its end"
    rows = done.stdout.splitlines()
    assert rows[0].split() == ["notebook", "cells", "seconds", "ok"]
    good, bad = rows[1].split(), rows[2].split()
    assert (Path(good[0]).name, good[1], good[3]) == ("a.ipynb", "6", "yes")
    assert (Path(bad[0]).name, bad[1], bad[3]) == ("b.ipynb", "3", "NO")
    assert rows[3].startswith("1 of 2 notebooks ran")
    assert rows[4].endswith("b.ipynb: code cell 2: ValueError: two")
    assert executed["before"] == executed["bad"].read_bytes(), "what failed must not be stored"


def test_stored_outputs_hold_no_noise(executed):
    stored = outputs(executed["good"])
    text = stored[0][0].text.splitlines()
    assert text[1] == "<object object at 0x...>"
    assert text[2] == ".venv" or not text[2].startswith("/")
    assert text[3] == "<tmp>"
    assert text[4:] == ["offline: 1 [0, 1]"]
    assert len(stored[0]) == 1, "tqdm is quiet by default"
    assert [o.text for o in stored[1]] == ["trained\n"], "the bar goes, what was printed stays"
    assert stored[2] == [], "a widget's bar goes as a whole"
    assert list(stored[3][0].data) == ["text/plain"], "a widget's dead model goes, its text stays"
    assert "look here" in stored[4][0].text, "a warning stays"
    assert stored[5][0].data["text/plain"] == "0.30000000000000004"
    notebook = nbformat.read(executed["good"], as_version=4)
    assert [cell.id for cell in notebook.cells] == [f"cell-{i:02d}" for i in range(7)]
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert [c.execution_count for c in notebook.cells if c.cell_type == "code"] == [1, 2, 3, 4, 5, 6]


def test_storing_again_gives_the_same_bytes(executed):
    first = executed["good"].read_bytes()
    assert main(["--write", str(executed["good"])]) == 0
    assert executed["good"].read_bytes() == first


def test_without_write_nothing_is_stored(tmp_path):
    path = write(tmp_path / "a.ipynb", "print(1)")
    before = path.read_bytes()
    assert main([str(path)]) == 0
    assert path.read_bytes() == before


def test_clean_keeps_outputs_and_takes_out_what_an_editor_adds(tmp_path):
    path = write(tmp_path / "a.ipynb", "print(1)", tags={0: ["hide-input"]})
    notebook = nbformat.read(path, as_version=4)
    cell = notebook.cells[1]
    cell.metadata.update(
        {"execution": {"iopub.execute_input": "2030-01-01"}, "collapsed": False, "jupyter": {}}
    )
    cell.execution_count, cell.outputs = 1, [new_output("stream", name="stdout", text="1\n")]
    notebook.metadata["widgets"] = {"state": {}}
    notebook.metadata["language_info"] = {"name": "python", "version": "3.12.1"}
    nbformat.write(notebook, path)
    assert main(["--clean", str(path)]) == 0
    cleaned = nbformat.read(path, as_version=4)
    assert cleaned.cells[1].metadata == {"tags": ["hide-input"], "jupyter": {}}
    assert cleaned.cells[1].outputs[0].text == "1\n"
    assert set(cleaned.metadata) == {"kernelspec", "language_info"}
    assert "version" not in cleaned.metadata.language_info
    once = path.read_bytes()
    assert main(["--clean", str(path)]) == 0
    assert path.read_bytes() == once


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("{root}/data_samples/x.png", "data_samples/x.png"),
        ("in {root}", "in ."),
        ("{home}/.cache", "~/.cache"),
        ("<A at 0x7f3a5c0b1e20>", "<A at 0x...>"),
        ("mask 0x1F", "mask 0x1F"),
        ("step 1\rstep 2\rdone", "done"),
    ],
)
def test_text_becomes_portable(text, stored, tmp_path):
    text = text.format(root=tmp_path, home=Path.home())
    cell = new_code_cell("x", outputs=[new_output("stream", name="stdout", text=text)])
    assert normalise(new_notebook(cells=[cell]), tmp_path).cells[0].outputs[0].text == stored


def test_a_cell_that_takes_too_long_ends_its_notebook(tmp_path):
    path = write(tmp_path / "a.ipynb", "import time; time.sleep(60)", "print('not reached')")
    notebook, outcome = run(path, timeout=1)
    assert outcome.error == "code cell 1: took longer than 1 s"
    assert notebook.cells[2].outputs == []


def test_an_exception_that_is_announced_by_a_tag_is_no_failure(tmp_path):
    path = write(tmp_path / "a.ipynb", "raise ValueError('shown on purpose')", tags={0: ["raises-exception"]})
    _, outcome = run(path)
    assert outcome.error == ""


def test_a_missing_notebook_is_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["no/such.ipynb"])
    assert stop.value.code == 2
    assert "no/such.ipynb" in capsys.readouterr().err


def test_table_shortens_paths_inside_the_clone():
    text = table([Outcome(ROOT / "notebooks/00.ipynb", 20, 61.26)])
    assert text.splitlines()[1].split() == ["notebooks/00.ipynb", "20", "61.3", "yes"]
    assert text.splitlines()[2] == "1 of 1 notebooks ran, 61 s in all"


def test_nbval_runs_under_the_settings_that_the_outputs_were_stored_with():
    makefile = (ROOT / "Makefile").read_text()
    assert f"NBVAL = {' '.join(f'{key}={value}' for key, value in KERNEL_ENV.items())} " in makefile


# --- nbval with our settings --------------------------------------------------------------------------------


def test_nbval_agrees_with_what_was_stored(tmp_path):
    """Noise that was normalised in the file is no difference when it comes back; a changed number is."""
    noisy = (
        "import time, tempfile\n"
        "print(object(), f'{time.time() % 1:.3f} s', tempfile.mkdtemp())\n"
        "print('loss', 0.5 + time.time() % 1 * 1e-4, 1e-9 * time.time())\n"
        "print(f'{(time.time() % 1 - 1) * 1e-4:.2f}')"
    )
    bar = "from tqdm.notebook import tqdm\nfor _ in tqdm(range(3)): pass"
    cells = [noisy, "0.25", "import time; time.time()", "'not shown';", bar]
    tags = {2: ["nbval-ignore-output"]}
    same = write(tmp_path / "same.ipynb", *cells, tags=tags)
    changed = write(tmp_path / "changed.ipynb", *cells, tags=tags)
    assert main(["--write", str(same), str(changed)]) == 0
    notebook = nbformat.read(changed, as_version=4)
    notebook.cells[2].outputs[0].data["text/plain"] = "0.26"
    nbformat.write(notebook, changed)

    command = (
        f"-m pytest -rA -p no:cacheprovider -p tests.notebooks.like_the_course --rootdir {tmp_path} --nbval"
    )
    settings = ["--nbval-current-env", f"--nbval-sanitize-with={SANITIZE}", same, changed]
    done = subprocess.run(
        [sys.executable, *command.split(), *settings], capture_output=True, text=True, cwd=ROOT
    )
    lines = [line.split(" - ")[0] for line in done.stdout.splitlines()]
    found = [re.sub(r" .*/", " ", line) for line in lines if line.startswith(("PASSED", "FAILED"))]
    assert sorted(found) == [
        "FAILED changed.ipynb::Cell 1",
        "PASSED changed.ipynb::Cell 0",
        "PASSED changed.ipynb::Cell 2",
        "PASSED changed.ipynb::Cell 3",
        "PASSED changed.ipynb::Cell 4",
        "PASSED same.ipynb::Cell 0",
        "PASSED same.ipynb::Cell 1",
        "PASSED same.ipynb::Cell 2",
        "PASSED same.ipynb::Cell 3",
        "PASSED same.ipynb::Cell 4",
    ], done.stdout
