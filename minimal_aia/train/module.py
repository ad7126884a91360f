"""The loss of both tasks as one module with one forward, so that the hooks of DDP and FSDP fire.

The loss of an optimizer step, over all its micro-batches on all processes:

    L = Σ_task share · ( Σ cross-entropy / label tokens  +  λ · Σ AIA / samples )

share is the task's part of the samples. Each sum runs over the whole step, so the loss does not depend on how
a step is cut into micro-batches and processes. With one of each it is Σ share · (mean NTP + λ · mean AIA).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minimal_aia.capture import capture
from minimal_aia.loss import aia_loss
from minimal_aia.models.base import Adapter, Batch
from minimal_aia.targets import StageTargets
from minimal_aia.train.config import TASKS, TrainConfig, layer_subset

LOGITS_AT_ONCE = 2**27  # numbers: half a GB in float32, then a piece at a time, recomputed in backward

# Parts of a unified model by the names that transformers gives them (`freeze` in the configuration).
PARTS = {
    "vq": ("vqmodel",),
    "vision": ("vision_model",),
    "aligner": ("aligner", "generation_aligner"),
    "generation": ("generation_embeddings", "generation_head"),
    "language": ("language_model", "text_model"),
}
# Parts of Janus that only one task uses.
ONLY = {
    "generation": ("generation_aligner", "generation_embeddings", "generation_head"),
    "understanding": ("aligner", "vision_model"),
}


class SFTModule(nn.Module):
    """An adapter's model with the training loss as its forward.

    Args:
        adapter: a model that offers `label_states`; its weights are trained in place.
        config: what to train and how.
        targets: stages for as many layers as the model has (`resolve_targets`).
    """

    def __init__(self, adapter: Adapter, config: TrainConfig, targets: StageTargets) -> None:
        super().__init__()
        self.adapter, self.recipe, self.targets = adapter, config, targets
        self.model = adapter.model
        self.config = deepcopy(
            adapter.model.config
        )  # for Trainer and DeepSpeed, which read it and write to it
        self.layers = layer_subset(config.aia_layers, len(adapter.layers()))
        self._frozen = freeze(self.model, config.freeze, config.shares())

    def train(self, mode: bool = True) -> SFTModule:
        super().train(mode)
        for part in self._frozen:  # dropout and batch statistics of frozen parts stay off
            part.eval()
        return self

    def forward(
        self,
        batches: Mapping[str, Batch],
        weights: Mapping[str, float] | None,
        totals: Mapping[str, Mapping[str, float]] | None = None,
    ) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
        """The loss of these batches, and what to log.

        Args:
            batches: one a task.
            weights: λ by task. Where it is 0 the model runs untouched: plain SFT to the last bit. None: only
                `measure`, without a loss; through here, so that a wrapper gathers the weights it has sharded.
            totals: `counts` of the whole optimizer step by task, if these batches are only part of it.

        Returns:
            The scalar loss, and by task detached scalars: `ntp` (nats a label token), `aia`, `distance` (mean
            |I − T| over layers and samples), and `curve` [L], the mean intensity, when λ > 0.
        """
        if weights is None:
            return torch.zeros(()), {task: self.measure(batch) for task, batch in batches.items()}
        own = {task: self.counts(batch) for task, batch in batches.items()}
        totals = totals or own
        n_samples = sum(total["samples"] for total in totals.values())
        loss, logs = torch.zeros((), device=self.adapter.device), {}
        for task, batch in batches.items():
            share = totals[task]["samples"] / n_samples
            ntp_part, aia_part = (own[task][key] / max(totals[task][key], 1) for key in ("tokens", "used"))
            ntp, intensity = self.run(batch, capturing=bool(weights[task]))
            logs[task] = {"ntp": ntp.detach()}
            if intensity is None:
                loss = loss + share * (ntp_part * ntp)
                continue
            target, delta = self.goal(task, intensity)
            aia = aia_loss(intensity, target, delta, self.recipe.aia_kind, self.recipe.aia_reduction)
            loss = loss + share * (ntp_part * ntp + weights[task] * (aia_part * aia))
            logs[task] |= {"aia": aia.detach(), **self.measured(task, intensity.detach())}
        return self._touch_the_rest(loss, batches), logs

    def run(self, batch: Batch, capturing: bool) -> tuple[Tensor, Tensor | None]:
        """Mean next-token loss of a batch and, if asked for, the intensity [L, B] of `aia_layers`."""
        watch: Any = nullcontext()
        if capturing:
            query, key = self.adapter.spans(batch, self.recipe.spans)
            watch = capture(self.model, query, key, batch.attention_mask, layers=self.layers)
        with watch as record:
            states, head, labels = self.adapter.label_states(batch)
        return label_loss(states, head, labels), record.intensity if capturing else None

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """`curve` [L] and `distance` of a batch as they are now, without dropout and without training."""
        training = self.training
        self.eval()
        try:
            _, intensity = self.run(batch, capturing=True)
        finally:
            self.train(training)
        assert intensity is not None
        return self.measured(batch.task, intensity)

    def measured(self, task: str, intensity: Tensor) -> dict[str, Tensor]:
        """intensity [L, B] -> its mean over samples [L], and its mean distance to the targets."""
        target, _ = self.goal(task, intensity)
        return {
            "curve": intensity.nanmean(dim=1),
            "distance": (intensity - target[:, None]).abs().nanmean(),  # nan: samples without a span
        }

    def goal(self, task: str, intensity: Tensor) -> tuple[Tensor, Tensor]:
        """T and δ [L] of the recorded layers."""
        target, delta = self.targets.tensors(task, device=intensity.device)
        return (target, delta) if self.layers is None else (target[self.layers], delta[self.layers])

    def counts(self, batch: Batch) -> dict[str, float]:
        """What a batch adds to the three denominators: samples, label tokens, samples in the AIA loss."""
        used = batch.query_mask.any(-1) & batch.key_mask.any(-1)
        if self.recipe.aia_reduction == "authors-code":  # divides by the whole batch
            used = torch.ones_like(used)
        tokens = self.adapter.label_mask(batch)[:, 1:].sum()
        return {"samples": len(batch), "tokens": int(tokens), "used": int(used.sum())}

    def save(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write a folder that `load_adapter` reads. state_dict: this module's, gathered, if it is sharded."""
        mine = None
        if state_dict is not None:
            mine = {name.removeprefix("model."): tensor for name, tensor in state_dict.items()}
        self.adapter.save(folder, mine)

    def load(self, folder: str | Path) -> None:
        """Take back the weights that `save` wrote. ValueError if they are another model's."""
        from safetensors.torch import load_file

        files = sorted(Path(folder).glob("*.safetensors"))
        state = {
            name: t for file in files if file.name.startswith("model") for name, t in load_file(file).items()
        }
        result = self.model.load_state_dict(state, strict=False)
        tied = {name for name in result.missing_keys if name in (self.model._tied_weights_keys or ())}
        if wrong := sorted({*result.missing_keys, *result.unexpected_keys} - tied):
            raise ValueError(
                f"{folder}: not a checkpoint of this model: {len(wrong)} weights, first {wrong[0]}"
            )

    def _touch_the_rest(self, loss: Tensor, batches: Mapping[str, Batch]) -> Tensor:
        """Give every trained weight a gradient, if only zeros, when a task of the run is missing here.

        Janus' two tasks use different heads. A process without one of them would leave the others waiting for
        its gradients.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not distributed or len(batches) == len(self.recipe.shares()):
            return loss
        in_layers = {id(p) for layer in self.adapter.layers() for p in layer.parameters()}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in in_layers]
        return loss + sum((0.0 * p.sum() for p in rest), torch.zeros_like(loss))


def label_loss(states: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor) -> Tensor:
    """Mean cross-entropy in float32; never more than LOGITS_AT_ONCE logits in memory.

    states: [N, D]; head: [n, D] -> [n, V]; labels: int [N]. No label at all: zero, with its graph.
    """
    if not len(labels):
        return 0.0 * states.sum()

    def nats(some: Tensor, wanted: Tensor, reduction: str = "sum") -> Tensor:
        return F.cross_entropy(head(some).float(), wanted, reduction=reduction)

    size = max(1, LOGITS_AT_ONCE // getattr(head, "out_features", 1))
    if len(labels) <= size:
        return nats(states, labels, "mean")
    pieces = zip(states.split(size), labels.split(size), strict=True)
    return torch.stack([checkpoint(nats, *piece, use_reentrant=False) for piece in pieces]).sum() / len(
        labels
    )


def freeze(model: Any, parts: str, tasks: Collection[str] = TASKS) -> list[nn.Module]:
    """Switch off the gradients of the named parts, of the VQ tokenizer, and of what no task of the run uses.

    The VQ tokenizer makes the labels: nothing that is trained may change it. Parts that no task uses would
    get weight decay alone in a distributed run. Returns what was frozen; ValueError for unknown names.
    """
    names = {"vq", *(name.strip() for name in parts.split(",") if name.strip())}
    if unknown := sorted(names - PARTS.keys()):
        raise ValueError(f"freeze: there is no part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    unused = [attribute for task in TASKS if task not in tasks for attribute in ONLY[task]]
    inner = getattr(model, "model", model)
    found = [getattr(inner, name, None) for name in [*unused, *(a for n in sorted(names) for a in PARTS[n])]]
    if "generation" in tasks and len(tasks) == 1 and hasattr(inner, "generation_head"):
        head, words = model.get_output_embeddings(), model.get_input_embeddings()
        found.append(None if head.weight is words.weight else head)
    frozen = [part for part in found if part is not None]
    for part in frozen:
        part.requires_grad_(False).eval()
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"freeze {parts!r}: nothing is left to train")
    return frozen


def resolve_targets(config: TrainConfig, n_layers: int) -> StageTargets:
    """The stages that `config.targets` names, for a model of `n_layers`.

    lab...                          curves of the lab's task-specific models (`lab.references.lab_targets`)
    janus-pro, emu3, authors-code   as printed, as released
    anything else                   a YAML file that `StageTargets.save` wrote
    with ":rescaled" at the end     fitted to the model's depth; else another depth is an error
    """
    name, _, suffix = config.targets.partition(":rescaled")
    if suffix:
        raise ValueError(f"targets {config.targets!r}: nothing may follow :rescaled")
    if name == "lab" or name.startswith("lab-"):
        from minimal_aia.lab.references import lab_targets

        targets = lab_targets(name, config.spans)
    elif name in ("janus-pro", "emu3", "authors-code"):
        targets = StageTargets.paper(name)
    else:
        try:
            targets = StageTargets.load(name)
        except FileNotFoundError:
            raise ValueError(
                f"targets {name!r}: no such file, and not one of lab, lab-..., janus-pro, emu3, authors-code"
            ) from None
    for task in config.shares():
        if config.weights()[task]:
            targets.stages(task)
    if targets.n_layers != n_layers:
        if ":rescaled" not in config.targets:
            raise ValueError(
                f"targets {name!r} are for {targets.n_layers} layers, the model has {n_layers}: write"
                f' "{name}:rescaled" to fit them by relative depth, or measure your own (minimal-aia profile)'
            )
        targets = targets.for_layers(n_layers)
    return targets
