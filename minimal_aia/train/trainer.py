"""`transformers.Trainer` for both tasks. The loss is `SFTModule`'s, the rest is inherited.

Changed: where batches come from, how a step's loss is averaged, what is logged, what a checkpoint holds.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import ProgressCallback, TrainingArguments

from minimal_aia.models.base import Batch
from minimal_aia.train.callbacks import Curves, Progress, stay_alive_in_worker
from minimal_aia.train.config import TASKS, TrainConfig, micro_batch, weight_at
from minimal_aia.train.module import SFTModule
from minimal_aia.train.saving import SafeTrainer

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
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        return DataLoader(
            self.train_dataset,
            batch_size=1,
            sampler=[
                micro_batch(self.config, step, micro, rank, world)
                for step in range(self.config.max_steps)
                for micro in range(self.config.gradient_accumulation_steps)
            ],
            collate_fn=itemgetter(0),
            num_workers=self.args.dataloader_num_workers,
            worker_init_fn=stay_alive_in_worker,
            multiprocessing_context="fork" if self.args.dataloader_num_workers else None,
        )

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
        rows = self._over_all(counts.float().to(device)).tolist()
        totals = {task: dict(zip(keys, row, strict=True)) for task, row in zip(TASKS, rows) if row[0]}
        self._fill_in(batches)
        return batches, totals

    def _over_all(self, sums: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.accelerator.reduce(sums, "sum") if self.accelerator.num_processes > 1 else sums

    def _fill_in(self, batches: list[dict[str, Batch]]) -> None:
        """Give every process every task that any of them has in a micro-batch, when the model is sharded.

        A sharded model is put together by all processes, layer by layer: if one of them made a pass more than
        another, both would wait for ever. A stand-in is real data without ids, and counts nothing.
        """
        if self.sharding == "plain":
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

    def _seen(self, counts: Tensor) -> None:
        """Count this process' samples and label tokens, among the sums, which checkpoints keep."""
        before = self._sums.get(SEEN, torch.zeros(2 * len(TASKS), dtype=torch.float64))
        self._sums[SEEN] = before.double().cpu() + counts[:, :2].flatten()

    def seen(self) -> dict[str, dict[str, int]]:
        """By task, the `samples` and label `tokens` of the run so far, over all processes."""
        counts = self._sums.get(SEEN, torch.zeros(2 * len(TASKS))).float().to(self.args.device)
        rows = self._over_all(counts).view(-1, 2).tolist()
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
        self._check_finite("the loss", loss.item(), logs)
        loss = loss * self.accelerator.num_processes
        return (loss, logs) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None:
            self._check_finite("the gradient's norm", float(norm))
        return norm

    def _check_finite(self, what: str, number: float, logs: Mapping[str, Any] | None = None) -> None:
        """NonFiniteLoss if it is not, after the ids of the step's samples have been written down."""
        if math.isfinite(number):
            return
        step = self.state.global_step
        file = Path(self.args.output_dir) / f"nonfinite-step{step}-process{self.args.process_index}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        values = {task: {k: v.tolist() for k, v in found.items()} for task, found in (logs or {}).items()}
        report = {"step": step, what: number, "samples": self._step_ids, "values": values}
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        raise NonFiniteLoss(f"step {step}: {what} is {number}; its samples are in {file}")

    # ---- what is logged --------------------------------------------------------------------------------

    def _add(self, task: str, values: Mapping[str, Tensor], counts: Mapping[str, float]) -> None:
        """Keep means as weighted sums: [Σ weight · value, Σ weight]."""
        for name in ("ntp", "aia", "distance"):
            weight = counts["tokens" if name == "ntp" else "used"]
            if name in values and weight:
                value, key = values[name].float(), f"{name}/{task}"
                term = torch.stack([value, torch.ones_like(value)]) * weight
                self._sums[key] = self._sums.get(key, torch.zeros_like(term)) + term

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add ntp, aia and |I − T| by task to a training entry: means since the last, of all processes."""
        if "loss" in logs:
            keys = [f"{name}/{task}" for name in ("ntp", "aia", "distance") for task in TASKS]
            none = torch.zeros(2, device=self.args.device)
            sums = self._over_all(torch.stack([self._sums.get(key, none) for key in keys])).tolist()
            logs |= {key: total / n for key, (total, n) in zip(keys, sums, strict=True) if n}
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
        found: dict[str, dict[str, Any]] = {}
        for task, (*curve, away, used) in zip(TASKS, self._over_all(sums).tolist(), strict=True):
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


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """The part of a run's configuration that `transformers.Trainer` reads."""
    same = (
        "output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "seed",
        "dataloader_num_workers", "learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay",
        "max_grad_norm", "warmup_steps", "lr_scheduler_type", "bf16", "full_determinism",
        "save_total_limit", "logging_steps",
    )  # fmt: skip
    cpu = config.use_cpu or not torch.cuda.is_available()
    arguments = TrainingArguments(
        **{name: getattr(config, name) for name in same},
        # Unless it is told, accelerate takes each of several processes without a GPU for the only one.
        use_cpu=config.use_cpu or not torch.accelerator.is_available(),
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        report_to=loggers(config.report_to),
        optim="adamw_torch" if cpu else "adamw_torch_fused",
        logging_nan_inf_filter=False,  # a nan is reported, not smoothed over
        ddp_find_unused_parameters=False,  # SFTModule gives every trained weight a gradient
        remove_unused_columns=False,
        disable_tqdm=False,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # one process, one GPU: never torch's old DataParallel
    return arguments


def loggers(report_to: str) -> list[str]:
    """`report_to` as the Trainer takes it. ImportError names what must be installed."""
    if report_to == "none":
        return []
    if report_to == "auto":
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    names = [name.strip() for name in report_to.split(",")]
    for name in names:
        if name not in ("tensorboard", "wandb"):
            raise ValueError(f"report_to {report_to!r}: choose auto, none, tensorboard or wandb")
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"report_to {report_to}: {name} is not installed: pip install {name}")
    return names
