"""`minimal-aia export`: a training checkpoint becomes a model folder."""

from __future__ import annotations

import argparse
from typing import Any

HELP = """\
Turn a training checkpoint into one folder that `from_pretrained` and every command here read. A run that
ended by itself has done this already (its output_dir is the folder); this is for one that was stopped, and
for checkpoints of other trainers:

  minimal-aia export runs/janus-pro-7b weights/tuned                     the newest whole checkpoint of a run
  minimal-aia export runs/janus-pro-7b/checkpoint-500 weights/tuned --dtype bfloat16
  minimal-aia export elsewhere/checkpoint-500 weights/tuned --base weights/janus-pro-7b

It reads plain and FSDP checkpoints (torch.distributed.checkpoint, accelerate), LoRA adapters (merged; needs
peft) and DeepSpeed ZeRO (needs DeepSpeed, gives float32: add --dtype)."""


def add_export(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the sub-parsers of `minimal-aia`."""
    command: argparse.ArgumentParser = commands.add_parser(
        "export",
        help="make a model folder of a training checkpoint",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a checkpoint's folder, or a run's")
    add("out", metavar="OUT", help="a new folder")
    add("--base", metavar="MODEL", help="the model that was trained (default: what the checkpoint says)")
    add("--dtype", choices=["bfloat16", "float16", "float32"], help="default: every tensor keeps its own")
    command.set_defaults(run=run)
    return command


def run(args: argparse.Namespace) -> int:
    from minimal_aia.train.export import export

    done = export(args.checkpoint, args.out, args.base, args.dtype)
    print(f"wrote {done.out}: {done.n_tensors} tensors, {done.n_bytes / 1e9:.2f} GB ({done.kind} checkpoint)")
    for note in done.notes:
        print(f"note: {note}")
    return 0
