"""A plan in words, as plain values, and the plans of all recipes as the table of recipes/README.md."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minimal_aia.train.config import TrainConfig
from minimal_aia.train.layout import GIB, Gpu, Layout, local_gpu, read_layout, running_layout
from minimal_aia.train.plan import FRAGMENTATION, RESERVE, Plan, plan
from minimal_aia.train.recipe import add_options, read_recipe
from minimal_aia.train.remedies import Remedy, remedies
from minimal_aia.train.shapes import UnknownModel

MOMENTS = {
    "encode": "images become codes",
    "forward": "all is kept for backward",
    "between": "the second task has gone backward",
    "backward": "all gradients are there",
    "step": "AdamW",
}


def plan_text(config: TrainConfig, layout: Layout | None = None, gpu: str | Gpu | None = None) -> str:
    """The plan of a run, with what to change if it does not fit; or why there is none for this kind of model.

    layout: by default that of the processes that run now (torchrun, `accelerate launch`). gpu: by default
    this machine's own, or an H100 if it has none.
    """
    layout, gpu = layout or running_layout(), gpu or local_gpu() or "h100"
    try:
        found = plan(config, layout, gpu)
    except UnknownModel as error:
        return f"none: {error}"
    return text(found, remedies(config, layout, gpu), config.save_total_limit)


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
        **asdict(found),
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


# --- the recipes' table -------------------------------------------------------------------------------------

RECIPES = Path(__file__).parents[2] / "recipes"
MEMORY = re.compile(r"Memory: (?P<gib>[\d.]+) GiB on each of (?P<world>\d+) (?P<gpu>\w[\w-]*)")
COMMAND = re.compile(r" {3,}\S")


@dataclass(frozen=True)
class Header:
    """what: the first sentence. commands: in order. gpu, world, gib: of the Memory line, if there is one."""

    what: str
    commands: tuple[str, ...]
    gpu: str = ""
    world: int = 1
    gib: float = 0.0


def read_header(path: Path) -> Header:
    """The opening comments of a recipe. ValueError if they do not say what it is for and how to run it."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines += [] if line.startswith("#!") else [line[1:]]
    commands = tuple(line.strip() for line in lines if COMMAND.match(line))
    prose = " ".join(line.strip() for line in lines if not COMMAND.match(line))
    what = re.split(r"(?<=\.)\s", prose, maxsplit=1)[0].rstrip(".:")
    if not what or not commands:
        raise ValueError(f"{path}: opens without a comment that says what it is for, and a command below it")
    if found := MEMORY.search(prose):
        return Header(what, commands, found["gpu"], int(found["world"]), float(found["gib"]))
    return Header(what, commands)


def is_training(path: Path) -> bool:
    """Whether a YAML file is a training recipe, and not a configuration of accelerate."""
    return "\nmodel:" in "\n" + path.read_text(encoding="utf-8")


def recipes(training: bool, folder: Path = RECIPES) -> list[Path]:
    """The training recipes, or the configurations for `accelerate launch`."""
    return [path for path in sorted(folder.glob("*.yaml")) if is_training(path) == training]


def parse_command(command: str) -> tuple[Path, Path | None, dict[str, Any]]:
    """(training recipe, accelerate configuration, options) of a recipe's command."""
    words = shlex.split(command)
    files = [RECIPES / Path(word).name for word in words if word.endswith(".yaml")]
    parser = argparse.ArgumentParser()
    add_options(parser)
    end = max(i for i, word in enumerate(words) if word.endswith(".yaml")) + 1
    return files[-1], files[0] if len(files) > 1 else None, vars(parser.parse_args(words[end:]))


def planned(path: Path) -> Plan:
    """The plan of what the first command in a recipe's comments starts, on the GPUs of its Memory line."""
    header = read_header(path)
    recipe, launch, options = parse_command(header.commands[0])
    if launch is None:
        layout = Layout.of("ddp" if header.world > 1 else "none", header.world)
    else:
        layout = read_layout(launch, header.world if header.gpu else None)
    return plan(read_recipe(recipe, options), layout, header.gpu or "h100")


def table() -> str:
    """Markdown: training recipes with their plans, then configurations for `accelerate launch`."""
    lines = ["| recipe | for | planned on | needed on each GPU | time |", "|---|---|---|---|---|"]
    for path in recipes(training=True):
        header = read_header(path)
        if not header.gpu:
            lines.append(f"| [{path.name}]({path.name}) | {header.what} | a laptop | - | - |")
            continue
        found = planned(path)
        time = "-" if found.hours is None else f"{found.hours:,.0f} h for {found.steps:,} steps"
        needed = f"{found.needed / GIB:.1f} of {found.gpu.memory:g} GiB"
        on = f"{found.layout} ({found.gpu.name})"
        lines.append(f"| [{path.name}]({path.name}) | {header.what} | {on} | {needed} | {time} |")
    lines += ["", "| for `accelerate launch` | what it does | as written |", "|---|---|---|"]
    for path in recipes(training=False):
        lines.append(f"| [{path.name}]({path.name}) | {read_header(path).what} | {read_layout(path)} |")
    return "\n".join(lines) + "\n"
