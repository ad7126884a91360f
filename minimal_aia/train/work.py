"""Floating-point operations of an optimizer step; `train.plan` says on which assumptions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from minimal_aia.train.activations import INDICATOR_COLUMNS, Rows
from minimal_aia.train.config import TrainConfig
from minimal_aia.train.label_loss import LOGITS_AT_ONCE
from minimal_aia.train.parts import lora_targets
from minimal_aia.train.shapes import Shape, Weights, count

FORWARD, BACKWARD, BACKWARD_ATTENTION = 1, 2, 2.5


@dataclass(frozen=True)
class Work:
    """Of one GPU in one micro-batch. model: operations without recomputation and without AIA."""

    executed: float = 0.0
    model: float = 0.0
    tokens: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.executed + other.executed, self.model + other.model, self.tokens + other.tokens)

    def __mul__(self, times: float) -> Work:
        return Work(self.executed * times, self.model * times, self.tokens * times)


def work_of(shape: Shape, config: TrainConfig, weights: Weights, batch: Mapping[str, Rows]) -> Work:
    """Operations and tokens of a micro-batch."""
    return sum((_task(shape, config, weights, rows, task) for task, rows in batch.items()), Work())


def _task(shape: Shape, config: TrainConfig, weights: Weights, rows: Rows, task: str) -> Work:
    matrices = [m.weight for m in lora_targets(shape.decoder_layers[0], "all-linear").values()]
    linear = 2 * rows.tokens * shape.layers * count(matrices)
    # causal: a token meets half of the sequence on average; scores and weighted sum, two operations each
    attention = 2 * rows.tokens * shape.layers * shape.heads * shape.head_dim * rows.length
    lora = 2 * rows.tokens * weights.lora
    # Weights that do not learn pass gradients on, but need none of their own.
    learns = weights.trained_layers > 0
    model: float = linear * (FORWARD + (BACKWARD if learns else 1)) + attention * (
        FORWARD + BACKWARD_ATTENTION
    )
    model += lora * (FORWARD + BACKWARD)
    vocab = shape.code_vocab if task == "generation" else shape.vocab
    head = 2 * rows.count * rows.labels * vocab * shape.hidden
    head += (
        2 * rows.count * rows.labels * shape.hidden**2 * (shape.family == "janus" and task == "generation")
    )
    model += head * (FORWARD + BACKWARD)
    encoder = rows.count * _encoder(shape, config, task)
    model += encoder
    executed = model
    if config.weights()[task]:
        wider = 1 if shape.attention_dropout else INDICATOR_COLUMNS / shape.head_dim  # 1: a second call
        executed += attention * wider * (FORWARD + BACKWARD_ATTENTION + config.gradient_checkpointing)
    if config.gradient_checkpointing:  # up to the last map of a layer, whose output nobody needs again
        last = 2 * rows.tokens * shape.layers * shape.hidden * shape.feed_forward
        executed += linear - last + attention + lora
    if not config.use_liger and rows.count * rows.labels * vocab > LOGITS_AT_ONCE:
        executed += head  # made in pieces, each again in backward
    return Work(executed, model, rows.tokens)


def _encoder(shape: Shape, config: TrainConfig, task: str) -> float:
    """Of the frozen encoder, a picture."""
    if shape.family == "janus" and task == "understanding":
        return 2 * shape.image_tokens * count(shape.part("vision_model").parameters())
    if not shape.makes_codes(config, task):
        return 0
    frames = shape.model.config.vq_config.temporal_downsample_factor if shape.family == "emu3" else 0
    return _counted(shape.part("vqmodel"), shape.image_size, frames)


@lru_cache(maxsize=4)
def _counted(vq: Any, size: int, frames: int) -> int:
    """Operations of a VQ encoder, counted by PyTorch on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    picture = torch.empty(1, *([frames] if frames else []), 3, size, size, device="meta")
    training = vq.training
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vq.eval().encoder(picture)
    vq.train(training)
    return int(counter.get_total_flops())
