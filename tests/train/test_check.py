"""`minimal-aia check-data` and `minimal-aia prepare` from the command line, on data with known faults."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from data_fakes import entries, padding, write_lines, write_pictures
from real_models import checkpoint

from minimal_aia import cli
from minimal_aia.models import load_adapter
from minimal_aia.train.check import check_data, histogram, kind
from minimal_aia.train.config import TrainConfig
from minimal_aia.train.data import open_data

TASKS = ("generation", "understanding")


@pytest.fixture
def model() -> Path:
    return checkpoint("janus")


@pytest.fixture
def recipe(model, tmp_path) -> Path:
    """A recipe with twelve generation samples, five of them bad, and eight good ones for understanding."""
    pictures = write_pictures(tmp_path)
    rows = entries("generation", 12, pictures)
    rows[1]["image"] = "images/none.png"
    (tmp_path / "images" / "cut.png").write_bytes((tmp_path / pictures[0]).read_bytes()[:200])
    rows[3]["image"] = "images/cut.png"
    rows[4]["conversations"][0]["value"] = "a <begin_of_image> spelled out"
    rows[6]["conversations"][0]["value"] = "word " * 600
    rows[9] = rows[8]
    path = write_lines(tmp_path / "generation.jsonl", rows)
    path.write_text(path.read_text() + "{no json\n")
    write_lines(tmp_path / "understanding.jsonl", entries("understanding", 8, pictures))
    lines = [f"model: {model}", "max_length: 400", "per_device_train_batch_size: 4", "max_steps: 20"]
    lines += [f"{task}_data: {tmp_path / f'{task}.jsonl'}" for task in TASKS]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines) + "\n")
    return tmp_path / "recipe.yaml"


def test_check_data_reports_all_that_is_bad_and_ends_with_1(recipe, capsys, tmp_path):
    out = tmp_path / "bad.csv"
    assert cli.main(["check-data", str(recipe), "--out", str(out), "--show", "4"]) == 1
    text = capsys.readouterr().out
    table = pd.read_csv(out)
    assert dict(zip(table["id"], table["kind"])) == {
        "generation.jsonl:2": "missing image",
        "generation.jsonl:4": "damaged image",
        "generation.jsonl:5": "special token in a text",
        "generation.jsonl:7": "too long",
        "generation.jsonl:13": "malformed line",
    }
    assert "generation.jsonl:2: image 'images/none.png' does not exist" in text
    assert "... and 1 more" in text
    counts = [line.split()[:4] for line in text.splitlines()]  # samples, bad, duplicates
    assert ["generation", "13", "5", "1"] in counts
    assert ["understanding", "8", "0", "0"] in counts


def test_good_data_end_with_0_and_the_lengths_are_those_of_training(recipe, capsys, model):
    assert cli.main(["check-data", str(recipe), "--task-ratio", "0:1"]) == 0
    assert "bad samples" not in capsys.readouterr().out
    c = TrainConfig(model=str(model), understanding_data=str(recipe.parent / "understanding.jsonl"),
                    task_ratio="0:1", per_device_train_batch_size=4, max_steps=40)  # fmt: skip
    data = open_data(c)
    report = check_data(data, progress=False)
    batches = [data[number] for number in range(len(data))]
    lengths = {}
    for batch in batches:
        b = batch["understanding"]
        lengths |= dict(zip(b.ids, b.attention_mask.sum(1).tolist()))
    table = report.rows["understanding"]
    assert dict(zip(table["id"], table["length"])) == lengths
    real, total = np.sum([padding(batch) for batch in batches], axis=0)
    assert report.padding.loc["understanding", 0] == pytest.approx(1 - real / total)
    assert report.padding.loc["understanding", 16] < 0.6 * report.padding.loc["understanding", 0]


def test_what_is_reported_is_what_a_run_passes_over(recipe):
    from minimal_aia.train.recipe import read_recipe

    data = open_data(read_recipe(recipe, {"max_steps": 6, "task_ratio": "1:0"}))
    bad = set(check_data(data, progress=False).bad()["id"])
    used = {i for number in range(6) for i in data[number]["generation"].ids}
    assert used == {f"generation.jsonl:{line}" for line in range(1, 14)} - bad
    assert data.skipped > 0


def test_workers_find_the_same_and_quick_finds_all_but_what_decoding_finds(recipe):
    from minimal_aia.train.recipe import read_recipe

    data = open_data(read_recipe(recipe))
    whole = check_data(data, progress=False)
    shared = check_data(data, workers=2, progress=False)
    for task in TASKS:
        pd.testing.assert_frame_equal(whole.rows[task], shared.rows[task])
    quick = check_data(data, quick=True, progress=False)
    assert set(whole.bad()["id"]) - set(quick.bad()["id"]) == {"generation.jsonl:4"}
    assert not quick.exact
    first = check_data(data, limit=3, progress=False)
    assert [len(table) for table in first.rows.values()] == [3, 3]
    assert "only the first samples were looked at" in first.text()


def test_a_histogram_counts_every_length_once():
    lines = histogram([1, 1, 2, 10, 10, 10, 10])
    assert sum(int(line.split()[3]) for line in lines) == 7
    assert max(lines, key=len).split()[:4] == ["10", "to", "10", "4"]
    assert len(histogram([5, 5])) == 1
    assert histogram([]) == ["  (no good sample)"]


@pytest.mark.parametrize(
    ("reason", "named"),
    [
        ("9 tokens, more than max_length 8", "too long"),
        ("image 'a' has 60000000 pixels, more than 50000000", "too many pixels"),
        ("image '../a' leaves the folder of the file", "image outside the folder"),
        ("no answer text, so there would be no query token", "other"),
    ],
)
def test_reasons_have_kinds(reason, named):
    assert kind(reason) == named


def test_nothing_to_check_and_a_bad_out_are_errors(tmp_path, recipe, capsys):
    (tmp_path / "lab.yaml").write_text("max_steps: 3\n")
    assert cli.main(["check-data", str(tmp_path / "lab.yaml")]) == 2
    assert "endless scenes of the lab; there is nothing to do" in capsys.readouterr().err
    assert cli.main(["check-data", str(recipe), "--out", "x.txt"]) == 2
    assert "--out x.txt: expected a .csv file" in capsys.readouterr().err


def test_prepare_then_train_from_the_codes(recipe, tmp_path, capsys, model):
    out = tmp_path / "codes"
    command = ["prepare", str(recipe), str(out), "--device", "cpu", "--shard-size", "5"]
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    # The sample that is too long has codes all the same: how long it is depends on the rest of the recipe.
    assert "generation: 13 samples, 9 pictures, 144 codes, 3 files" in text
    assert "4 samples left out" in text
    assert f"set `codes: {out}` in the recipe" in text
    index = json.loads((out / "index.json").read_text())
    assert list(index["tasks"]) == ["generation"]
    assert cli.main(command) == 0  # nothing left to do
    adapter = load_adapter(model, device="cpu", dtype=torch.float32)
    adapter.set_pictures("crop")
    from minimal_aia.train.recipe import read_recipe

    data = open_data(read_recipe(recipe, {"codes": str(out)}))
    data.codes.check_model(adapter)
    for number in range(3):
        samples = open_data(read_recipe(recipe)).samples(number)["generation"]
        coded = data[number]["generation"]
        kept = [row for row, s in enumerate(samples) if s.id == coded.ids[row]]
        pixels = adapter.pixels([samples[row] for row in kept])
        assert torch.equal(coded.inputs["codes"][kept], adapter.image_codes(pixels))
    assert cli.main(["check-data", str(recipe), "--codes", str(out)]) == 1
    assert "no target image to teacher-force" in capsys.readouterr().out


def test_prepare_says_what_a_lab_model_lacks(recipe, capsys, tmp_path):
    assert cli.main(["prepare", str(recipe), str(tmp_path / "c"), "--model", "lab/unified"]) == 2
    assert "the lab family reads no image codes for these tasks" in capsys.readouterr().err
