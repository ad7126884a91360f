"""`minimal-aia plan RECIPE`: memory and time, before anyone rents a GPU."""

from __future__ import annotations

import argparse
import json
from typing import Any

from minimal_aia.console import add_command, not_negative, number, positive
from minimal_aia.train.layout import GPUS, MFU, SHARDINGS, Layout
from minimal_aia.train.recipe import add_options, recipe_of

HELP = """\
Say what a training run will take: memory on each GPU part by part, whether it fits, what to change if not
(each change planned again), time, disk. Needs no GPU, no weights and no network: shapes of Janus-Pro-1B,
Janus-Pro-7B and Emu3 are built in, others are read from a folder or its config.json. A recipe's keys are
options here too.

  minimal-aia plan recipes/janus_pro_7b.yaml --accelerate recipes/fsdp2.yaml
  minimal-aia plan recipes/emu3_8b.yaml --world-size 64 --sharding hsdp --gpu h800
  minimal-aia plan recipes/janus_pro_1b_lora_24gb.yaml --gpu 16GB --max-length 1024

Several values, separated by commas, give one line a combination:

  minimal-aia plan recipes/janus_pro_7b.yaml --world-size 8,16,64 --sharding fsdp2,zero3 --gpu h100,h200

The figures are formulas; minimal_aia/train/plan.py has their assumptions. For small models on a CPU the
memory is within 10 % of the tensors that PyTorch allocated (benchmarks/results/plan_check.json); no GPU has
confirmed it, nor the time. Exit code 1: it does not fit."""

LENGTHS = {
    "prompt": "of a generation prompt",
    "question": "of the questions of a sample, all turns together",
    "answer": "of its answers",
}


def add_plan(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the sub-parsers of `minimal-aia`."""
    summary = "memory and time of a training run, before it is started"
    command = add_command(commands, "plan", run, summary, HELP, abbreviations=False)
    add = command.add_argument
    add("recipe", nargs="?", metavar="RECIPE", help="a YAML file, see recipes/")
    add("--accelerate", metavar="FILE", help="take processes and sharding from this accelerate configuration")
    add("--world-size", metavar="N", help="processes, one a GPU (default: of --accelerate, or 1)")
    add("--sharding", metavar="HOW", help=f"{', '.join(SHARDINGS)} (default: none, or ddp for several)")
    add("--shard-size", type=positive, metavar="N", help="hsdp: GPUs that hold one copy together (default 8)")
    add("--gpu", default="h100", help=f"{', '.join(GPUS)}, or a memory such as 24GB (default h100)")
    add("--mfu", type=number, default=MFU, help=f"share of the GPU's peak that is reached (default {MFU})")
    for name, what in LENGTHS.items():
        add(f"--{name}-tokens", dest=name, type=not_negative, metavar="N", help=f"usual length {what}")
    add("--json", action="store_true", help="print everything as JSON: bytes and seconds")
    add("--table", action="store_true", help="print the Markdown table of recipes/README.md (no RECIPE)")
    add_options(command)
    return command


def run(args: argparse.Namespace) -> int:
    from minimal_aia.train.plan import Lengths, plan
    from minimal_aia.train.plan_report import short_table, table, text, values
    from minimal_aia.train.remedies import remedies

    if args.table:
        print(table(), end="")
        return 0
    if args.recipe is None:
        raise ValueError("give a recipe, or --table")
    config = recipe_of(args)
    layouts = layouts_of(args.accelerate, args.world_size, args.sharding, args.shard_size)
    gpus = [name.strip() for name in args.gpu.split(",")]
    lengths = Lengths(**{name: n for name in LENGTHS if (n := getattr(args, name)) is not None})
    options: dict[str, Any] = {"mfu": args.mfu, "lengths": lengths}
    plans = [plan(config, layout, gpu, **options) for layout in layouts for gpu in gpus]
    if len(plans) > 1:
        print(json.dumps([values(found) for found in plans], indent=1) if args.json else short_table(plans))
        return 0
    (found,) = plans
    changes = remedies(config, layouts[0], gpus[0], **options)
    shown = values(found, changes) if args.json else text(found, changes, config.save_total_limit)
    print(json.dumps(shown, indent=1) if args.json else shown)
    return 0 if found.fits else 1


def layouts_of(
    accelerate: str | None, worlds: str | None, shardings: str | None, shard: int | None = None
) -> list[Layout]:
    """Every combination of what the options name. ValueError for what does not go together."""
    from minimal_aia.train.layout import read_layout

    sizes = [_size(size) for size in worlds.split(",")] if worlds else [None]
    if accelerate:
        if shardings:
            raise ValueError("--accelerate and --sharding both say how the model is shared: give one")
        return [read_layout(accelerate, size) for size in sizes]
    found = []
    for size in sizes:
        usual = "none" if (size or 1) == 1 else "ddp"
        for sharding in (shardings or usual).split(","):
            found.append(Layout.of(sharding.strip(), size or 1, shard))
    return found


def _size(text: str) -> int:
    if not text.strip().isdecimal() or not 1 <= int(text) <= 10**6:
        raise ValueError(
            f"--world-size {text.strip()!r}: expected whole numbers from 1 to 1000000, like 8,64"
        )
    return int(text)
