"""Sweeps: read files, do each run once, survive a kill, and compare arms as a hand calculation does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_1samp, ttest_rel

from minimal_aia.cli import main
from minimal_aia.lab import sweep, sweep_report
from minimal_aia.stats import mean_interval

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = [*sorted((FOLDER / "ablations").glob("*.yaml")), FOLDER / "small" / "headline.yaml"]
TINY = {
    "name": "tiny",
    "question": "does it run?",
    "base": {"model": "lab/unified", "max_steps": 2, "per_device_train_batch_size": 4},
    "seeds": [0, 1],
    "baseline": "without",
    "arms": {"without": {"aia_weight": 0}, "with": {}},
    "items": 4,
}


def write(folder: Path, **changes) -> Path:
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump({**TINY, **changes}))
    return file


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_read_and_has_its_baseline(path):
    found = sweep.read_sweep(path)
    assert found.name == (path.stem if path.parent.name == "ablations" else path.parent.name)
    assert {run.arm for run in found.runs} > {found.baseline}
    assert len({run.key() for run in found.runs}) == len(found.runs), "two arms with the same settings"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": {"without": {"aia_wieght": 0}}}, "arm 'without': unknown key 'aia_wieght'; did you mean"),
        ({"baseline": "none"}, "the baseline 'none' is none of the arms"),
        ({"seeds": "0-4"}, "seeds must be a list"),
        ({"arms": {True: {}, "without": {}}}, "arm True is no text: quote it"),
        ({"extra": 1}, "a sweep file has the keys"),
    ],
)
def test_a_faulty_file_is_one_line_that_names_it(tmp_path, capsys, changes, words):
    assert main(["sweep", str(write(tmp_path, **changes)), "--runs", str(tmp_path / "runs")]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert "tiny.yaml" in message
    assert message.count("\n") == 1


def test_a_missing_start_is_told_before_any_work(tmp_path, capsys):
    file = write(tmp_path, base={"model": "nowhere/unified-seed{seed}"})
    assert main(["sweep", str(file), "--runs", str(tmp_path / "runs")]) == 2
    assert "2 starting checkpoints are missing, the first is nowhere/unified-seed0" in capsys.readouterr().err


def test_runs_are_told_apart_by_what_decides_the_result():
    run = sweep.Run("a", "b", sweep.TrainConfig(seed=1))
    assert run.key() == sweep.Run("other", "name", sweep.TrainConfig(seed=1, output_dir="elsewhere")).key()
    assert run.key() != sweep.Run("a", "b", sweep.TrainConfig(seed=2)).key()
    assert run.key() != sweep.Run("a", "b", sweep.TrainConfig(seed=1), items=5).key()


def command(file: Path, runs: Path, out: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "minimal_aia.cli",
        "sweep",
        str(file),
        "--runs",
        str(runs),
        "--out",
        str(out),
    ]


def test_a_killed_sweep_goes_on_and_its_table_is_that_of_an_undisturbed_one(tmp_path):
    file = write(tmp_path)
    whole = [tmp_path / "whole-runs", tmp_path / "whole"]
    subprocess.run(command(file, *whole), check=True, capture_output=True, timeout=300)
    killed = [tmp_path / "killed-runs", tmp_path / "killed"]
    process = subprocess.Popen(command(file, *killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)  # fmt: skip
    deadline = time.time() + 300
    finished = lambda: [path for path in killed[0].glob("*/config.json") if path.parent.suffix != ".tmp"]  # noqa: E731
    while not finished() and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {path.parent.name: path.stat().st_mtime_ns for path in finished()}
    assert 1 <= len(before) < 4
    assert not (killed[1] / "metrics.csv").exists()
    subprocess.run(command(file, *killed), check=True, capture_output=True, timeout=300)
    for name in ("metrics.csv", "curves.csv", "log.csv", "report.md"):
        assert (killed[1] / name).read_bytes() == (whole[1] / name).read_bytes(), name
    for name, written in before.items():
        assert (killed[0] / name / "config.json").stat().st_mtime_ns == written, (
            "a finished run was done again"
        )
    assert not list(killed[0].glob("*.tmp"))
    stored = json.loads((killed[0] / next(iter(before)) / "config.json").read_text())
    assert stored["config"]["max_steps"] == 2


def test_a_sweep_clears_up_after_dead_ones_only(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getpid()):
        (tmp_path / f"0123.{pid}.tmp").mkdir()
    sweep.run_all([], tmp_path)
    assert [folder.name for folder in tmp_path.iterdir()] == [f"0123.{os.getpid()}.tmp"]


def test_a_model_that_is_only_measured_has_no_log(tmp_path, monkeypatch):
    found = sweep.read_sweep(write(tmp_path, arms={"without": {"max_steps": 0}, "with": {}}, seeds=[0]))
    score = pd.DataFrame({"task": ["generation"], "value": [1.0]})
    steps = {0: pd.DataFrame([]), 2: pd.DataFrame({"step": [0, 1]})}
    measure = lambda run, device: {"metrics": score, "log": steps[run.config.max_steps]}  # noqa: E731
    monkeypatch.setattr(sweep, "measure", measure)
    for run in found.runs:
        sweep.execute(run, tmp_path / "runs")
    assert sweep.table([found], tmp_path / "runs", "log")["arm"].tolist() == ["with", "with"]
    assert sweep.table([found], tmp_path / "runs")["arm"].tolist() == ["with", "without"]


def test_a_run_that_fails_ends_the_sweep_and_what_is_done_stays(tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    arms = {
        "without": {"aia_weight": 0},
        "wither": {"model": str(broken)},
        "with": {},
    }  # in the order of the alphabet
    file, runs = write(tmp_path, arms=arms, seeds=[0, 1, 2]), tmp_path / "runs"
    assert main(["sweep", str(file), "--runs", str(runs)]) == 2
    assert "broken" in capsys.readouterr().err
    assert 3 <= len(list(runs.glob("*/config.json"))) < 6
    assert not list(runs.glob("*.tmp"))


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12).filter(lambda v: np.std(v) > 1e-3))
@settings(max_examples=50)
def test_the_interval_is_students(values):
    mean, low, high = mean_interval(np.array(values))
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose([mean, low, high], [np.mean(values), *expected], rtol=1e-9, atol=1e-9)


def test_the_interval_covers_a_known_mean_nineteen_times_in_twenty():
    draws = np.random.default_rng(0).normal(3.0, 2.0, (4000, 5))
    inside = [low <= 3.0 <= high for _, low, high in map(mean_interval, draws)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.012)


def synthetic() -> pd.DataFrame:
    """Two arms, six seeds: seeds differ by far more than the arms do."""
    rng = np.random.default_rng(1)
    rows = []
    for seed in range(6):
        level = rng.normal(0.2, 0.05)
        for arm, shift in (("without", 0.0), ("with", -0.01)):
            for task in ("generation", "understanding"):
                value = level + shift + rng.normal(0, 0.001)
                rows.append(("tiny", arm, seed, task, "next_token_loss", "all", value, 512))
            for group in ("color", "count"):
                rows.append(("tiny", arm, seed, "understanding", "exact_match", group, rng.uniform(), 100))
    return pd.DataFrame(rows, columns=["sweep", "arm", "seed", "task", "metric", "group", "value", "items"])


def test_differences_are_paired_by_seed():
    metrics = synthetic()
    values = sweep_report.per_run(metrics)
    found = sweep_report.compare(values, "with", "without").set_index(["metric", "task"])
    losses = metrics[metrics["metric"] == "next_token_loss"].pivot_table(
        index="seed", columns=["arm", "task"], values="value"
    )
    test = ttest_rel(losses["with", "generation"], losses["without", "generation"])
    row = found.loc[("next_token_loss", "generation")]
    np.testing.assert_allclose([row.low, row.high], test.confidence_interval(0.95), rtol=1e-9)
    assert row.high < 0, "paired, the difference is plain; unpaired, the seeds would hide it"
    both = losses["with"].sum(axis=1) - losses["without"].sum(axis=1)
    assert found.loc[("next_token_loss", "sum"), "difference"] == pytest.approx(both.mean())


def test_groups_weigh_the_same_and_the_report_shows_every_arm(tmp_path):
    metrics = synthetic()
    answers = metrics[
        (metrics["metric"] == "exact_match") & (metrics["arm"] == "with") & (metrics["seed"] == 2)
    ]
    values = sweep_report.per_run(metrics)
    one = values[(values["metric"] == "exact_match") & (values["arm"] == "with") & (values["seed"] == 2)]
    assert one["value"].item() == pytest.approx(answers["value"].mean())
    runs = tuple(sweep.Run("tiny", arm, sweep.TrainConfig()) for arm in ("without", "with"))
    sweep_report.write([sweep.Sweep("tiny", "why?", "without", runs)], metrics, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "| without " in text
    assert "| with " in text
    shift = sweep_report.compare(values, "with", "without").iloc[0]
    assert f"{shift.difference:+.4f} [{shift.low:+.4f}, {shift.high:+.4f}]" in text
