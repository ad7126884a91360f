"""`minimal-aia train`, from a recipe to a folder that everything reads: lab, Janus and Emu3 models."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from real_models import DATA, LAYERS, TARGETS, checkpoint

from minimal_aia import cli
from minimal_aia.lab import models
from minimal_aia.models import load_adapter
from minimal_aia.train import sft
from minimal_aia.train.config import TASKS, TrainConfig
from minimal_aia.train.recipe import read_recipe

ROOT = Path(__file__).parents[2]
FAST = ["--use-cpu", "true", "--report-to", "none", "--save-steps", "0"]


@pytest.fixture
def real(tmp_path):
    """A recipe for a tiny real model on the repository's own samples."""

    def write(family: str, **options) -> Path:
        TARGETS.save(tmp_path / "targets.yaml")
        recipe = {
            "model": str(checkpoint(family)),
            "output_dir": str(tmp_path / "out"),
            **{f"{task}_data": str(DATA / f"{task}.jsonl") for task in TASKS},
            "targets": str(tmp_path / "targets.yaml"),
            "per_device_train_batch_size": 4,
            "max_steps": 3,
            "warmup_steps": 0,
            "learning_rate": 0.01,
            "prompt_dropout": 0.1,
            "logging_steps": 1,
            "curve_steps": 0,
            **options,
        }
        path = tmp_path / f"{family}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    return write


def test_the_lab_recipe_makes_a_model_that_everything_reads(tmp_path, capsys):
    out = tmp_path / "run"
    line = ["train", str(ROOT / "recipes/lab.yaml"), "--output-dir", str(out), "--max_steps", "4"]
    assert cli.main([*line, "--curve-steps", "2", "--logging-steps", "2", *FAST]) == 0
    shown = capsys.readouterr().out
    assert f"wrote {out}" in shown
    assert "generation: mean |I − T|" in shown
    adapter = load_adapter(out, device="cpu")
    start = load_adapter("lab/unified", device="cpu")
    moved = [
        (a - b).abs().max() for a, b in zip(adapter.model.parameters(), start.model.parameters(), strict=True)
    ]
    assert max(moved) > 1e-4
    assert torch.equal(
        adapter.model.lm_head.weight, adapter.model.get_input_embeddings().weight
    )  # still tied
    assert models.draw(adapter.model, ["a red square"]).shape == (1, 36)
    config = read_recipe(out / "recipe.yaml")
    assert config == read_recipe(ROOT / "recipes/lab.yaml", asdict(config))
    assert config.max_steps == 4
    card = (out / "README.md").read_text()
    for part in ("| generation | lab | 32 |", "| understanding | lab | 32 |", "step 0", "step 4", "torch"):
        assert part in card, part
    assert re.search(r"^\| 7 +\| +0\.\d{3} +\|", card, re.MULTILINE)  # the curves' last layer
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])["max_steps"] == 4


@pytest.mark.parametrize("family", ["janus", "emu3"])
def test_real_models_train_both_tasks_on_real_samples(real, tmp_path, family, capsys):
    recipe = real(family, aia_weight=40)
    assert cli.main(["train", str(recipe), *FAST]) == 0
    out = tmp_path / "out"
    trained, start = load_adapter(out, device="cpu"), load_adapter(checkpoint(family), device="cpu")
    assert trained.family == family
    changed = {
        name
        for (name, a), (_, b) in zip(
            trained.model.named_parameters(), start.model.named_parameters(), strict=True
        )
        if not torch.equal(a, b)
    }
    frozen = {
        name for name, _ in start.model.named_parameters() if "vqmodel" in name or "vision_model" in name
    }
    assert not changed & frozen
    assert changed | frozen == {name for name, _ in start.model.named_parameters()}
    assert "samples" in (out / "README.md").read_text()
    # the Trainer switches the cache off in what it trains: not in what it leaves behind
    switches = [
        re.findall(r'"use_cache": \w+', (f / "config.json").read_text()) for f in (out, checkpoint(family))
    ]
    assert switches[0] == switches[1]


