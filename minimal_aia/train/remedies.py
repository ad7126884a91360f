"""What to change when a plan does not fit, each change planned again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from minimal_aia.train.config import TrainConfig
from minimal_aia.train.layout import GIB, GPUS, Gpu, Layout, find_gpu
from minimal_aia.train.plan import Plan, plan

WORTH = GIB // 10  # a change that saves less is not worth its line
RANK = 64  # of LoRA, where it is proposed
# Keys that change nothing about the result: what to set them to, and how to say so.
SWITCHES: dict[str, tuple[Any, str]] = {
    "gradient_checkpointing": (True, "gradient_checkpointing: true"),
    "bf16": (True, "bf16: true"),
    "use_liger": (True, "use_liger: true (install liger-kernel)"),
    "codes": ("prepared", "codes: made once by `minimal-aia prepare`"),
}


@dataclass(frozen=True)
class Remedy:
    """change: what to write or do. plan: what then comes of it. alternative: not on top of others."""

    change: str
    plan: Plan
    alternative: bool = False


def remedies(config: TrainConfig, layout: Layout, gpu: str | Gpu = "h100", **options: Any) -> list[Remedy]:
    """Changes in the order to try them, until the run fits.

    First those that leave the result as it is, each on top of the ones before. If they do not suffice,
    alternatives, each on top of all of those: LoRA, more GPUs, a larger GPU. Empty if the run fits already;
    if nothing that is listed fits, nothing known here helps.
    """
    best = plan(config, layout, gpu, **options)
    found: list[Remedy] = []
    for change, values, place in _harmless(config, layout):
        if best.fits:
            break
        changed = replace(config, **values)
        then = plan(changed, place, gpu, **options)
        if then.needed <= best.needed - WORTH:
            config, layout, best = changed, place, then
            found.append(Remedy(change, then))
    if best.fits:
        return found
    for kind in _alternatives(config, layout, gpu):
        plans = ((change, plan(other, place, card, **options)) for change, other, place, card in kind)
        found += [Remedy(change, then, alternative=True) for change, then in plans if then.fits][:1]
    return found


def _harmless(config: TrainConfig, layout: Layout) -> Iterator[tuple[str, dict[str, Any], Layout]]:
    """(what to write, new values, layout) that train the same."""
    for key, (value, change) in SWITCHES.items():
        if not getattr(config, key):
            yield change, {key: value}, layout
    for values in _halvings(config):
        yield _written(values), values, layout
    if layout.sharding == "ddp":
        yield "FSDP2 in place of DDP", {}, Layout.of("fsdp2", layout.world)
    elif layout.sharding == "hsdp":
        yield "FSDP2 over all GPUs in place of HSDP", {}, Layout.of("fsdp2", layout.world)


def _halvings(config: TrainConfig) -> Iterator[dict[str, int]]:
    """The same step from micro-batches of half the size, a quarter, ..."""
    size, times = config.per_device_train_batch_size, config.gradient_accumulation_steps
    while size % 2 == 0:
        size, times = size // 2, times * 2
        yield {"per_device_train_batch_size": size, "gradient_accumulation_steps": times}


def _written(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in values.items())


def _alternatives(
    config: TrainConfig, layout: Layout, gpu: str | Gpu
) -> list[list[tuple[str, TrainConfig, Layout, str | Gpu]]]:
    """By kind, from the smallest step on: (what to write, configuration, layout, GPU)."""
    lora: list[dict[str, Any]] = []
    if not config.lora_rank and "language" not in config.freeze:
        change = {"lora_rank": RANK, "dtype": "bfloat16"}
        lora = [change, *(change | values for values in _halvings(config))]
    kind = "fsdp2" if layout.sharding in ("none", "ddp") else layout.sharding
    more = [Layout.of(kind, times * layout.world, layout.shard) for times in (2, 4, 8)]
    here = (find_gpu(gpu) if isinstance(gpu, str) else gpu).memory
    larger = [card for card in sorted(GPUS.values(), key=lambda card: card.memory) if card.memory > here]
    return [
        [(_written(values), replace(config, **values), layout, gpu) for values in lora],
        [(str(place), config, place, gpu) for place in more],
        [(f"{card.name}, {card.memory:g} GB", config, layout, card) for card in larger],
    ]
