"""The training run: `minimal-aia train RECIPE`, or with several processes

torchrun --nproc_per_node 2 -m minimal_aia.train.sft RECIPE [--key value ...]
accelerate launch --config_file recipes/fsdp2.yaml -m minimal_aia.train.sft RECIPE [--key value ...]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.integrations import is_fsdp_enabled

from minimal_aia.models.lab import as_batch, load_lab
from minimal_aia.models.registry import is_lab, load_adapter
from minimal_aia.profile_command import check_processes
from minimal_aia.train.callbacks import read_curves
from minimal_aia.train.card import write_card
from minimal_aia.train.check import check_data, preview
from minimal_aia.train.config import TrainConfig
from minimal_aia.train.data import data_adapter, open_data
from minimal_aia.train.module import SFTModule, resolve_targets
from minimal_aia.train.order import Order
from minimal_aia.train.plan_report import plan_text
from minimal_aia.train.recipe import check, to_yaml
from minimal_aia.train.saving import resume_point
from minimal_aia.train.trainer import AIATrainer, training_arguments

MODULE = "minimal_aia.train.sft"  # what launchers start
LOOKED_AT = 200  # samples a task that a dry run looks at


class LabBatches:
    """Endless fresh lab scenes as a dataset: item g is micro-batch g of the run, {task: Batch}.

    A step's scenes depend on the step and its number of samples alone; micro-batches and processes take
    slices of them. So two processes with eight samples each see what one with sixteen sees.
    """

    def __init__(self, config: TrainConfig, codebook: Any, world_size: int = 1) -> None:
        self.config, self.codebook = config, codebook
        self.order = Order.of(config, world_size)

    def __len__(self) -> int:
        return self.config.max_steps * self.order.per_step

    def __getitem__(self, number: int) -> dict[str, Any]:
        from minimal_aia.lab.finetune import step_batches

        step, part = divmod(number, self.order.per_step)
        size = self.order.batch * self.order.per_step
        whole = step_batches(replace(self.config, per_device_train_batch_size=size), step, self.codebook)
        found = {}
        for task, rows in whole.items():
            first, mine = self.order.stretch(task, number - part).start, self.order.stretch(task, number)
            if mine:
                names = [f"lab:{task}:{number}:{i}" for i in range(len(mine))]
                found[task] = as_batch(rows.rows(mine.start - first, mine.stop - first), task, names)
        return found


def build(config: TrainConfig) -> Any:
    """The trainer of a run: data, model, targets. Everything is checked before training starts."""
    check(config)
    check_processes(config.num_processes, MODULE)
    arguments = training_arguments(config)  # joins the other processes; must come before the model is loaded
    dataset = open_dataset(config)
    waits = waits_for_weights() and not is_lab(config.model)
    device = "meta" if waits else "cpu"
    adapter = load_adapter(config.model, device=device, dtype=getattr(torch, config.dtype))
    reserve(adapter.model)
    adapter.ends_turns = True
    if (codes := getattr(dataset, "codes", None)) and not waits:
        codes.check_model(adapter)
    if missing := [task for task in config.shares() if task not in adapter.tasks]:
        raise ValueError(f"task_ratio {config.task_ratio}: {config.model} does not do {missing[0]}")
    targets = resolve_targets(config, len(adapter.layers()))
    return AIATrainer(SFTModule(adapter, config, targets), config, dataset, args=arguments)


def waits_for_weights() -> bool:
    """Whether this process gets its weights from another one, once the model is sharded.

    Under FSDP with `fsdp_cpu_ram_efficient_loading` only each machine's first process reads them; else eight
    processes would read 28 GB each.
    """
    return is_fsdp_enabled() and os.environ.get("LOCAL_RANK", "0") != "0"


def reserve(model: Any) -> None:
    """Give weights on "meta" an address in this machine's memory, without values and without taking any.

    accelerate tells an optimizer's parameters apart by their addresses while it shards them, and on "meta"
    all addresses are 0: this process would train its shard of one weight only, and say nothing. Memory that
    nobody writes to is not used, and accelerate drops it before it has values.
    """
    reserved: dict[int, Any] = {}  # by the old one's identity: tied weights stay one
    for module in model.modules():
        for name, old in module.named_parameters(recurse=False):
            if old.is_meta:
                if id(old) not in reserved:
                    new = torch.nn.Parameter(torch.empty_like(old, device="cpu"), old.requires_grad)
                    new.__dict__.update(old.__dict__)  # transformers marks parameters as initialised
                    reserved[id(old)] = new
                setattr(module, name, reserved[id(old)])


def open_dataset(config: TrainConfig) -> Any:
    """The run's micro-batches by number: {task: Batch}."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if {getattr(config, f"{task}_data") for task in config.shares()} == {"lab"}:
        if not is_lab(config.model):
            raise ValueError(f"{config.model}: lab scenes are for lab models; name data of both tasks")
        return LabBatches(config, load_lab(config.model).codebook, world)
    return open_data(config, world)


def run(config: TrainConfig) -> Any:
    """Train, and leave in `output_dir` a folder that `load_adapter` reads. Returns the trainer.

    Its `stop.exit_code` is not 0 if a signal ended the run early: a checkpoint is there, no trained model.
    """
    trainer = build(config)
    checkpoint = resume_point(trainer)
    if trainer.args.should_save:
        path = Path(config.output_dir) / "recipe.yaml"
        path.write_text(to_yaml(config, everything=True), encoding="utf-8")
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        trainer.stop.restore()
    if not trainer.stop.exit_code:
        trainer.export(config.output_dir)
        finish(trainer, config)
    return trainer


def finish(trainer: Any, config: TrainConfig) -> None:
    """Write the model card and say what came out."""
    seen, curves = trainer.seen(), read_curves(config.output_dir)  # (all processes count what they saw)
    if not trainer.args.should_save:
        return
    steps, skipped = trainer.state.global_step, getattr(trainer.train_dataset, "skipped", 0)
    write_card(config, seen, curves, steps=steps, processes=trainer.args.world_size, skipped=skipped)
    for task in config.shares():
        away = [entry["distance"] for entry in curves if entry["task"] == task and "distance" in entry]
        if away:
            print(f"{task}: mean |I − T| {away[0]:.3f} -> {away[-1]:.3f} on the run's first samples")
    print(f"wrote {config.output_dir}")


def dry_run(config: TrainConfig) -> None:
    """Print the recipe, the plan, a look at the data and the first batch, without weights in memory.

    Under a launcher the first process speaks for all of them.
    """
    check(config)
    check_processes(config.num_processes, MODULE)
    if os.environ.get("RANK", "0") != "0":
        return
    adapter = data_adapter(config)
    targets = resolve_targets(config, len(adapter.layers()))
    aim = f"targets {targets.name}" if targets else "no targets"
    print(f"{config.model}: {adapter.family}, {len(adapter.layers())} layers; {aim}")
    print(f"\nrecipe\n{to_yaml(config) or '(all defaults)'}")
    print(f"plan (`minimal-aia plan` has other GPUs)\n{plan_text(config)}\n")
    dataset = open_dataset(config)
    if not isinstance(dataset, LabBatches):
        print("data, the first samples (`minimal-aia check-data` looks at all of them)\n")
        print(check_data(dataset, quick=True, limit=LOOKED_AT, progress=False).text() + "\n")
    print(f"first of {len(dataset)} micro-batches\n{preview(adapter, dataset[0], config.spans)}")


def main(argv: Sequence[str] | None = None) -> int:
    from minimal_aia import cli

    return cli.main(["train", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
