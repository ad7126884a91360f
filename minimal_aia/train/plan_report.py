"""A plan in words, and as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from minimal_aia.train.config import TrainConfig
from minimal_aia.train.layout import GIB, MFU, Gpu, Layout, local_gpu, running_layout, with_world
from minimal_aia.train.plan import FRAGMENTATION, RESERVE, Lengths, Plan, plan
from minimal_aia.train.remedies import Remedy, remedies
from minimal_aia.train.shapes import UnknownModel

MOMENTS = {
    "encode": "images become codes",
    "forward": "all is kept for backward",
    "between": "the second task has gone backward",
    "backward": "all gradients are there",
    "step": "AdamW",
}


def plan_text(
    config: TrainConfig,
    world_size: int | None = None,
    sharding: str | None = None,
    gpu: str | Gpu | None = None,
    mfu: float = MFU,
    lengths: Lengths | None = None,
) -> str:
    """The plan of a run, with what to change if it does not fit; or why there is none for this kind of model.

    world_size, sharding: by default those of the processes that run now (torchrun, `accelerate launch`).
    gpu: by default this machine's own, or an H100 if it has none.
    """
    gpu = gpu or local_gpu() or "h100"
    layout = running_layout()
    if sharding:
        layout = Layout.of(sharding, world_size or layout.world)
    elif world_size:
        layout = with_world(layout, world_size)
    options: dict[str, Any] = {"mfu": mfu, "lengths": lengths}
    try:
        found = plan(config, layout, gpu, **options)
    except UnknownModel as error:
        return f"none: {error}"
    return text(found, remedies(config, layout, gpu, **options), config.save_total_limit)


def text(found: Plan, changes: Sequence[Remedy] = (), checkpoints: int = 1) -> str:
    parts = [heading(found), memory_table(found), verdict(found), changed(changes), comparison(found)]
    parts += [time(found), disk(found, checkpoints)]
    parts += ["\n".join(f"note: {note}" for note in found.notes)]
    return "\n\n".join(part for part in parts if part)


def heading(found: Plan) -> str:
    weights = found.weights
    lora = f", {_count(weights.lora)} of LoRA" if weights.lora else ""
    rows = ", ".join(
        f"{task} {row.count} x {row.length} tokens ({row.labels} labels each)"
        for task, row in found.rows.items()
    )
    return (
        f"{found.model} on {found.layout}: {_count(weights.total)} weights, {_count(weights.trained)} trained"
        f" in full{lora}\nlargest micro-batch on a GPU: {rows}"
    )


def memory_table(found: Plan) -> str:
    """Rows are parts, columns the moments of a step, GiB a GPU."""
    names = list(dict.fromkeys(name for parts in found.memory.values() for name in parts))
    lines = ["GiB on each GPU     " + "".join(f"{moment:>10}" for moment in found.memory)]
    for name in names:
        sizes = (parts.get(name) for parts in found.memory.values())
        lines.append(f"{name:20}" + "".join(f"{_gib(size) if size else '-':>10}" for size in sizes))
    lines.append(f"{'all tensors':20}" + "".join(f"{_gib(found.at(moment)):>10}" for moment in found.memory))
    return "\n".join(lines)


def verdict(found: Plan) -> str:
    said = (
        f"fits, {found.margin:.0%} to spare" if found.fits else f"does not fit, {-found.margin:.0%} too much"
    )
    return (
        f"needed: {found.needed / GIB:.1f} GiB (most when {MOMENTS[found.moment]}; with"
        f" {FRAGMENTATION:.0%} for fragmentation and {RESERVE / GIB:g} GiB for CUDA and NCCL)\n"
        f"{found.gpu.name} has {found.gpu.memory:g}: {said}"
    )


def changed(changes: Sequence[Remedy]) -> str:
    if not changes:
        return ""
    steps = [c for c in changes if not c.alternative]
    others = [c for c in changes if c.alternative]
    lines = []
    if steps:
        lines = ["what to change, each on top of those before:", *_lines(steps)]
    if others:
        lines += ["and then one of these:" if steps else "what to change, one of these:", *_lines(others)]
    if not changes[-1].plan.fits:
        lines.append("that does not suffice, and no more is known here")
    return "\n".join(lines)


def _lines(changes: Sequence[Remedy]) -> list[str]:
    return [
        f"  {i}. {c.change:60} {c.plan.needed / GIB:7.1f} GiB  {'fits' if c.plan.fits else 'does not fit'}"
        for i, c in enumerate(changes, 1)
    ]


def comparison(found: Plan) -> str:
    lines = ["not done here, and what it would take in GiB on each GPU:"]
    lines += [f"  {name:55}{_gib(size):>8}" for name, size in found.comparison.items()]
    return "\n".join(lines)


def time(found: Plan) -> str:
    if found.step_seconds is None or found.hours is None:
        return f"time: not known for {found.gpu.name}; name a GPU"
    world, work = found.layout.world, found.work
    return (
        f"time, if {found.mfu:.0%} of {found.gpu.name}'s {found.gpu.teraflops:g} TFLOP/s are reached"
        f" (an assumption; MFU without recomputation {found.mfu * work.model / work.executed:.0%}):\n"
        f"  {found.step_seconds:.2f} s a step of {work.tokens * world:,.0f} tokens,"
        f" {work.tokens * world / found.step_seconds:,.0f} tokens/s,"
        f" {work.executed * world / 1e15:,.2f} PFLOP a step\n"
        f"  {found.hours:,.1f} hours for {found.steps:,} steps, {found.hours * world:,.0f} GPU hours"
    )


def disk(found: Plan, checkpoints: int = 1) -> str:
    return (
        f"disk: {found.disk / GIB:.1f} GiB a checkpoint; {checkpoints} are kept, and one more is there while"
        f" it is written: {found.disk * (checkpoints + 1) / GIB:.0f} GiB"
    )


def values(found: Plan, changes: Sequence[Remedy] = ()) -> dict[str, Any]:
    """Everything as plain values, bytes and seconds; for --json."""
    return {
        **{key: value for key, value in asdict(found).items() if key not in ("layout", "gpu")},
        "layout": asdict(found.layout),
        "gpu": asdict(found.gpu),
        "peak": found.peak,
        "peak_moment": found.moment,
        "needed": found.needed,
        "fits": found.fits,
        "margin": found.margin,
        "step_seconds": found.step_seconds,
        "hours": found.hours,
        "remedies": [
            {"change": c.change, "needed": c.plan.needed, "fits": c.plan.fits, "alternative": c.alternative}
            for c in changes
        ],
    }


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size < 0.995 * GIB else f"{size / GIB:.1f}"


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def short_table(plans: Sequence[Plan]) -> str:
    """One line a plan. The micro-batch of a GPU stays the same, so more GPUs mean more samples a step."""
    names = ("needed GiB", "spare", "s a step", "tokens/s", "hours")
    lines = [f"{'GPUs':32}{'GPU':>14}" + "".join(f"{name:>12}" for name in names)]
    for p in plans:
        line = f"{p.layout!s:32}{p.gpu.name:>14}{p.needed / GIB:12.1f}{p.margin:12.0%}"
        if p.step_seconds is not None:
            rate = p.work.tokens * p.layout.world / p.step_seconds
            line += f"{p.step_seconds:12.2f}{rate:12,.0f}{p.steps * p.step_seconds / 3600:12,.1f}"
        lines.append(line)
    return "\n".join(lines)
