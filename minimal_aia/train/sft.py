"""The training run: `minimal-aia train RECIPE`, or with several processes

    torchrun --nproc_per_node 2 -m minimal_aia.train.sft RECIPE [--key value ...]
    accelerate launch --config_file recipes/fsdp2.yaml -m minimal_aia.train.sft RECIPE [--key value ...]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from minimal_aia.train.config import TrainConfig


class LabBatches:
    """Endless fresh lab scenes as a dataset: item g is micro-batch g of the run, {task: Batch}."""

    def __init__(self, config: TrainConfig, codebook: Any, world_size: int = 1) -> None:
        self.config, self.codebook = config, codebook
        self.per_step = config.gradient_accumulation_steps * world_size

    def __len__(self) -> int:
        return self.config.max_steps * self.per_step

    def __getitem__(self, number: int) -> dict[str, Any]:
        from minimal_aia.lab.finetune import step_batches
        from minimal_aia.models.lab import as_batch

        return {
            task: as_batch(rows, task, [f"lab:{task}:{number}:{i}" for i in range(len(rows.ids))])
            for task, rows in step_batches(self.config, number, self.codebook).items()
        }


def build(config: TrainConfig) -> Any:
    """The trainer of a run: model, targets, data. Everything is checked before training starts."""
    import torch

    from minimal_aia.models import load_adapter
    from minimal_aia.train.module import SFTModule, resolve_targets
    from minimal_aia.train.trainer import AIATrainer

    check_processes(config)
    adapter = load_adapter(config.model, device="cpu", dtype=getattr(torch, config.dtype))
    adapter.ends_turns = True
    targets = resolve_targets(config, len(adapter.layers()))
    dataset = open_dataset(config, adapter)
    return AIATrainer(SFTModule(adapter, config, targets), config, dataset)


def open_dataset(config: TrainConfig, adapter: Any) -> Any:
    """The run's micro-batches by number."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if {getattr(config, f"{task}_data") for task in config.shares()} == {"lab"}:
        return LabBatches(config, adapter.codebook, world)
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
    trainer.train(resume_from_checkpoint=resume_point(trainer))
    if not trainer.stop.exit_code:
        trainer.save_model()
    return trainer


def main(argv: Sequence[str] | None = None) -> int:
    from minimal_aia import cli

    return cli.main(["train", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
