"""The bare training loop of the lab: next-token loss + λ · AIA on both tasks, in one readable function.

`minimal_aia.train.trainer` does the same for any model, with everything that a long run needs; a test holds
the two together, step by step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import get_scheduler

from minimal_aia.capture import capture
from minimal_aia.lab import metrics, models
from minimal_aia.lab.references import lab_targets
from minimal_aia.lab.sequences import Sequences, draw_batch
from minimal_aia.lab.spans import spans
from minimal_aia.lab.train import data_rng
from minimal_aia.loss import aia_loss
from minimal_aia.models.lab import load_lab
from minimal_aia.targets import StageTargets
from minimal_aia.train.config import TrainConfig, layer_subset, task_counts, weight_at

FIRST_STEP = 1_000_000  # fine-tuning data start here: pretraining never comes this far
PROBE_EVERY, PROBE_SIZE = 20, 64


def step_batches(config: TrainConfig, step: int, codebook: np.ndarray) -> dict[str, Sequences]:
    """The fresh scenes of a step, by task: they depend on (seed, task, step) and the counts alone."""
    return {
        task: draw_batch(task, count, data_rng(config.seed, task, FIRST_STEP + step), codebook)
        for task, count in task_counts(config, step).items()
    }


def task_losses(
    model: Any, batch: Sequences, task: str, config: TrainConfig, targets: StageTargets
) -> tuple[Tensor, Tensor]:
    """Next-token loss (nats a label token) and AIA loss (Eq. 2) of one task's batch, from one pass."""
    query, key = spans(batch, task, config.spans)
    with capture(model, query, key, layers=layer_subset(config.aia_layers)) as record:
        ntp = models.next_token_loss(model, batch, task)
    target, delta = targets.tensors(task)
    kind: Any = config.aia_kind
    reduction: Any = config.aia_reduction
    rows = record.layers
    target, delta = (values[rows].to(ntp.device) for values in (target, delta))
    return ntp, aia_loss(record.intensity, target, delta, kind, reduction)


@torch.no_grad()
def distance(
    model: Any, codebook: np.ndarray, targets: StageTargets, definition: str = "paper", count: int = 256
) -> dict[str, float]:
    """Mean over layers of |I_l − T_l| by task, on held-out scenes; I_l is the mean over `count` samples."""
    device = next(model.parameters()).device
    found = {}
    for task in models.TASKS["unified"]:
        rng = np.random.default_rng((metrics.EVALUATION_SEED, 300))
        batch = draw_batch(task, count, rng, codebook, held_out=True).to(device)
        query, key = spans(batch, task, definition)
        with capture(model, query, key) as record:
            models.label_logits(model, batch, task)
        target, _ = targets.tensors(task)
        found[task] = float((record.intensity.mean(1).cpu() - target).abs().mean())
    return found


def finetune(
    config: TrainConfig, progress: bool = True, device: str = "cpu"
) -> tuple[Any, np.ndarray, list[dict]]:
    """Fine-tune a lab model: the model in evaluation mode, its codebook, and the log.

    The log has one row a step: `step`, and by task `ntp/TASK`, `aia/TASK` (where the AIA term was on), and
    every 20 steps `distance/TASK`, mean |I − T| on held-out scenes.
    """
    adapter = load_lab(config.model)
    model: Any = adapter.model.to(device).train()
    if models.is_janus(model):
        models.freeze(model)
    codebook, targets = adapter.codebook, lab_targets(config.targets, config.spans)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
    scheduler = get_scheduler(
        config.lr_scheduler_type, optimizer, config.warmup_steps, max(1, config.max_steps)
    )
    log: list[dict] = []
    bar = tqdm(range(config.max_steps), desc=f"λ = {config.aia_weight:g}", disable=not progress)
    for step in bar:
        row: dict[str, float] = {"step": step}
        if step % PROBE_EVERY == 0:
            away = distance(model, codebook, targets, config.spans, PROBE_SIZE)
            row |= {f"distance/{task}": value for task, value in away.items()}
        weight, loss = weight_at(config, step), torch.zeros((), device=device)
        batches = step_batches(config, step, codebook)
        total = sum(len(batch.ids) for batch in batches.values())
        for task, rows in batches.items():
            batch, share = rows.to(device), len(rows.ids) / total
            if weight:
                ntp, aia = task_losses(model, batch, task, config, targets)
                loss = loss + share * (ntp + weight * aia)
                row[f"aia/{task}"] = aia.item()
            else:  # plain SFT, to the last bit: nothing is captured
                ntp = models.next_token_loss(model, batch, task)
                loss = loss + share * ntp
            row[f"ntp/{task}"] = ntp.item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        log.append(row)
        if step % PROBE_EVERY == 0:
            bar.set_postfix_str(
                ", ".join(
                    f"{kind} {'/'.join(f'{row[name]:.3f}' for name in row if name.startswith(kind))}"
                    for kind in ("ntp", "distance")
                )
            )
    return model.eval(), codebook, log
