"""The table of recipes/README.md, from the recipes themselves: what each is for, its command, its plan.

A recipe opens with comments. Their first sentence says what it is for; indented lines are commands; the line
that begins with `Memory:` holds what `plan` says, for the GPU it names.
"""

from __future__ import annotations

import argparse
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimal_aia.train.layout import GIB, Layout, read_layout
from minimal_aia.train.plan import Plan, plan
from minimal_aia.train.recipe import add_options, read_recipe

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
