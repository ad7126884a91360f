"""A trained eye for the Janus-like model, as SigLIP is for Janus: it knows what pictures show, and is frozen.

Every patch learns to say which shape of which color stands in its cell, or that the cell is empty. Without
this the language model has to learn to see from a few answer words: its understanding loss stayed above .4
where models that read discrete codes were at .15.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from minimal_aia.lab import images, models, scenes
from minimal_aia.lab.muon import Muon

CLASSES = ["", *(f"{color} {shape}" for color in scenes.COLORS for shape in scenes.SHAPES)]  # "" is empty


def patch_labels(found: list[scenes.Scene]) -> Tensor:
    """For each of the 36 patches the class of its cell, int64 `[N, 36]`."""
    cells = np.zeros((len(found), 3, 3), dtype=np.int64)
    for number, scene in enumerate(found):
        for t in scene:
            cells[number, t.row, t.col] = CLASSES.index(t.name)
    per_cell = images.GRID // 3
    return torch.from_numpy(cells.repeat(per_cell, 1).repeat(per_cell, 2).reshape(len(found), -1))


def pretrain(
    steps: int = 800, batch: int = 32, seed: int = 0, progress: bool = True
) -> tuple[Any, nn.Linear]:
    """The frozen vision encoder (a `JanusVisionModel`) and the probe that reads classes off its patches."""
    eye: Any = models.build("janus", seed).model.vision_model.train().requires_grad_(True)
    probe = nn.Linear(models.WIDTH, len(CLASSES))
    params = [*eye.named_parameters(), *probe.named_parameters()]
    inner = [p for name, p in params if p.ndim == 2 and ".layers." in name]
    rest = [p for name, p in params if not (p.ndim == 2 and ".layers." in name)]
    optimizers = [Muon(inner, lr=0.01), torch.optim.AdamW(rest, lr=3e-3, weight_decay=0.0)]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, steps) for o in optimizers]
    rng = np.random.default_rng(seed)
    for _ in tqdm(range(steps), desc="vision encoder", disable=not progress):
        found = scenes.draw_scenes(rng, batch)
        logits = probe(eye(_pixels(found)).last_hidden_state)
        nn.functional.cross_entropy(logits.flatten(0, 1), patch_labels(found).flatten()).backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return eye.eval().requires_grad_(False), probe


@torch.no_grad()
def accuracy(eye: Any, probe: nn.Linear, count: int = 500, seed: int = 1) -> float:
    """On held-out scenes: share of patches of non-empty cells that are named right."""
    found = scenes.draw_scenes(np.random.default_rng(seed), count, held_out=True)
    labels = patch_labels(found)
    right = probe(eye(_pixels(found)).last_hidden_state).argmax(-1) == labels
    return float(right[labels != 0].float().mean())


def _pixels(found: list[scenes.Scene]) -> Tensor:
    pictures = torch.from_numpy(np.stack([scenes.render(s) for s in found]))
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1
