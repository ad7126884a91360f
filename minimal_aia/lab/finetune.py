"""The bare training loop of the lab: next-token loss + λ · AIA on both tasks, in one readable function.

`minimal_aia.train.trainer` does the same for any model, with everything that a long run needs; a test holds
the two together, step by step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import get_scheduler

from minimal_aia.capture import capture
from minimal_aia.lab import models
from minimal_aia.lab.references import lab_targets
from minimal_aia.lab.sequences import Sequences, draw_batch
from minimal_aia.lab.spans import spans
from minimal_aia.lab.train import data_rng
from minimal_aia.loss import AIALoss
from minimal_aia.targets import StageTargets
from minimal_aia.train.config import TrainConfig, task_counts, weight_at

FIRST_STEP = 1_000_000  # fine-tuning data start here: pretraining never comes this far
PROBE_EVERY = 10


def step_batches(config: TrainConfig, step: int, codebook: np.ndarray) -> dict[str, Sequences]:
    """The fresh scenes of a step, by task: they depend on (seed, task, step) and the counts alone."""
    return {
        task: draw_batch(task, count, data_rng(config.seed, task, FIRST_STEP + step), codebook)
        for task, count in task_counts(config, step).items()
    }


def layers_of(config: TrainConfig) -> list[int] | None:
    """`aia_layers` as 0-based indices; None for all."""
    if config.aia_layers == "all":
        return None
    layers: set[int] = set()
    for part in config.aia_layers.split(","):
        first, _, last = part.partition("-")
        layers.update(range(int(first), int(last or first) + 1))
    return sorted(layers)


def losses(
    model: Any, batch: Sequences, task: str, config: TrainConfig, targets: StageTargets, weight: float
) -> tuple[Tensor, Tensor | None]:
    """Next-token loss of one task's batch and, where `weight` asks for it, its AIA loss."""
    if not weight:
        return models.next_token_loss(model, batch, task), None
    query, key = spans(batch, task, config.spans)
    layers = layers_of(config)
    with capture(model, query, key, layers=layers) as record:
        ntp = models.next_token_loss(model, batch, task)
    target, delta = targets.tensors(task)
    chosen = slice(None) if layers is None else layers
    from minimal_aia.loss import aia_loss

    aia = aia_loss(
        record.intensity, target[chosen], delta[chosen], config.aia_kind, config.aia_reduction  # type: ignore[arg-type]
    )
    return ntp, aia
