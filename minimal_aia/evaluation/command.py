"""`minimal-aia evaluate WHAT`: one function a thing to evaluate, and `minimal-aia report`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minimal_aia.evaluation.generation import add_generation
from minimal_aia.profile_command import check_writable, positive

LAB_HELP = """\
Ask lab models questions and let them draw, on scenes that no lab model was trained on:

  minimal-aia evaluate lab lab/unified lab/janus --out scores.csv

A model is a name (lab/unified) or a folder that `python -m minimal_aia.lab.train` wrote. The table has the
columns model, seed, task, metric, group, value, items, low, high, guess: low and high are a 95 % bootstrap
interval over items, guess is what a model gets that guesses as well as it can. The items and the noise of
sampling depend on --seed alone: two models are asked the same."""


def add_evaluate(commands: Any) -> argparse.ArgumentParser:
    """Add the group to the sub-parsers of `minimal-aia`."""
    group: argparse.ArgumentParser = commands.add_parser(
        "evaluate",
        help="score models: the lab's benchmark, and other people's harnesses",
        description="Score models. `minimal-aia evaluate WHAT --help` says more about each.",
    )
    kinds = group.add_subparsers(dest="what", metavar="WHAT", required=True, parser_class=type(group))
    adders: tuple[Callable[[Any], argparse.ArgumentParser], ...] = (add_lab, add_generation)
    for add in adders:
        # SUPPRESS: a sub-parser's default would overwrite a --debug that was given before WHAT.
        add(kinds).add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
    return group


def add_lab(kinds: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = kinds.add_parser(
        "lab",
        help="the lab's own benchmark: answers, yes/no balance, drawings, interleaved check",
        description=LAB_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("models", nargs="+", metavar="MODEL", help="lab/unified, lab/janus, ..., or a lab training folder")
    add("--out", type=Path, metavar="FILE", help="the table, .csv or .parquet (default: only print it)")
    add("--items", type=positive, default=400, metavar="N", help="items a group (default 400)")
    add("--seed", type=int, default=0, help="of the items and of sampling (default 0)")
    command.set_defaults(run=run_lab)
    return command


def run_lab(args: argparse.Namespace) -> int:
    if args.out:
        check_writable(args.out)
    raise ValueError("the lab benchmark is being written")
