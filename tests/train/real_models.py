"""Tiny Janus and Emu3 checkpoints and real samples for the tests of this folder."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from checkpoints import MAKERS
from torch import Tensor

from minimal_aia.data import Sample, read_samples
from minimal_aia.models import load_adapter
from minimal_aia.targets import StageTargets
from minimal_aia.train.config import TrainConfig
from minimal_aia.train.module import SFTModule

DATA = Path(__file__).parents[2] / "data_samples"
LAYERS = 3
TARGETS = StageTargets.constant(LAYERS, generation=0.4, understanding=0.2)


@cache
def checkpoint(family: str) -> Path:
    """The folder of a tiny model, written at the first call."""
    return MAKERS[family](Path(mkdtemp(prefix=family)) / "tiny")


@cache
def samples(task: str) -> list[Sample]:
    """Three of the repository's samples; the understanding ones include a conversation of two turns."""
    read = read_samples(DATA / f"{task}.jsonl", decode_images=False)
    longest = sorted(read, key=lambda sample: -len(sample.turns))
    return [longest[0], read[0], read[40]]


def module(family: str, targets: StageTargets | None = TARGETS, **options: Any) -> SFTModule:
    """A fresh SFTModule around the tiny model, in training mode; Emu3's dropout would blur comparisons."""
    options = {"attention_dropout": 0.0, **options}
    adapter = load_adapter(checkpoint(family), device="cpu")
    adapter.ends_turns = True
    config = TrainConfig(model=str(checkpoint(family)), targets="none" if targets is None else "", **options)
    return SFTModule(adapter, config, targets).train()


def gradients(module: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """By name, of every weight that has one; left at zero afterwards."""
    module.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found
