"""`minimal-aia train RECIPE`: a recipe, what to change in it, and the run."""

from __future__ import annotations

import argparse
from typing import Any

from minimal_aia.train.recipe import add_options, nearest, types

HELP = """\
Fine-tune a unified model on both tasks at once: next-token loss + λ · AIA (Eq. 3). A recipe is a YAML file;
every key of it is also an option here, and options win.

on a laptop, about half a minute:

  minimal-aia train recipes/lab.yaml

the plan, the data and the first batch, before anything is trained or weights are loaded:

  minimal-aia train recipes/janus_pro_7b.yaml --dry-run

several processes:

  torchrun --nproc_per_node 2 -m minimal_aia.train.sft recipes/lab.yaml --num-processes 2
  accelerate launch --config_file recipes/fsdp2.yaml -m minimal_aia.train.sft recipes/janus_pro_7b.yaml

A run that was killed goes on with --resume auto. Afterwards output_dir is a model folder that
`minimal-aia profile --model` and `from_pretrained` read."""


def add_train(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the sub-parsers of `minimal-aia`."""
    command: argparse.ArgumentParser = commands.add_parser(
        "train",
        help="fine-tune a model on both tasks with the AIA loss",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a run of days must not hang on a guess at --max-step
    )
    command.add_argument("recipe", metavar="RECIPE", help="a YAML file, see recipes/")
    command.add_argument(
        "--dry-run", action="store_true", help="show plan, data and first batch; train nothing"
    )
    add_options(command)
    command.set_defaults(run=run)
    _name_the_nearest(command)
    return command


def run(args: argparse.Namespace) -> int:
    from minimal_aia.train import sft
    from minimal_aia.train.recipe import read_recipe

    config = read_recipe(args.recipe, {key: value for key, value in vars(args).items() if key in types()})
    if args.dry_run:
        sft.dry_run(config)
        return 0
    return sft.run(config).stop.exit_code


def _name_the_nearest(command: Any) -> None:
    """An unknown option is an error that names the most similar one."""
    parse = command.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> Any:
        found, rest = parse(args, namespace)
        if rest:
            command.error(f"unknown argument {rest[0]}{nearest(rest[0].split('=')[0])}")
        return found, rest

    command.parse_known_args = parse_known_args
