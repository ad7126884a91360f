"""Where a run runs: which GPUs, how many, and what of the model each of them holds."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimal_aia.console import nearest

GIB = 2**30
MFU = 0.35  # share of the peak that plans assume, unless told otherwise
SHARDINGS = ("none", "ddp", "fsdp2", "hsdp", "zero3")


@dataclass(frozen=True)
class Gpu:
    """memory: GiB, the whole of it as nvidia-smi names it. teraflops: peak in bf16 without sparsity."""

    name: str
    memory: float
    teraflops: float | None


# From NVIDIA's data sheets (SXM versions of the data-centre cards). Those of L4 and L40S state sparse peaks,
# which are halved here. Memory of cards that keep check bits in it is what is left.
GPUS = {
    name: Gpu(name, memory, teraflops)
    for name, memory, teraflops in (
        ("rtx3090", 24, 71),
        ("rtx4090", 24, 165),
        ("l4", 22.5, 121),
        ("l40s", 45, 362),
        ("a100-40", 40, 312),
        ("a100", 80, 312),
        ("h800", 80, 989),
        ("h100", 80, 989),
        ("h200", 140, 989),
    )
}


def find_gpu(name: str) -> Gpu:
    """A GPU by name, or any by its memory: "h100", "24GB". ValueError if it is neither."""
    key = name.strip().lower()
    if key in GPUS:
        return GPUS[key]
    try:
        memory = float(key.removesuffix("gib").removesuffix("gb"))
    except ValueError:
        memory = 0.0
    if not 0 < memory < 10_000:
        raise ValueError(
            f"gpu {name!r}: choose from {', '.join(GPUS)}, or give its memory, like 24GB{nearest(key, GPUS)}"
        )
    return Gpu(f"{memory:g} GB", memory, None)


def local_gpu() -> Gpu | None:
    """The first GPU of this machine, with its peak if it is one of `GPUS`."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    name = found.name.lower().replace(" ", "").replace("geforce", "")
    known = max((key for key in GPUS if key.split("-")[0] in name), key=len, default="")
    return Gpu(found.name, round(found.total_memory / GIB, 1), GPUS[known].teraflops if known else None)


@dataclass(frozen=True)
class Layout:
    """How the processes of a run share the model.

    world: processes, one a GPU. shard: GPUs that one copy of the model is spread over (1: each holds all).
    """

    sharding: str = "none"
    world: int = 1
    shard: int = 1

    @property
    def sharded(self) -> bool:
        return self.sharding in ("fsdp2", "hsdp", "zero3")

    @classmethod
    def of(cls, sharding: str, world: int = 1, shard: int | None = None) -> Layout:
        """ValueError if it does not add up. shard: for hsdp, by default 8, the GPUs of a node."""
        if sharding not in SHARDINGS:
            raise ValueError(
                f"sharding {sharding!r}: choose from {', '.join(SHARDINGS)}{nearest(sharding, SHARDINGS)}"
            )
        if world < 1:
            raise ValueError(f"world_size {world}: must be at least 1")
        if sharding == "none" and world > 1:
            raise ValueError(f"sharding none is one process; for {world} choose ddp, fsdp2, hsdp or zero3")
        wanted = {"none": 1, "ddp": 1, "hsdp": shard or 8}.get(sharding, world)
        if world % wanted:
            raise ValueError(f"hsdp: {world} processes are not whole copies of {wanted}")
        return cls(sharding, world, wanted)

    def __str__(self) -> str:
        gpus = f"{self.world} GPU{'s' if self.world > 1 else ''}"
        if self.sharding == "none":
            return gpus
        copies = f", each copy on {self.shard}" if self.sharding == "hsdp" else ""
        return f"{gpus}, {self.sharding}{copies}"


def read_layout(path: str | Path, world: int | None = None) -> Layout:
    """The layout of an accelerate configuration, read by accelerate's own class.

    world: processes, if another number than the file's is started. ValueError if accelerate refuses the file.
    """
    import yaml
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        config: Any = load_config_from_file(str(path))
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a configuration of accelerate ({reason})") from None
    kind = str(getattr(config.distributed_type, "value", config.distributed_type))
    asked = 1 if config.num_processes is None else config.num_processes
    if not isinstance(asked, int):
        raise ValueError(f"{path}: num_processes is {asked!r}, not a whole number")
    for name in ("fsdp_config", "parallelism_config", "deepspeed_config"):
        if not isinstance(getattr(config, name), dict):
            raise ValueError(f"{path}: {name}: expected lines of `key: value`")
    world = world or max(1, asked)
    if kind == "DEEPSPEED":
        stage = _zero_stage(Path(path), config.deepspeed_config)
        if stage != 3:
            raise ValueError(f"{path}: ZeRO stage {stage}; a plan is made for stage 3 (or for FSDP2)")
        return Layout.of("zero3", world)
    if kind == "FSDP":
        if config.fsdp_config.get("fsdp_version") != 2:
            raise ValueError(f"{path}: fsdp_version is not 2; a plan is made for FSDP2 only")
        shard = config.parallelism_config.get("parallelism_config_dp_shard_size", world)
        replicate = config.parallelism_config.get("parallelism_config_dp_replicate_size", 1)
        return Layout.of("hsdp" if replicate > 1 else "fsdp2", world, shard)
    return Layout.of("ddp" if world > 1 else "none", world)


def _zero_stage(path: Path, settings: dict[str, Any]) -> int | None:
    """From the file that an accelerate configuration names (from where it is started, or beside it)."""
    name = settings.get("deepspeed_config_file")
    if name is None:
        return settings.get("zero_stage")
    for file in (Path(name), path.parent / Path(name).name):
        if file.is_file():
            stage: int | None = json.loads(file.read_text()).get("zero_optimization", {}).get("stage")
            return stage
    raise ValueError(f"{path}: deepspeed_config_file {name} is not there")


def running_layout() -> Layout:
    """The layout of the processes that run now, from what torchrun or `accelerate launch` told them."""

    def on(name: str) -> bool:
        return os.environ.get(name, "").lower() in ("1", "true", "yes")

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Layout()
    if on("ACCELERATE_USE_DEEPSPEED"):
        return Layout.of("zero3", world)
    if on("ACCELERATE_USE_FSDP"):
        replicate = int(os.environ.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE") or 1)
        return Layout.of("hsdp" if replicate > 1 else "fsdp2", world, world // replicate)
    return Layout.of("ddp", world)
