"""What to change when a plan does not fit, each change planned again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from minimal_aia.train.config import TrainConfig
from minimal_aia.train.layout import GIB, GPUS, Gpu, Layout, find_gpu
from minimal_aia.train.plan import Plan, plan

Option = tuple[str, TrainConfig, Layout, str | Gpu]  # what to write, and what to plan then
WORTH = GIB // 10  # a change that saves less is not worth its line
RANK = 64  # of LoRA, where it is proposed


@dataclass(frozen=True)
class Remedy:
    """change: what to write or do. plan: what then comes of it. alone: not on top of other alternatives."""

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
    if best.fits:
        return found
    for change, config_then, layout_then in _harmless(config, layout):
        merged, place = config_then(config), layout_then or layout
        then = plan(merged, place, gpu, **options)
        if then.needed > best.needed - WORTH:
            continue
        config, layout, best = merged, place, then
        found.append(Remedy(change(config), then))
        if then.fits:
            return found
    for kind in _alternatives(config, layout, gpu):
        for change, other, place, card in kind:
            then = plan(other, place, card, **options)
            if then.fits:
                found.append(Remedy(change, then, alternative=True))
                break
    return found


def _harmless(config: TrainConfig, layout: Layout) -> Iterator[tuple[Any, Any, Layout | None]]:
    """(text of the change, new configuration, new layout) that train the same; halving may come again."""

    def set_to(**values: Any) -> Any:
        return lambda now: replace(now, **values)

    if not config.gradient_checkpointing:
        yield (lambda _: "gradient_checkpointing: true"), set_to(gradient_checkpointing=True), None
    if not config.bf16:
        yield (lambda _: "bf16: true"), set_to(bf16=True), None
    if not config.use_liger:
        yield (lambda _: "use_liger: true (install liger-kernel)"), set_to(use_liger=True), None
    if not config.codes:
        yield (lambda _: "codes: made once by `minimal-aia prepare`"), set_to(codes="prepared"), None
    size = config.per_device_train_batch_size
    while size % 2 == 0:
        yield _batch, _halved, None
        size //= 2
    if layout.sharding == "ddp":
        yield (lambda _: "FSDP2 in place of DDP"), set_to(), Layout.of("fsdp2", layout.world)
    elif layout.sharding == "hsdp":
        yield (lambda _: "FSDP2 over all GPUs in place of HSDP"), set_to(), Layout.of("fsdp2", layout.world)


def _halved(config: TrainConfig) -> TrainConfig:
    """The same step from micro-batches of half the size."""
    return replace(
        config,
        per_device_train_batch_size=config.per_device_train_batch_size // 2,
        gradient_accumulation_steps=config.gradient_accumulation_steps * 2,
    )


def _batch(config: TrainConfig) -> str:
    return (
        f"per_device_train_batch_size: {config.per_device_train_batch_size},"
        f" gradient_accumulation_steps: {config.gradient_accumulation_steps}"
    )


def _alternatives(config: TrainConfig, layout: Layout, gpu: str | Gpu) -> list[list[Option]]:
    """By kind, from the smallest step on: (text, configuration, layout, GPU)."""
    lora: list[Option] = []
    if not config.lora_rank and "language" not in config.freeze:
        change = replace(config, lora_rank=RANK, dtype="bfloat16")
        lora = [(f"lora_rank: {RANK}, dtype: bfloat16", change, layout, gpu)]
        while change.per_device_train_batch_size % 2 == 0:
            change = _halved(change)
            lora.append((f"{lora[0][0]}, {_batch(change)}", change, layout, gpu))
    more: list[Option] = [
        (str(place), config, place, gpu) for place in (layout.grown(times) for times in (2, 4, 8))
    ]
    here = (find_gpu(gpu) if isinstance(gpu, str) else gpu).memory
    larger: list[Option] = [
        (f"{name}, {card.memory:g} GB", config, layout, name)
        for name, card in sorted(GPUS.items(), key=lambda item: item[1].memory)
        if card.memory > here
    ]
    return [lora, more, larger]
