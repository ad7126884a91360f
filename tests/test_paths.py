"""The data folder: a clone's own, or the one that MINIMAL_AIA_DATA names; an error says what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

from minimal_aia import cli, paths

CLONE = Path(__file__).resolve().parents[1]


def test_a_clone_has_its_own_data_and_the_variable_names_another(monkeypatch, tmp_path):
    monkeypatch.delenv(paths.VARIABLE, raising=False)
    assert paths.data_folder() == CLONE / "data_samples"
    for empty in ("", "  "):
        monkeypatch.setenv(paths.VARIABLE, empty)
        assert paths.data_folder() == CLONE / "data_samples"
    monkeypatch.setenv(paths.VARIABLE, str(tmp_path / "dätä x"))
    assert paths.data_folder() == tmp_path / "dätä x"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(paths.VARIABLE, "here")
    assert paths.data_folder() == tmp_path / "here"  # later changes of directory do not move it
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(paths.VARIABLE, "~/data")
    assert paths.data_folder() == tmp_path / "data"


def test_the_remedy_fits_clone_wheel_and_wrong_variable(monkeypatch, tmp_path):
    monkeypatch.delenv(paths.VARIABLE, raising=False)
    assert "git checkout -- data_samples" in paths.how_to_get()
    monkeypatch.setattr(paths, "ROOT", tmp_path)  # site-packages: no pyproject.toml
    assert "clone the repository and set MINIMAL_AIA_DATA=" in paths.how_to_get()
    monkeypatch.setenv(paths.VARIABLE, "/nowhere")
    assert paths.how_to_get().startswith("MINIMAL_AIA_DATA=/nowhere is no complete")


def test_a_lab_model_comes_from_the_chosen_folder_or_one_line_says_why_not(monkeypatch, tmp_path, capsys):
    from minimal_aia.models import lab

    samples = tmp_path / "samples"
    samples.mkdir()
    shutil.copytree(CLONE / "data_samples/images", samples / "images")
    shutil.copy(CLONE / "data_samples/generation.jsonl", samples)
    line = ["profile", "--model", "lab/unified", "--task", "generation", "--limit", "2", "--samples"]
    monkeypatch.setattr(lab, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.delenv(paths.VARIABLE, raising=False)
    assert cli.main([*line, str(samples / "generation.jsonl")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/checkpoints/unified: no lab model there; it is not in the wheel" in said
    shutil.copytree(CLONE / "data_samples/checkpoints/unified", tmp_path / "checkpoints/unified")
    adapter = lab.load_lab("lab/unified")
    assert (adapter.name, adapter.tasks) == ("lab/unified", ("generation", "understanding"))
