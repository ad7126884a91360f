"""`minimal-aia train | check-data | prepare | export`: the commands around a run but for `plan`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from minimal_aia.console import a_device, add_command, not_negative, positive
from minimal_aia.profile_command import join_processes
from minimal_aia.train.config import TrainConfig
from minimal_aia.train.recipe import add_options, recipe_of

TRAIN = """\
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

EXPORT = """\
Turn a training checkpoint into one folder that `from_pretrained` and every command here read. A run that
ended by itself has done this already (its output_dir is the folder); this is for one that was stopped, and
for checkpoints of other trainers:

  minimal-aia export runs/janus-pro-7b weights/tuned                     the newest whole checkpoint of a run
  minimal-aia export runs/janus-pro-7b/checkpoint-500 weights/tuned --dtype bfloat16
  minimal-aia export elsewhere/checkpoint-500 weights/tuned --base weights/janus-pro-7b

It reads plain and FSDP checkpoints (torch.distributed.checkpoint, accelerate), LoRA adapters (merged; needs
peft) and DeepSpeed ZeRO (needs DeepSpeed, gives float32: add --dtype)."""


def add_train(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the sub-parsers of `minimal-aia`."""
    command = add_command(
        commands,
        "train",
        train,
        "fine-tune a model on both tasks with the AIA loss",
        TRAIN,
        abbreviations=False,
    )
    command.add_argument("recipe", metavar="RECIPE", help="a YAML file, see recipes/")
    command.add_argument(
        "--dry-run", action="store_true", help="show plan, data and first batch; train nothing"
    )
    add_options(command)
    return command


def add_check_data(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the sub-parsers of `minimal-aia`."""
    line = "report what is bad in a recipe's data, lengths, padding"
    command = add_command(commands, "check-data", check, line, CHECK, abbreviations=False)
    add = command.add_argument
    add("recipe", metavar="RECIPE", help="a YAML file; its keys are options too")
    add("--quick", action="store_true", help="read only the headers of pictures; estimate lengths")
    add("--limit", type=positive, metavar="N", help="look at the first N samples of each task only")
    add("--show", type=not_negative, default=20, metavar="N", help="bad samples to print (default 20)")
    add("--out", metavar="FILE", help="write all bad samples to a .csv file")
    add_options(command)
    return command


def add_prepare(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the sub-parsers of `minimal-aia`."""
    command = add_command(
        commands,
        "prepare",
        prepare,
        "encode the pictures of a recipe's data, once",
        PREPARE,
        abbreviations=False,
    )
    add = command.add_argument
    add("recipe", metavar="RECIPE", help="a YAML file; its keys are options too")
    add("out", metavar="OUT", help="folder of the codes")
    add("--batch-size", type=positive, default=8, metavar="N", help="pictures at once (default 8)")
    add("--shard-size", type=positive, default=1024, metavar="N", help="samples a file (default 1024)")
    add("--device", type=a_device, help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    add("--processes", type=positive, metavar="N", help="stop unless N processes were started")
    add_options(command)
    return command


def add_export(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the sub-parsers of `minimal-aia`."""
    command = add_command(
        commands,
        "export",
        export,
        "make a model folder of a training checkpoint",
        EXPORT,
        abbreviations=False,
    )
    add = command.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a checkpoint's folder, or a run's")
    add("out", metavar="OUT", help="a new folder")
    add("--base", metavar="MODEL", help="the model that was trained (default: what the checkpoint says)")
    add("--dtype", choices=["bfloat16", "float16", "float32"], help="default: every tensor keeps its own")
    return command


def _config_with_data(args: argparse.Namespace) -> TrainConfig:
    config = recipe_of(args)
    if all(getattr(config, f"{task}_data") == "lab" for task in config.shares()):
        raise ValueError(f"{args.recipe}: its data are endless scenes of the lab; there is nothing to do")
    return config


def train(args: argparse.Namespace) -> int:
    from minimal_aia.train import sft

    config = recipe_of(args)
    if args.dry_run:
        sft.dry_run(config)
        return 0
    return sft.run(config).stop.exit_code


def check(args: argparse.Namespace) -> int:
    from minimal_aia.train.check import check_data
    from minimal_aia.train.data import open_data

    if args.out and (Path(args.out).suffix != ".csv" or not Path(args.out).absolute().parent.is_dir()):
        raise ValueError(f"--out {args.out}: expected a .csv file in a folder that exists")
    config = _config_with_data(args)
    report = check_data(open_data(config), args.quick, args.limit, config.dataloader_num_workers)
    print(report.text(args.show))
    if args.out:
        report.bad().to_csv(args.out, index=False)
        print(f"wrote {args.out}")
    return 1 if report.n_bad else 0


def prepare(args: argparse.Namespace) -> int:
    if Path(args.out).is_file():
        raise ValueError(f"{args.out}: is a file; give a folder")
    config = _config_with_data(args)
    device, first = join_processes(args.device, args.processes)

    from minimal_aia.train.data import data_adapter
    from minimal_aia.train.open_source import open_source
    from minimal_aia.train.prepare import prepare

    sources = {t: open_source(getattr(config, f"{t}_data"), t, config.image_folder) for t in config.shares()}
    adapter = data_adapter(config, device)
    index = prepare(adapter, sources, args.out, args.batch_size, args.shard_size, config.on_bad_sample)
    if not first:
        return 0
    for task, made in index["tasks"].items():
        shards = made["shards"]
        pictures, codes = (sum(shard[key] for shard in shards) for key in ("pictures", "codes"))
        skipped = [reason for shard in shards for reason in shard["skipped"].values()]
        print(f"{task}: {made['samples']} samples, {pictures} pictures, {codes} codes, {len(shards)} files")
        if skipped:
            print(f"  {len(skipped)} samples left out:", *skipped[:5], sep="\n    ")
    print(f"wrote {args.out}; set `codes: {args.out}` in the recipe")
    return 0


def export(args: argparse.Namespace) -> int:
    from minimal_aia.train.export import export

    done = export(args.checkpoint, args.out, args.base, args.dtype)
    print(f"wrote {done.out}: {done.n_tensors} tensors, {done.n_bytes / 1e9:.3g} GB ({done.kind} checkpoint)")
    for note in done.notes:
        print(f"note: {note}")
    return 0
