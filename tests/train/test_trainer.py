"""The Trainer against the bare loop, against plain fine-tuning, and against one large batch."""

from __future__ import annotations

import json
import math
import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from real_models import module
from transformers import TrainerCallback

from minimal_aia.lab import models
from minimal_aia.lab.finetune import finetune, step_batches
from minimal_aia.models import load_adapter
from minimal_aia.models.base import Batch
from minimal_aia.models.lab import load_lab
from minimal_aia.train import sft
from minimal_aia.train.callbacks import read_curves
from minimal_aia.train.config import TASKS, TrainConfig
from minimal_aia.train.module import SFTModule, resolve_targets
from minimal_aia.train.trainer import AIATrainer, NonFiniteLoss

SMALL: dict[str, Any] = {
    "model": "lab/unified",
    "per_device_train_batch_size": 4,
    "max_steps": 6,
    "warmup_steps": 2,
    "logging_steps": 1,
    "curve_steps": 0,
    "save_steps": 0,
    "report_to": "none",
    "use_cpu": True,
}


def config(folder, **options) -> TrainConfig:
    return TrainConfig(**{**SMALL, "output_dir": str(folder), **options})


def entries(trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("model", ["lab/unified", "lab/janus"])
def test_it_gives_the_bare_loops_numbers(tmp_path, model):
    # Without weight decay both sides could differ in what is decayed and nobody would see it.
    mine = config(tmp_path, model=model, weight_decay=0.5, aia_schedule="warmup", aia_every=2)
    trainer = sft.run(mine)
    bare, _, log = finetune(mine, progress=False)
    for name in ("ntp", "aia"):
        for task in TASKS:
            want = [row[f"{name}/{task}"] for row in log if f"{name}/{task}" in row]
            assert len(want) == (6 if name == "ntp" else 2)  # λ is 0 in steps 0, 1, 3, 5
            assert entries(trainer, f"{name}/{task}") == pytest.approx(want, rel=1e-4, abs=1e-7)
    start = load_adapter(model, device="cpu").model.state_dict()
    moved = 0.0
    for name, value in trainer.module.model.state_dict().items():
        torch.testing.assert_close(value, bare.state_dict()[name], rtol=1e-5, atol=1e-5)
        moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 1e-3  # or 1e-5 would say nothing


class PlainLoss(torch.nn.Module):
    """What fine-tuning is to someone who never heard of AIA."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, batches) -> torch.Tensor:
        return sum(0.5 * models.next_token_loss(self.model, batch, task) for task, batch in batches.items())


def test_without_aia_it_is_plain_fine_tuning_bit_for_bit(tmp_path):
    mine = config(tmp_path, aia_weight=0.0, curve_steps=2)  # measuring curves must not disturb it either
    trainer = sft.run(mine)
    adapter = load_lab(mine.model)
    plain = PlainLoss(adapter.model.train())
    optimizer = torch.optim.AdamW(
        plain.parameters(), lr=mine.learning_rate, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.05
    )
    rates = [0.0, 0.5, *(0.5 * (1 + math.cos(math.pi * n / 4)) for n in range(4))]
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = mine.learning_rate * rate
        plain(step_batches(mine, step, adapter.codebook)).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert entries(trainer, "aia/generation") == []
    for name, value in adapter.model.state_dict().items():
        assert torch.equal(trainer.module.model.state_dict()[name], value), name


def test_accumulated_steps_equal_one_large_batch(tmp_path):
    """Micro-batches of 3 hold one or two samples a task, of unlike lengths: a mean of means would differ."""
    mine = config(tmp_path / "cut", per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=3)
    trainer = sft.run(mine)
    dataset = trainer.train_dataset
    whole = {step: joined([dataset[2 * step], dataset[2 * step + 1]]) for step in range(3)}
    large = config(tmp_path / "large", per_device_train_batch_size=6, max_steps=3)
    adapter = load_lab(large.model)
    other = AIATrainer(SFTModule(adapter, large, resolve_targets(large, 8)), large, whole)
    other.train()
    for key in (
        "loss",
        "grad_norm",
        "ntp/generation",
        "ntp/understanding",
        "aia/understanding",
        "distance/generation",
    ):
        assert entries(trainer, key) == pytest.approx(entries(other, key), rel=1e-5), key
    for name, value in trainer.module.state_dict().items():
        torch.testing.assert_close(value, other.module.state_dict()[name], rtol=1e-5, atol=1e-6)
    assert trainer.seen() == other.seen()
    assert sum(seen["samples"] for seen in trainer.seen().values()) == 18


def joined(parts: list[dict[str, Batch]]) -> dict[str, Batch]:
    """Micro-batches as one batch a task."""
    result = {}
    for task in TASKS:
        mine = [part[task] for part in parts if task in part]
        width = max(batch.query_mask.shape[1] for batch in mine)

        def cat(tensors, width=width):
            if tensors[0].ndim == 2:
                tensors = [F.pad(t, (0, width - t.shape[1])) for t in tensors]
            return torch.cat(tensors)

        masks = {n: cat([getattr(b, n) for b in mine]) for n in ("query_mask", "key_mask", "attention_mask")}
        inputs = {name: cat([batch.inputs[name] for batch in mine]) for name in mine[0].inputs}
        result[task] = Batch(inputs, ids=[i for batch in mine for i in batch.ids], task=task, **masks)
    return result


# ---- faults --------------------------------------------------------------------------------------------


class Spoil(TrainerCallback):
    """Makes one weight infinite before a step."""

    def __init__(self, weight, step: int) -> None:
        self.weight, self.step = weight, step

    def on_step_begin(self, args, state, control, **_) -> None:
        if state.global_step == self.step:
            self.weight.data.fill_(float("inf"))


def test_a_nan_loss_stops_the_run_and_names_its_samples(tmp_path):
    trainer = sft.build(config(tmp_path))
    trainer.add_callback(Spoil(trainer.module.model.model.norm.weight, 2))
    with pytest.raises(NonFiniteLoss, match=r"step 2: the loss is nan; its samples are in .*step2"):
        trainer.train()
    (file,) = tmp_path.glob("nonfinite-*.json")
    report = json.loads(file.read_text())
    want = [i for batch in trainer.train_dataset[2].values() for i in batch.ids]
    assert report["samples"] == want
    assert len(want) == 4
    assert trainer.state.global_step == 2


# ---- what is left behind -------------------------------------------------------------------------------


def test_curves_are_measured_on_the_same_samples_and_written(tmp_path):
    pytest.importorskip("tensorboard")
    trainer = sft.run(
        config(tmp_path, max_steps=4, curve_steps=3, report_to="tensorboard", learning_rate=3e-3)
    )
    curves = read_curves(tmp_path)
    assert [(entry["step"], entry["task"]) for entry in curves] == [(s, t) for s in (0, 3, 4) for t in TASKS]
    now = trainer.measure_curves()
    for entry in curves[-2:]:
        assert entry["curve"] == pytest.approx(now[entry["task"]]["curve"])
        assert len(entry["curve"]) == 8
    start = load_lab("lab/unified")
    first = SFTModule(start, trainer.config, trainer.module.targets)
    batches = [trainer.train_dataset[n] for n in range(8)]  # 16 samples a task
    means = torch.stack([first.measure(b["generation"])["curve"] for b in batches]).mean(0)
    assert curves[0]["curve"] == pytest.approx(means.tolist(), abs=1e-6)
    assert curves[-2]["distance"] < curves[0]["distance"]
    (events,) = (tmp_path / "runs").rglob("events*")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(events.parent)).Reload()
    scalars = set(found.Tags()["scalars"])
    assert {"train/ntp/generation", "train/aia/understanding", "train/curve_generation/layer_07"} <= scalars
    assert [e.step for e in found.Scalars("train/probe_distance/generation")] == [0, 3, 4]


def test_a_resumed_run_rewrites_the_curves_behind_its_checkpoint(tmp_path):
    mine = config(tmp_path, max_steps=4, curve_steps=1, save_steps=2)
    seen = sft.run(mine).seen()
    whole = read_curves(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = sft.run(config(tmp_path, max_steps=4, curve_steps=1, save_steps=2, resume="auto"))
    assert resumed.seen() == seen  # what the card says of the whole run, not of its last part
    assert seen["generation"]["samples"] == 8
    again = read_curves(tmp_path)
    assert [(e["step"], e["task"]) for e in again] == [(e["step"], e["task"]) for e in whole]
    for one, two in zip(whole, again, strict=True):
        assert one["curve"] == pytest.approx(two["curve"], abs=1e-6)


def test_another_models_checkpoint_is_refused(tmp_path):
    for family in ("janus", "emu3"):
        made, other = module(family), module(family)
        made.save(tmp_path / family)
        with torch.no_grad():
            for p in other.parameters():
                p.add_(1.0)
        other.load(tmp_path / family)
        for name, value in made.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name
    with pytest.raises(ValueError, match="another model's checkpoint"):
        module("emu3").load(tmp_path / "janus")
    with pytest.raises(ValueError, match="another model's checkpoint"):
        module("emu3").load(tmp_path / "nothing")
