"""Real runs of a lab model that are killed, stopped, starved of disk, poisoned; and end as if nothing was.

`kill_worker.py` makes all lives in one go, because imports cost seconds; the tests read what it found. The
model has attention dropout, so equal numbers also mean that the random state came back.
"""

from __future__ import annotations

import json
import os
import re
import signal
from itertools import pairwise
from pathlib import Path

import pytest
from worlds import run_script

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("kills"),  # they read what one worker has made
    pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forked: not on Windows"),
]

STEPS, SHORT, SAVE_STEPS = 24, 12, 2  # of the worker


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("kills")
    run_script("train/kill_worker.py", root, timeout=600)
    return root


@pytest.fixture(scope="module")
def runs(root):
    return json.loads((root / "lives.json").read_text())


def error_of(life: dict) -> str:
    """The one error message of a life, without the progress bars around it."""
    (message,) = re.findall(r"error: .*", life["said"])
    return message


def assert_same(runs: dict, root: Path, name: str, whole: str) -> None:
    """Every life of a run gave the uninterrupted run's numbers, to the last bit, and so are the weights."""
    for kind in ("step", "log"):
        expected = {note[kind]: note for note in runs[whole]["notes"] if kind in note and len(note) > 1}
        found = [note for note in runs[name]["notes"] if kind in note and len(note) > 1]
        assert {note[kind] for note in found} == expected.keys()
        for note in found:
            assert note == expected[note[kind]]
    weights = [(root / run / "run" / "model.safetensors").read_bytes() for run in (name, whole)]
    assert weights[0] == weights[1]


def test_the_uninterrupted_run_trains(runs):
    """What the others are compared with: all steps, entries every third, losses that move."""
    notes = runs["whole"]["notes"]
    assert runs["whole"]["code"] == 0
    assert [note["step"] for note in notes if "step" in note] == list(range(1, STEPS + 1))
    entries = [note for note in notes if "log" in note and "loss" in note]
    assert [note["log"] for note in entries] == list(range(3, STEPS + 1, 3))
    assert len({note["loss"] for note in entries}) == len(entries)
    assert {"ntp/generation", "ntp/understanding", "aia/generation", "aia/understanding"} <= entries[0].keys()


def test_twenty_kills_cost_steps_but_change_nothing(runs, root):
    run = runs["killed"]
    assert run["code"] == 0
    assert_same(runs, root, "killed", "whole")


def test_the_kills_were_real_and_hit_every_phase(runs):
    lives = runs["killed"]["lives"]
    assert len(lives) >= 20
    assert all(life["code"] == -signal.SIGKILL for life in lives)
    assert any(life["half"] for life in lives)  # while a checkpoint was being written
    assert any(life["step"] == 0 for life in lives)  # before the first step
    assert len({life["saved"] for life in lives}) >= 5  # from the beginning of the run to its end
    begins = [note["begins"] for note in runs["killed"]["notes"] if "begins" in note]
    assert begins == sorted(begins)


def test_a_kill_costs_at_most_the_steps_since_the_last_checkpoint(runs):
    for life in runs["killed"]["lives"]:
        assert life["step"] - life["saved"] <= SAVE_STEPS
    saved = [life["saved"] for life in runs["killed"]["lives"]]
    assert saved == sorted(saved)  # no checkpoint is ever lost
    steps = [note.get("begins", note.get("step")) for note in runs["killed"]["notes"] if "log" not in note]
    for before, after in pairwise(steps):
        assert before - after <= SAVE_STEPS or after == before + 1


def test_signals_stop_at_a_step_boundary_with_a_checkpoint_and_say_so(runs):
    lives = runs["stopped"]["lives"]
    assert [life["code"] for life in lives] == [143, 143, 138, 0]
    assert [life["saved"][-1] for life in lives] == [6, 8, 10, SHORT]
    for life, name, step in zip(lives, ("SIGTERM", "SIGTERM", "SIGUSR1"), (6, 8, 10)):
        assert f"{name}: saving and stopping after step {step}" in life["said"]
    assert all("going on from" in life["said"] for life in lives[1:])
    assert "saving and stopping" not in lives[3]["said"]  # it came in the last step: the run is finished


def test_a_stopped_run_goes_on_as_if_it_had_not_been(runs, root):
    assert runs["short"]["code"] == 0
    assert_same(runs, root, "stopped", "short")


def test_a_stopped_run_leaves_no_trained_model_that_could_be_taken_for_the_result(root, runs):
    assert (root / "stopped" / "run" / "model.safetensors").exists()  # only the life that finished wrote it
    assert not (root / "small disk" / "run" / "model.safetensors").exists()


def test_a_checkpoint_that_cannot_be_written_is_one_error_and_the_last_one_survives(runs, root):
    failed, resumed = runs["starved"]["lives"]
    assert failed["code"] == 2
    line = error_of(failed)
    assert re.match(
        r"error: disk full: \S+ cannot hold the checkpoint of step 6 \(.+; .+ GB free\);"
        r" checkpoint-4 is whole: free some space, then --resume auto$",
        line,
    )
    assert failed["saved"] == [2, 4]
    assert failed["left"] == []  # the half-written one is gone: it would only fill the disk
    assert resumed["code"] == 0
    assert_same(runs, root, "starved", "short")


def test_a_disk_too_small_for_the_next_checkpoint_is_refused_before_writing(runs):
    if runs["small disk"]["code"] is None:
        pytest.skip("mounting a small tmpfs is not permitted here")
    (failed,) = runs["small disk"]["lives"]
    assert failed["code"] == 2
    assert "cannot hold the checkpoint of step 4 (it needs about 0.00" in error_of(failed)
    assert failed["saved"] == [2]


def test_a_nan_stops_the_run_and_names_its_samples(runs, root):
    stopped = runs["poisoned"]["lives"][0]
    assert stopped["code"] == 2
    line = error_of(stopped)
    file = Path(re.search(r"step 5: the loss is nan; its samples are \S+ (\S+\.json)$", line)[1])
    report = json.loads(file.read_text())
    assert report["step"] == 5
    assert sorted(report["samples"]) == [
        f"lab:{task}:5:{i}" for task in ("generation", "understanding") for i in (0, 1)
    ]
    assert stopped["saved"] == [2, 4]  # and the poisoned weights were not saved


def test_a_used_folder_and_other_data_are_refused(runs):
    _, again, other, _ = runs["poisoned"]["lives"]
    assert again["code"] == other["code"] == 2
    assert re.match(
        r"error: output_dir \S+ holds checkpoint-4 of an earlier run: go on with --resume auto",
        error_of(again),
    )
    assert "per_device_train_batch_size was 4, now it is 6" in error_of(other)


def test_a_flipped_bit_is_named_and_the_run_goes_on_from_the_checkpoint_before(runs, root):
    last = runs["poisoned"]["lives"][-1]
    assert last["code"] == 0
    assert re.search(
        r"checkpoint-4 is broken: optimizer.pt has other bytes .*; using checkpoint-2 instead", last["said"]
    )
    assert_same(runs, root, "poisoned", "short")
