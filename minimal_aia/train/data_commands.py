"""`minimal-aia check-data` and `minimal-aia prepare`: what to do with data before training on them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from minimal_aia.train.recipe import add_options, types

CHECK = """\
Look at every sample that a recipe would train on, through the model's own processor but without its weights:
which are bad and why, how long they are, how much of a batch would be padding. Ends with 1 if any is bad.

  minimal-aia check-data recipes/janus_pro_7b.yaml
  minimal-aia check-data recipes/janus_pro_7b.yaml --quick --out bad.csv

A run with `on_bad_sample: skip` passes over the same samples, one by one, and counts them."""

PREPARE = """\
Encode the pictures of a recipe's data with the model's VQ tokenizer, once, into the folder OUT: for Janus the
target pictures, for Emu3 all. With `codes: OUT` in the recipe, training then reads codes instead of pictures.

  minimal-aia prepare recipes/janus_pro_7b.yaml data/codes
  torchrun --nproc_per_node 8 -m minimal_aia.cli prepare recipes/janus_pro_7b.yaml data/codes

A run that was killed goes on when the same command is given again, and repairs shards that were damaged."""


def add_check_data(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the sub-parsers of `minimal-aia`."""
    command = _command(
        commands, "check-data", "report what is bad in a recipe's data, lengths, padding", CHECK
    )
    add = command.add_argument
    add("--quick", action="store_true", help="read only the headers of pictures; estimate lengths")
    add("--limit", type=_positive, metavar="N", help="look at the first N samples of each task only")
    add("--show", type=int, default=20, metavar="N", help="bad samples to print (default 20)")
    add("--out", metavar="FILE", help="write all bad samples to a .csv file")
    command.set_defaults(run=check)
    return command


def add_prepare(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the sub-parsers of `minimal-aia`."""
    command = _command(commands, "prepare", "encode the pictures of a recipe's data, once", PREPARE)
    add = command.add_argument
    add("out", metavar="OUT", help="folder of the codes")
    add("--batch-size", type=_positive, default=8, metavar="N", help="pictures at once (default 8)")
    add("--shard-size", type=_positive, default=1024, metavar="N", help="samples a file (default 1024)")
    add("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    add("--processes", type=_positive, metavar="N", help="stop unless N processes were started")
    command.set_defaults(run=prepare)
    return command


def _command(commands: Any, name: str, line: str, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=line,
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("recipe", metavar="RECIPE", help="a YAML file; its keys are options too")
    add_options(command)
    return command


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return int(text)


def _config(args: argparse.Namespace) -> Any:
    from minimal_aia.train.recipe import read_recipe

    config = read_recipe(args.recipe, {key: value for key, value in vars(args).items() if key in types()})
    if all(getattr(config, f"{task}_data") == "lab" for task in config.shares()):
        raise ValueError(
            f"{args.recipe}: its data are endless fresh scenes of the lab; there is nothing to do"
        )
    return config


def check(args: argparse.Namespace) -> int:
    from minimal_aia.train.check import check_data
    from minimal_aia.train.data import open_data

    if args.out and (Path(args.out).suffix != ".csv" or not Path(args.out).absolute().parent.is_dir()):
        raise ValueError(f"--out {args.out}: expected a .csv file in a folder that exists")
    config = _config(args)
    report = check_data(open_data(config), args.quick, args.limit, config.dataloader_num_workers)
    print(report.text(args.show))
    if args.out:
        report.bad().to_csv(args.out, index=False)
        print(f"wrote {args.out}")
    return 1 if report.n_bad else 0


def prepare(args: argparse.Namespace) -> int:
    from minimal_aia.profile_command import join_processes

    config = _config(args)
    device, first = join_processes(args.device, args.processes)

    import torch

    from minimal_aia.models import load_adapter
    from minimal_aia.train.open_source import open_source
    from minimal_aia.train.prepare import prepare

    sources = {
        task: open_source(getattr(config, f"{task}_data"), task, config.image_folder)
        for task in config.shares()
    }
    adapter = load_adapter(config.model, device=device, dtype=getattr(torch, config.dtype))
    adapter.set_pictures(config.image_fit, config.image_area)
    index = prepare(adapter, sources, args.out, args.batch_size, args.shard_size, config.on_bad_sample)
    if first:
        for task, made in index["tasks"].items():
            shards = made["shards"]
            pictures, codes = (sum(shard[key] for shard in shards) for key in ("pictures", "codes"))
            skipped = [reason for shard in shards for reason in shard["skipped"].values()]
            print(
                f"{task}: {made['samples']} samples, {pictures} pictures, {codes} codes, {len(shards)} files"
            )
            if skipped:
                print(f"  {len(skipped)} samples left out:", *skipped[:5], sep="\n    ")
        print(f"wrote {args.out}; set `codes: {args.out}` in the recipe")
    return 0
