"""Every wrong argument that a person might give: one line that says what to do, exit code 2, no traceback.

The cases are lines of wrong_arguments.txt, the files they name are made by wrong_files.py. Signals, full
disks and folders without permission are in test_wrong_surroundings.py.
"""

from __future__ import annotations

import ast
import importlib
import logging
import re
from pathlib import Path

import pytest
import wrong_cases
import wrong_files

from minimal_aia.cli import main
from minimal_aia.console import guarded
from minimal_aia.paths import ROOT

# What may stand on stderr before the error of a run that had begun: progress bars, samples passed over.
BEFORE = re.compile(r"\d+%\||skipped a bad sample: ")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return wrong_files.make(tmp_path_factory.mktemp("földer with spaces"))


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def run(case: wrong_cases.Case, out: Path) -> int:
    argv = [part.replace("OUT", str(out)).replace("ROOT", str(ROOT)) for part in case.argv]
    try:
        if case.command in wrong_cases.SCRIPTS:
            script = importlib.import_module(f"minimal_aia.{case.command}")
            return guarded(f"python -m minimal_aia.{case.command}", lambda: script.main(argv))
        return main([*case.command.removeprefix("minimal-aia").split(), *argv])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize("case", [c for c in wrong_cases.cases() if c.kind != "works"], ids=str)
def test_a_wrong_argument_is_one_line_that_says_what_to_do(case, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(files)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # libraries log to the stderr of the test before
    if case.kind == "no GPU":  # also where there is one
        monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    before = names(files)
    code = run(case, tmp_path)
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line.strip() and not BEFORE.search(line)
    ]
    assert code == 2, lines
    assert re.match(r"(minimal-aia|python -m minimal_aia)[\w. -]*: error: ", lines[0])
    assert all(line.startswith("  ") for line in lines[1:]), lines  # one line for each of several faults
    assert case.said in "\n".join(lines)
    assert "a bug?" not in lines[0]
    assert names(files) == before
    if case.command != "train":  # a run that meets its first bad sample has written its recipe
        assert not names(tmp_path)


@pytest.mark.parametrize("case", [c for c in wrong_cases.cases() if c.kind == "works"], ids=str)
def test_what_looks_odd_but_is_right_works(case, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(files)
    code = run(case, tmp_path)
    out, err = capsys.readouterr()
    assert code == 0, err
    assert case.said.replace("OUT", str(tmp_path)) in out


def test_debug_shows_the_traceback(files, monkeypatch):
    monkeypatch.chdir(files)
    with pytest.raises(FileNotFoundError, match=r"no\.yaml"):
        main(["train", "no.yaml", "--debug"])


@pytest.mark.parametrize("script", wrong_cases.SCRIPTS)
def test_scripts_end_as_the_command_line_does(script):
    """Run as `python -m`, they go through `console.start`, as the cases above go through `guarded`."""
    tree = ast.parse((ROOT / "minimal_aia" / f"{script.replace('.', '/')}.py").read_text(encoding="utf-8"))
    last = ast.unparse(tree.body[-1])
    assert re.search(rf"start\('python -m minimal_aia\.{re.escape(script)}', main\)", last)


def test_the_readme_counts_what_was_tried():
    text = (ROOT / "tests/README.md").read_text(encoding="utf-8")
    assert wrong_cases.count() in text, "print(wrong_cases.count()) and put it into tests/README.md"
