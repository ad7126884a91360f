"""The training run: `minimal-aia train RECIPE`, or with several processes

torchrun --nproc_per_node 2 -m minimal_aia.train.sft RECIPE [--key value ...]
accelerate launch --config_file recipes/fsdp2.yaml -m minimal_aia.train.sft RECIPE [--key value ...]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minimal_aia.train.config import TrainConfig, task_counts
from minimal_aia.train.recipe import check, to_yaml

LOOKED_AT = 200  # samples a task that a dry run looks at


class LabBatches:
    """Endless fresh lab scenes as a dataset: item g is micro-batch g of the run, {task: Batch}.

    A step's scenes depend on the step and its number of samples alone; micro-batches and processes take
    slices of them. So two processes with eight samples each see what one with sixteen sees.
    """

    def __init__(self, config: TrainConfig, codebook: Any, world_size: int = 1) -> None:
        self.config, self.codebook = config, codebook
        self.per_step = config.gradient_accumulation_steps * world_size

    def __len__(self) -> int:
        return self.config.max_steps * self.per_step

    def __getitem__(self, number: int) -> dict[str, Any]:
        from dataclasses import replace

        from minimal_aia.lab.finetune import step_batches
        from minimal_aia.models.lab import as_batch

        step, part = divmod(number, self.per_step)
        size = self.config.per_device_train_batch_size * self.per_step
        whole = step_batches(replace(self.config, per_device_train_batch_size=size), step, self.codebook)
        earlier = [task_counts(self.config, number - part + i) for i in range(part)]
        found = {}
        for task, count in task_counts(self.config, number).items():
            start = sum(counts.get(task, 0) for counts in earlier)
            rows = whole[task].rows(start, start + count)
            found[task] = as_batch(rows, task, [f"lab:{task}:{number}:{i}" for i in range(count)])
        return found


def build(config: TrainConfig) -> Any:
    """The trainer of a run: data, model, targets. Everything is checked before training starts."""
    import torch

    from minimal_aia.models.registry import is_lab, load_adapter
    from minimal_aia.train.arguments import training_arguments
    from minimal_aia.train.module import SFTModule, resolve_targets
    from minimal_aia.train.trainer import AIATrainer
    from minimal_aia.train.waiting import reserve, waits_for_weights

    check(config)
    check_processes(config)
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


def open_dataset(config: TrainConfig) -> Any:
    """The run's micro-batches by number: {task: Batch}."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if {getattr(config, f"{task}_data") for task in config.shares()} == {"lab"}:
        from minimal_aia.models.lab import load_lab
        from minimal_aia.models.registry import is_lab

        if not is_lab(config.model):
            raise ValueError(
                f"{config.model}: lab scenes are for lab models; name generation_data, understanding_data"
            )
        return LabBatches(config, load_lab(config.model).codebook, world)
    from minimal_aia.train.data import open_data

    return open_data(config, world)


def check_processes(config: TrainConfig) -> None:
    """ValueError when another number of processes came up than asked for: they would train on less data."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    # `accelerate launch --cpu --num_processes 2` starts one process. It leaves this trace: its own variables
    # and a rendezvous address, but no rank.
    lone = world == 1 and "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if (lone and "RANK" not in os.environ) or (config.num_processes or world) != world:
        raise ValueError(
            f"{config.num_processes or 'several'} processes were asked for, {world} came up; start them with"
            " `torchrun --nproc_per_node N -m minimal_aia.train.sft ...` or `accelerate launch --multi_gpu"
            " --num_processes N ...` (on a CPU, `accelerate launch --cpu --num_processes N` starts only one)"
        )


def run(config: TrainConfig) -> Any:
    """Train, and leave in `output_dir` a folder that `load_adapter` reads. Returns the trainer.

    Its `stop.exit_code` is not 0 if a signal ended the run early: a checkpoint is there, no trained model.
    """
    from minimal_aia.train.saving import resume_point

    trainer = build(config)
    checkpoint = resume_point(trainer)
    if trainer.args.should_save:
        path = Path(config.output_dir) / "recipe.yaml"
        path.write_text(to_yaml(config, everything=True), encoding="utf-8")
    trainer.train(resume_from_checkpoint=checkpoint)
    if not trainer.stop.exit_code:
        trainer.export(config.output_dir)
        finish(trainer, config)
    return trainer


def finish(trainer: Any, config: TrainConfig) -> None:
    """Write the model card and say what came out."""
    from minimal_aia.train.callbacks import read_curves
    from minimal_aia.train.card import write_card

    seen, curves = trainer.seen(), read_curves(config.output_dir)
    if not trainer.args.should_save:
        return
    facts = {
        "steps": trainer.state.global_step,
        "processes": trainer.args.world_size,
        "seen": seen,
        "skipped": getattr(trainer.train_dataset, "skipped", 0),
        "curves": curves,
    }
    write_card(config.output_dir, config, facts)
    for task in config.shares():
        away = [entry["distance"] for entry in curves if entry["task"] == task and "distance" in entry]
        if away:
            print(f"{task}: mean |I − T| {away[0]:.3f} -> {away[-1]:.3f} on the run's first samples")
    print(f"wrote {config.output_dir}")


def dry_run(config: TrainConfig) -> None:
    """Print the recipe, the plan, a look at the data and the first batch, without weights in memory.

    Under a launcher the first process speaks for all of them.
    """
    from minimal_aia.train.check import check_data
    from minimal_aia.train.module import resolve_targets
    from minimal_aia.train.plan_report import plan_text
    from minimal_aia.train.preview import preview

    check(config)
    check_processes(config)
    if os.environ.get("RANK", "0") != "0":
        return
    adapter = without_weights(config)
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


def without_weights(config: TrainConfig) -> Any:
    """The run's adapter, made from the model's configuration and processor alone."""
    from minimal_aia.models.registry import is_lab

    if is_lab(config.model):
        from minimal_aia.models.lab import load_lab

        return load_lab(config.model)
    from minimal_aia.train.data import data_adapter

    return data_adapter(config)


def main(argv: Sequence[str] | None = None) -> int:
    from minimal_aia import cli

    return cli.main(["train", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
