"""The table of `minimal-aia bench` says what the files say, and what was not measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from minimal_aia import bench_command
from minimal_aia.cli import main

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_table_reads_the_files_and_admits_what_is_missing(tmp_path):
    times = {"sft": 2.0, "aia": 2.1, "eager": 3.0, "authors-recipe": 21.0}
    step = {
        "time_over_sft": {k: v / 2 for k, v in times.items()},
        "memory_over_sft": dict.fromkeys(times, 1.0),
    }
    (tmp_path / "training_step.json").write_text(json.dumps(step))
    lines = bench_command.table(tmp_path).splitlines()
    assert "| training step with AIA over plain SFT, time | ≤ 1.10 | 1.05 |" in lines
    assert "| the released recipe's way over ours, time | ≥ 5 | 10.00 |" in lines
    assert sum("not measured" in line for line in lines) == 5


def test_the_stored_figures_make_a_table(capsys):
    assert main(["bench", "--table"]) == 0
    assert capsys.readouterr().out.startswith("| what | target | measured |")


def test_every_script_exists_and_an_installed_package_says_what_it_needs(monkeypatch, capsys, tmp_path):
    assert all((BENCHMARKS / f"{name}.py").is_file() for name in bench_command.SCRIPTS)
    monkeypatch.setattr(bench_command, "FOLDER", tmp_path / "nowhere")
    assert main(["bench"]) == 2
    assert "run this in a clone of the repository" in capsys.readouterr().err


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import training_step

    yield training_step
    sys.modules.pop("training_step")


def test_all_sides_of_the_training_step_compute_the_same_loss(step, monkeypatch):
    """A benchmark of different computations would compare nothing."""
    import argparse

    monkeypatch.setitem(step.SHAPES, "small", (32, 64, 2, 2, 1024))
    monkeypatch.setattr(step, "FIXED", {"generation": 1100, "understanding": 1100})
    args = argparse.Namespace(shape="small", device="cpu", dtype="float32", batch=1)
    model, aia_loss = step.make(args)
    monkeypatch.setattr(step.torch, "randn", _same_rows(step.torch.randn))
    monkeypatch.setattr(step.torch, "randint", _same_rows(step.torch.randint))
    losses = {
        side: step.step(model, side, step.prepare(model, side, args, 1), aia_loss) for side in step.SIDES
    }
    assert losses["aia"] == pytest.approx(losses["eager"], rel=1e-5)
    assert losses["authors-recipe"] == pytest.approx(losses["eager"], rel=1e-4)
    assert losses["sft"] < losses["aia"]


def _same_rows(make):
    """Random numbers that do not depend on how long the rows are padded."""

    def made(*args, generator, **kwargs):
        head, (count, length, *rest) = (args[:-1], args[-1]) if isinstance(args[-1], tuple) else ((), args)
        full = (count, 3000, *rest)
        whole = make(*head, full, generator=generator, **kwargs) if head else make(*full, generator=generator)
        return whole[:, :length]

    return made