def test_lora_is_merged_into_an_ordinary_folder(real, tmp_path):
    pytest.importorskip("peft")
    recipe = real("janus", lora_rank=2, freeze="vision,aligner,generation", dtype="bfloat16", bf16=True)
    assert cli.main(["train", str(recipe), *FAST]) == 0
    trained = load_adapter(tmp_path / "out", device="cpu")
    start = load_adapter(checkpoint("janus"), device="cpu", dtype=torch.bfloat16)
    assert trained.dtype == torch.bfloat16
    changed = {
        name
        for (name, a), (_, b) in zip(
            trained.model.named_parameters(), start.model.named_parameters(), strict=True
        )
        if not torch.equal(a, b)
    }
    assert changed
    assert all(f"language_model.layers.{n}." in " ".join(changed) for n in range(LAYERS))
    assert all("language_model.layers" in name for name in changed)


@pytest.mark.parametrize("family", ["janus", "emu3"])
def test_a_dry_run_shows_the_spans_and_loads_no_weights(real, family, capsys, monkeypatch):
    import transformers

    def refuse(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
    assert cli.main(["train", str(real(family)), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"{family}, {LAYERS} layers" in shown
    assert "first of 3 micro-batches" in shown
    assert "generation: 2 samples" in shown
    assert "understanding: 2 samples" in shown
    first = next(line for line in shown.splitlines() if line.strip().startswith("understanding.jsonl:"))
    number = int(first.split(":")[1])
    answer = json.loads((DATA / "understanding.jsonl").read_text().splitlines()[number - 1])["conversations"][
        1
    ]
    queries = shown[shown.index(first) :].split("queries", 1)[1].splitlines()[0]
    assert answer["value"].split()[0] in queries
    assert "image tokens]" in shown


def test_the_lab_dry_run(capsys):
    assert cli.main(["train", str(ROOT / "recipes/lab.yaml"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "queries     36  [36 image tokens]" in shown
    assert "<eos>" in shown


@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        ({}, {"num_processes": 2}, "2 processes were asked for, 1 came up"),
        ({"WORLD_SIZE": "2"}, {"num_processes": 4}, "4 processes were asked for, 2 came up"),
        # what `accelerate launch --cpu --num_processes 2` leaves: one process, no rank
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, {}, "several processes"),
    ],
)
def test_too_few_processes_are_refused(monkeypatch, environment, options, message):
    for name in ("WORLD_SIZE", "RANK", "ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        sft.build(TrainConfig(**options))


def test_faults_are_said_before_training(real, tmp_path, capsys):
    faults = [
        ("janus", {"targets": "janus-pro"}, 'write "janus-pro:rescaled"'),
        ("janus", {"targets": "lab"}, "are for 8 layers, the model has 3"),
        ("janus", {"model": str(tmp_path / "none")}, "no such folder"),
        ("emu3", {"generation_data": str(tmp_path / "none.jsonl")}, "none.jsonl"),
        ("janus", {"aia_layers": "0-7"}, "layers are 0 to 2"),
        ("emu3", {"spans": "code"}, "knows paper, predicting"),
        ("janus", {"generation_data": "lab", "understanding_data": "lab"}, "lab scenes are for lab models"),
        ("janus", {"freeze": "everything"}, "'everything'"),
        ("janus", {"lora_rank": 2, "lora_target_modules": "c_attn"}, "choose all-linear or some of"),
    ]
    for family, options, message in faults:
        recipe = real(family, **options)
        assert cli.main(["train", str(recipe), *FAST]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("minimal-aia train: error: ")
        assert message in error, error
        assert "bug?" not in error


def test_a_lab_model_of_one_task_cannot_train_two(capsys):
    line = ["train", str(ROOT / "recipes/lab.yaml"), "--model", "lab/generation", *FAST]
    assert cli.main(line) == 2
    assert "does not do understanding" in capsys.readouterr().err
