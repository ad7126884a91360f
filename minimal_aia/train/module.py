"""The loss of both tasks as one module with one forward, so that the hooks of DDP and FSDP fire.

The loss of an optimizer step, over all its micro-batches on all processes:

    L = Σ_task share · ( Σ cross-entropy / label tokens  +  λ · Σ AIA / samples )

share is the task's part of the samples. Each sum runs over the whole step, so the loss does not depend on how
a step is cut into micro-batches and processes. With one of each it is Σ share · (mean NTP + λ · mean AIA).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minimal_aia.capture import capture
from minimal_aia.console import nearest
from minimal_aia.loss import aia_loss
from minimal_aia.models.base import Adapter, Batch
from minimal_aia.targets import PRESETS, StageTargets
from minimal_aia.train.config import TrainConfig, layer_subset
from minimal_aia.train.label_loss import label_loss
from minimal_aia.train.parts import add_lora, freeze, merged, untie

TRAINED = "trained.safetensors"  # in a LoRA checkpoint: what is trained, and nothing else


class SFTModule(nn.Module):
    """An adapter's model with the training loss as its forward.

    Args:
        adapter: a model that offers `label_states`; its weights are trained in place.
        config: what to train and how.
        targets: stages for as many layers as the model has (`resolve_targets`); None if λ is 0 all along.
    """

    def __init__(self, adapter: Adapter, config: TrainConfig, targets: StageTargets | None) -> None:
        super().__init__()
        self.adapter, self.recipe, self.targets = adapter, config, targets
        self.model = adapter.model
        self.config = deepcopy(self.model.config)  # Trainer and DeepSpeed read it, and write to it
        self._no_split_modules = self.model._no_split_modules  # what accelerate shards one by one
        self.layers = layer_subset(config.aia_layers, len(adapter.layers()))
        if config.spans not in adapter.definitions:
            raise ValueError(f"spans {config.spans}: {config.model} knows {', '.join(adapter.definitions)}")
        self._frozen = freeze(self.model, config.freeze, config.shares())
        if config.attention_dropout is not None:
            set_dropout(adapter.layers(), config.attention_dropout)
        if config.lora_rank:
            add_lora(self.model, adapter.layers(), config)
        if config.gradient_checkpointing:
            checkpoint_activations(self.model)

    def train(self, mode: bool = True) -> SFTModule:
        super().train(mode)
        for part in self._frozen:  # dropout and batch statistics of frozen parts stay off
            part.eval()
        return self

    def tie_weights(self) -> None:
        """For accelerate: sharding makes two weights of one that embedding and head share."""
        self.model.tie_weights()

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
        loss = label_loss(states, head, labels, self.recipe.use_liger)
        return loss, record.intensity if capturing else None

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
        """intensity [L, B] -> its mean over samples [L] and, if there are targets, its distance to them."""
        found = {"curve": intensity.nanmean(dim=1)}  # nan: samples without a span
        if self.targets is not None and getattr(self.targets, task):
            target, _ = self.goal(task, intensity)
            found["distance"] = (intensity - target[:, None]).abs().nanmean()
        return found

    def goal(self, task: str, intensity: Tensor) -> tuple[Tensor, Tensor]:
        """T and δ [L] of the recorded layers."""
        assert self.targets is not None
        target, delta = self.targets.tensors(task, device=intensity.device)
        return (target, delta) if self.layers is None else (target[self.layers], delta[self.layers])

    def counts(self, batch: Batch) -> dict[str, float]:
        """What a batch adds to the three denominators: samples, label tokens, samples in the AIA loss.

        Nothing, if it is a stand-in (without ids) for a task that this process lacks.
        """
        if not batch.ids:
            return {"samples": 0, "tokens": 0, "used": 0}
        used = batch.query_mask.any(-1) & batch.key_mask.any(-1)
        if self.recipe.aia_reduction == "authors-code":  # divides by the whole batch
            used = torch.ones_like(used)
        tokens = self.adapter.label_mask(batch)[:, 1:].sum()
        return {"samples": len(batch), "tokens": int(tokens), "used": int(used.sum())}

    def save(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write what `load` takes back; without LoRA, a folder that `load_adapter` reads too.

        state_dict: this module's, gathered, if it is sharded; an empty one: everything but the weights.
        """
        state = self.state_dict() if state_dict is None else state_dict
        if not self.recipe.lora_rank:
            self.adapter.save(folder, _without_prefix(state), hub_names=False)
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        save_file({n: t.contiguous() for n, t in state.items() if n in trained}, Path(folder) / TRAINED)

    @torch.no_grad()
    def load(self, folder: str | Path) -> None:
        """Take back the weights that `save` wrote. ValueError if they are another model's."""
        lora = bool(self.recipe.lora_rank)
        target: nn.Module = self if lora else self.model
        mine = target.state_dict()
        wanted = {name for name, p in target.named_parameters() if p.requires_grad or not lora}
        files = [
            safe_open(file, "pt") for file in Path(folder).glob(TRAINED if lora else "model*.safetensors")
        ]
        found = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no mapping
        wrong = {n for n in found if n not in mine or [*mine[n].shape] != found[n].get_slice(n).get_shape()}
        if wrong := wrong | (wanted - found.keys()):
            raise ValueError(f"{folder}: another model's checkpoint ({len(wrong)} weights, as {min(wrong)})")
        for name, file in found.items():
            mine[name].copy_(file.get_tensor(name))  # one by one: a second copy of the model need not fit

    def export(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write a folder that `load_adapter` and `from_pretrained` read, LoRA merged into the weights."""
        state = _without_prefix(self.state_dict() if state_dict is None else state_dict)
        if self.recipe.lora_rank:
            state = merged(state, self.recipe.lora_alpha / self.recipe.lora_rank)
        untie(self.model, state)
        self.adapter.save(folder, state)

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


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def set_dropout(layers: list[nn.Module], p: float) -> None:
    """Give the attention of decoder layers another dropout; in Emu3's the same setting acts elsewhere too."""
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, nn.Dropout):
                module.p = p
            elif hasattr(module, "attention_dropout"):
                setattr(module, "attention_dropout", p)  # noqa: B010 - a Module to mypy


def checkpoint_activations(model: Any) -> None:
    """Keep only each layer's input for the backward pass. Never the re-entrant kind: it drops intensities."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:  # its name before transformers 5.20 or so
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def resolve_targets(config: TrainConfig, n_layers: int) -> StageTargets | None:
    """The stages that `config.targets` names, for a model of `n_layers`.

    lab...                          curves of the lab's task-specific models (`lab.references.lab_targets`)
    janus-pro, emu3, authors-code   as printed, as released
    anything else                   a YAML file that `StageTargets.save` wrote
    with ":rescaled" at the end     fitted to the model's depth; else another depth is an error
    none                            None; for runs without the AIA loss
    """
    if config.targets == "none":
        if any(config.weights()[task] for task in config.shares()):
            raise ValueError("targets none: the AIA loss needs targets, unless aia_weight is 0")
        return None
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
                + nearest(name, ("lab", *PRESETS))
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
