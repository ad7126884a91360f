"""`transformers.Trainer` for both tasks. The loss is `SFTModule`'s, the rest is inherited.

Changed: where batches come from, how a step's loss is averaged, what is logged, what a checkpoint holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import ProgressCallback

from minimal_aia.models.base import Batch
from minimal_aia.train.arguments import training_arguments
from minimal_aia.train.callbacks import Curves, Progress
from minimal_aia.train.config import TASKS, TrainConfig, micro_batch, weight_at
from minimal_aia.train.module import SFTModule
from minimal_aia.train.saving import SafeTrainer
from minimal_aia.train.signals import stay_alive_in_worker

SEEN = "seen"  # among a trainer's sums: samples and label tokens by task, never reset
PROBE_SAMPLES, PROBE_BATCHES = 16, 16  # curves are means over at least so many samples a task and process


class NonFiniteLoss(ValueError):
    """A nan or infinite loss or gradient; the message names the file with the samples' ids."""


class AIATrainer(SafeTrainer):
    """Trains an `SFTModule`.

    Args:
        module: the model with its loss.
        config: the run; `training_arguments` makes `TrainingArguments` of it.
        dataset: `dataset[g]` is micro-batch number g of the run (`config.micro_batch`), {task: Batch}.
    """

    loss_is_scaled_for_ga = True  # SFTModule divides by the whole step's counts

    def __init__(self, module: SFTModule, config: TrainConfig, dataset: Any, **options: Any) -> None:
        self.config = config
        self._sums: dict[str, Tensor] = {}  # what was logged since the last log entry: sums and their weights
        self._step_ids: list[str] = []
        self.latest: dict[str, dict[str, Tensor]] = {}  # of the last micro-batch, for the progress bar
        self._probe: list[dict[str, Batch]] = []
        self._stand_ins: dict[str, Batch] = {}
        arguments = options.pop("args", None) or training_arguments(config)
        super().__init__(model=module, args=arguments, train_dataset=dataset, **options)
        self.remove_callback(ProgressCallback)
        self.add_callback(Progress(self))
        if config.curve_steps:
            self.add_callback(Curves(self))

    # ---- batches ---------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """This process' micro-batches in order; accelerate would deal them out again, so it is left out."""
        order = list(self._order())
        return DataLoader(
            self.train_dataset,
            batch_size=1,
            sampler=order,
            collate_fn=_only,
            num_workers=self.args.dataloader_num_workers,
            worker_init_fn=stay_alive_in_worker,
            multiprocessing_context="fork" if self.args.dataloader_num_workers else None,
        )

    def _order(self) -> Iterator[int]:
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        for step in range(self.config.max_steps):
            for micro in range(self.config.gradient_accumulation_steps):
                yield micro_batch(self.config, step, micro, rank, world)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: Any) -> tuple[list, Any]:
        """A step's micro-batches on this process, and the counts of the whole step over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_ids = [i for micro in batches for batch in micro.values() for i in batch.ids]
        keys = ("samples", "tokens", "used")
        counts = torch.zeros(len(TASKS), len(keys), dtype=torch.float64)
        for micro in batches:
            for task, batch in micro.items():
                own = self.module.counts(batch)
                counts[TASKS.index(task)] += torch.tensor([own[key] for key in keys], dtype=torch.float64)
        self._seen(counts)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts.float().to(device), "sum").cpu().double()
        totals = {
            task: dict(zip(keys, row, strict=True))
            for task, row in zip(TASKS, counts.tolist(), strict=True)
            if row[0]
        }
        self._fill_in(batches)
        return batches, totals

    def _fill_in(self, batches: list[dict[str, Batch]]) -> None:
        """Give every process every task that any of them has in a micro-batch, when the model is sharded.

        A sharded model is put together by all processes, layer by layer: if one of them made a pass more than
        another, both would wait for ever. A stand-in is real data without ids, and counts nothing.
        """
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return
        needed = torch.tensor([[float(task in micro) for task in TASKS] for micro in batches])
        needed = needed.to(self.args.device)
        torch.distributed.all_reduce(needed, torch.distributed.ReduceOp.MAX)
        for number, (micro, row) in enumerate(zip(batches, needed.tolist(), strict=True)):
            batches[number] = {
                task: micro[task] if task in micro else self._stand_in(task)
                for task, anywhere in zip(TASKS, row, strict=True)
                if anywhere
            }

    def _stand_in(self, task: str) -> Batch:
        """The run's first batch of a task, marked as one that counts nothing."""
        if task not in self._stand_ins:
            micros = map(self.train_dataset.__getitem__, range(len(self.train_dataset)))
            found = next(micro for micro in micros if task in micro)
            self._stand_ins[task] = replace(found[task], ids=[])
        return self._stand_ins[task]

    def _prepare_inputs(self, inputs: dict[str, Batch]) -> dict[str, Batch]:
        return {task: batch.to(self.args.device, self.module.adapter.dtype) for task, batch in inputs.items()}

    @property
    def module(self) -> SFTModule:
        return self.accelerator.unwrap_model(self.model)

    def _seen(self, counts: Tensor) -> None:
        """Count this process' samples and label tokens, among the sums, which checkpoints keep."""
        before = self._sums.get(SEEN, torch.zeros(2 * len(TASKS), dtype=torch.float64))
        self._sums[SEEN] = before.double().cpu() + counts[:, :2].flatten()

    def seen(self) -> dict[str, dict[str, int]]:
        """By task, the `samples` and label `tokens` of the run so far, over all processes."""
        counts = self._sums.get(SEEN, torch.zeros(2 * len(TASKS))).float().to(self.args.device)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts, "sum")
        rows = counts.view(-1, 2).tolist()
        return {t: {"samples": int(n), "tokens": int(m)} for t, (n, m) in zip(TASKS, rows, strict=True) if n}

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All: weight decay acts on every trained weight, as in the bare loop and in the paper's AdamW."""
        return [name for name, _ in model.named_parameters()]

    # ---- loss ------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's part of the step's loss, times the processes: gradients are their mean."""
        step = self.state.global_step
        weights = {task: weight_at(self.config, step, task) for task in TASKS}
        loss, logs = model(inputs, weights, num_items_in_batch)
        for task, values in logs.items():
            self._add(task, values, self.module.counts(inputs[task]))
        self.latest |= logs
        if not math.isfinite(loss.item()):
            file = self._report_nonfinite({t: {k: v.tolist() for k, v in x.items()} for t, x in logs.items()})
            if self.config.on_nonfinite == "stop":
                raise NonFiniteLoss(f"step {step}: the loss is {loss.item()}; its samples are in {file}")
        loss = loss * self.accelerator.num_processes
        return (loss, logs) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and not math.isfinite(float(norm)):
            file = self._report_nonfinite({"grad_norm": float(norm)})
            if self.config.on_nonfinite == "stop":
                raise NonFiniteLoss(
                    f"step {self.state.global_step}: the gradient's norm is {float(norm)};"
                    f" its samples are in {file}"
                )
            model.zero_grad()  # every process sees the same norm, so all of them leave this step out
        return norm

    def _report_nonfinite(self, values: dict[str, Any]) -> Path:
        name = f"nonfinite-step{self.state.global_step}-process{self.accelerator.process_index}.json"
        file = Path(self.args.output_dir) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        report = {"step": self.state.global_step, "samples": self._step_ids, "values": values}
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        return file

    # ---- what is logged --------------------------------------------------------------------------------

    def _add(self, task: str, values: Mapping[str, Tensor], counts: Mapping[str, float]) -> None:
        """Keep means as weighted sums: [Σ weight · value, Σ weight]."""
        for name in ("ntp", "aia", "distance"):
            weight = counts["tokens" if name == "ntp" else "used"]
            if name in values and weight:
                term = torch.stack(
                    [values[name].float() * weight, torch.full_like(values[name].float(), weight)]
                )
                key = f"{name}/{task}"
                self._sums[key] = self._sums.get(key, torch.zeros_like(term)) + term

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add ntp, aia and |I − T| by task to a training entry: means since the last, of all processes."""
        if "loss" in logs:
            keys = [f"{name}/{task}" for name in ("ntp", "aia", "distance") for task in TASKS]
            sums = torch.stack([self._sums.get(k, torch.zeros(2, device=self.args.device)) for k in keys])
            if self.accelerator.num_processes > 1:
                sums = self.accelerator.reduce(sums, "sum")
            logs |= {k: total / n for k, (total, n) in zip(keys, sums.tolist(), strict=True) if n}
            logs["aia_weight"] = weight_at(self.config, max(0, self.state.global_step - 1))
            self._sums = {SEEN: self._sums[SEEN]} if SEEN in self._sums else {}
        super().log(logs, start_time)

    @torch.no_grad()
    def measure_curves(self) -> dict[str, dict[str, Any]]:
        """By task `curve` (a list, one value a layer) and `distance`, on the run's first samples, as of now.

        The same samples every time, without dropout: two measurements differ by the training between them.
        """
        if not self._probe:
            self._probe = self._first_samples()
        n_layers = len(self.module.layers or self.module.adapter.layers())
        sums = torch.zeros(len(TASKS), n_layers + 2, device=self.args.device)  # curve..., distance, samples
        for micro in self._probe:
            batches = self._prepare_inputs(micro)
            for task, values in self.model_wrapped(batches, None)[1].items():
                if used := self.module.counts(batches[task])["used"]:
                    away = values.get("distance", torch.zeros_like(values["curve"][0]))
                    row = torch.cat([values["curve"], torch.stack([away, torch.ones_like(away)])])
                    sums[TASKS.index(task)] += used * row
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums, "sum")
        found: dict[str, dict[str, Any]] = {}
        for task, (*curve, away, used) in zip(TASKS, sums.tolist(), strict=True):
            if used:
                found[task] = {"curve": [value / used for value in curve]}
                if self.module.targets is not None and getattr(self.module.targets, task):
                    found[task]["distance"] = away / used
        return found

    def _first_samples(self) -> list[dict[str, Batch]]:
        """Micro-batches from the run's beginning, until each process has PROBE_SAMPLES of every task."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        found: list[dict[str, Batch]] = []
        fewest = 0
        while len(found) < PROBE_BATCHES and fewest < PROBE_SAMPLES:
            found.append(self.train_dataset[len(found) * world + rank])
            own = min(sum(len(b[task]) for b in found if task in b) for task in self.config.shares())
            fewest = int(self.accelerator.gather(torch.tensor(own, device=self.args.device)).min())
        self._fill_in(found)
        return found

    # ---- checkpoints -----------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """A folder that `load_adapter` reads, not a bare state dictionary and pickled arguments."""
        if self.args.should_save:
            self.module.save(output_dir or self.args.output_dir, state_dict)

    def export(self, folder: str | Path) -> None:
        """Write the trained model as one folder that `from_pretrained` reads, gathered if it is sharded."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        state = self.accelerator.get_state_dict(self.model_wrapped) if sharded else None
        if self.args.should_save:
            self.module.export(folder, state)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.module.load(resume_from_checkpoint)


def _only(items: list) -> Any:
    return items[0]
