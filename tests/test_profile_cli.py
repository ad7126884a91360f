"""`minimal-aia profile` from its arguments to its files, with a tiny model in the place of a loaded one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
from PIL import Image

matplotlib.use("Agg")

sys.path.insert(0, str(Path(__file__).parent))
from profile_fakes import FakeAdapter

import minimal_aia
from minimal_aia.cli import main
from minimal_aia.profiles import IntensityProfile, profile


@pytest.fixture
def loaded(monkeypatch):
    """`load_adapter` replaced by the tiny model; what it was called with, and the adapters it returned."""
    calls = []

    def load_adapter(name, **options):
        calls.append((name, options, FakeAdapter()))
        return calls[-1][2]

    monkeypatch.setitem(vars(minimal_aia), "load_adapter", load_adapter)
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    return calls


def write(path: Path, entries: list[dict]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def turn(human: str, gpt: str) -> list[dict]:
    return [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]


@pytest.fixture
def samples(tmp_path):
    prompts = [
        "a red circle",
        "a blue square left of a star",
        "an unknown thing",
        "two green stars",
        "one circle",
    ]
    kinds = ["short", "dense", "short", "dense", "short"]
    return write(
        tmp_path / "generation.jsonl",
        [{"conversations": turn(p, "<image>"), "type": k} for p, k in zip(prompts, kinds, strict=True)],
    )


def arguments(samples: Path, *more: str, task: str = "generation") -> list[str]:
    return ["profile", "--model", "lab/unified", "--task", task, "--samples", str(samples), *more]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_writes_the_table_and_the_plot_and_says_what_it_found(suffix, samples, loaded, tmp_path, capsys):
    out, plot = tmp_path / f"p.{suffix}", tmp_path / "curve.png"
    assert main(arguments(samples, "--out", str(out), "--plot", str(plot), "--batch-size", "2")) == 0
    said = capsys.readouterr().out
    written = IntensityProfile.load(out)
    expected = profile(FakeAdapter(), minimal_aia.read_samples(samples), "generation", 2, progress=False)
    pd.testing.assert_frame_equal(written.table, expected.table, check_exact=True)
    assert loaded[0][2].n_forward == 2
    with Image.open(plot) as image:
        assert image.format == "PNG"
    assert f"wrote {out}" in said
    assert f"wrote {plot}" in said
    assert "1 samples left out:\n  generation.jsonl:3: a word the model does not know" in said
    assert f"{expected.matrix.to_numpy().mean():.3f}" in said
    assert "dense" in said  # the table by type


def test_without_out_the_curve_is_printed(samples, loaded, tmp_path, capsys):
    assert main(arguments(samples)) == 0
    said = capsys.readouterr().out
    curve = profile(FakeAdapter(), minimal_aia.read_samples(samples), "generation", progress=False).curve()
    for mean in curve["mean"]:
        assert f"{mean:.3f}" in said
    assert [p.name for p in tmp_path.iterdir()] == ["generation.jsonl"]


def test_options_reach_the_loader(samples, loaded):
    options = "--family janus --device cpu --dtype bfloat16 --load-in-4bit --trust-remote-code".split()
    assert main(arguments(samples, *options)) == 0
    assert loaded[0][:2] == (
        "lab/unified",
        {
            "family": "janus",
            "device": "cpu",
            "dtype": "bfloat16",
            "load_in_4bit": True,
            "trust_remote_code": True,
        },
    )
    assert main(arguments(samples, "--draw", "--seed", "3")) == 0
    assert (loaded[1][1]["draw"], loaded[1][1]["seed"]) == (True, 3)
    assert main(arguments(samples)) == 0
    assert "draw" not in loaded[2][1]
    assert loaded[2][1]["trust_remote_code"] is False
    assert loaded[2][1]["load_in_4bit"] is False


def ids(out: Path) -> list[str]:
    return list(dict.fromkeys(IntensityProfile.load(out).table["sample"]))


def test_limit_takes_the_first_or_a_seeded_choice(tmp_path, loaded):
    entries = [{"conversations": turn(f"a star w{i}", "<image>")} for i in range(20)]
    path = write(tmp_path / "g.jsonl", entries)
    found = {}
    for name, more in {
        "first": [],
        "a": ["--seed", "1"],
        "again": ["--seed", "1"],
        "b": ["--seed", "2"],
    }.items():
        out = tmp_path / f"{name}.csv"
        assert main(arguments(path, "--limit", "4", "--out", str(out), *more)) == 0
        found[name] = ids(out)
    assert found["first"] == [f"g.jsonl:{i}" for i in (1, 2, 3, 4)]
    assert found["a"] == found["again"] != found["b"]
    assert len(found["a"]) == 4


def test_an_interrupted_command_goes_on_where_it_stopped(samples, loaded, tmp_path, monkeypatch, capsys):
    out = tmp_path / "p.csv"
    command = arguments(samples, "--out", str(out), "--batch-size", "1")
    monkeypatch.setitem(vars(minimal_aia), "load_adapter", lambda *a, **k: FakeAdapter(stop_after=2))
    assert main(command) == 130
    rest = FakeAdapter()
    monkeypatch.setitem(vars(minimal_aia), "load_adapter", lambda *a, **k: rest)
    assert main(command) == 0
    assert rest.n_forward == 2
    whole = profile(FakeAdapter(), minimal_aia.read_samples(samples), "generation", 1, progress=False)
    pd.testing.assert_frame_equal(IntensityProfile.load(out).table, whole.table, check_exact=True)


def test_skip_bad_counts_unreadable_lines(samples, loaded, capsys):
    samples.write_text(samples.read_text() + "{no json\n")
    assert main(arguments(samples)) == 2
    assert "generation.jsonl:6" in capsys.readouterr().err
    assert not loaded
    assert main(arguments(samples, "--skip-bad")) == 0
    assert "1 lines of" in (said := capsys.readouterr().out)
    assert "generation.jsonl:6" in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--out", "nowhere/p.csv"], "there is no folder nowhere"),
        (["--out", "p.txt"], "written as .csv or .parquet"),
        (["--plot", "p.txt"], "the suffix must be one of .png, .svg, .pdf"),
        (["--plot", "nowhere/p.png"], "there is no folder nowhere"),
        (["--processes", "2"], "2 processes were asked for, 1 came up"),
        (["--model", "no/such/folder"], "no/such/folder: no such folder"),
    ],
)
def test_what_cannot_work_is_one_line_before_a_model_is_loaded(more, said, samples, loaded, capsys):
    assert main(arguments(samples, *more)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("minimal-aia profile: error: ")
    assert said in err
    assert not loaded


def test_samples_of_the_other_task_are_an_error_before_a_model_is_loaded(samples, loaded, capsys):
    assert main(arguments(samples, task="understanding")) == 2
    assert "none of its 5 samples is for understanding" in capsys.readouterr().err
    assert not loaded


def test_a_folder_in_the_place_of_the_file_is_an_error(samples, loaded, tmp_path, capsys):
    (tmp_path / "p.csv").mkdir()
    assert main(arguments(samples, "--out", str(tmp_path / "p.csv"))) == 2
    assert "p.csv: is a folder" in capsys.readouterr().err
    assert not loaded


def test_an_unwritable_folder_is_an_error(samples, loaded, tmp_path, monkeypatch, capsys):
    import os

    # Tests may run as root, who may write anywhere: ask as somebody else would be answered.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert main(arguments(samples, "--out", str(tmp_path / "p.csv"))) == 2
    assert "no permission to write" in capsys.readouterr().err
    assert not loaded


def test_a_task_that_the_family_does_not_do_is_known_from_the_config_alone(samples, loaded, tmp_path, capsys):
    folder = tmp_path / "qwen"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_vl"}))
    assert main(arguments(samples, "--model", str(folder))) == 2
    err = capsys.readouterr().err
    assert "does understanding, not generation" in err
    assert err.count("\n") == 1
    assert not loaded


def test_a_folder_without_weights_is_one_line(samples, monkeypatch, tmp_path, capsys):
    """Through the real loader: the config is there, the weights are not."""
    (tmp_path / "janus").mkdir()
    (tmp_path / "janus" / "config.json").write_text(json.dumps({"model_type": "janus"}))
    assert main(arguments(samples, "--model", str(tmp_path / "janus"), "--device", "cpu")) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "weights" in err


@pytest.mark.parametrize("expected", [None, 2])
def test_accelerates_silent_single_process_is_refused(expected, samples, loaded, monkeypatch, capsys):
    """What `accelerate launch --cpu --num_processes 2` leaves in the environment of its only process."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    more = [] if expected is None else ["--processes", str(expected)]
    assert main(arguments(samples, *more)) == 2
    assert "1 came up; start them with `torchrun" in capsys.readouterr().err
    assert not loaded


def test_help_explains_real_runs(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["profile", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for word in (
        "Janus-Pro-7B",
        "Qwen3-VL-8B",
        "hf download",
        "accelerate launch",
        "bfloat16",
        "--load-in-4bit",
    ):
        assert word in said
    assert max(map(len, said.splitlines())) <= 120
