"""`minimal-aia convert`: original Janus checkpoints to Hugging Face's layout, and back."""

from __future__ import annotations

import argparse
from typing import Any

from minimal_aia.console import add_command, number

HELP = """\
Turn an original Janus or Janus-Pro checkpoint into a Hugging Face folder, or back. Files are mapped, not
read: memory stays small whatever their size. Nothing is guessed; if a tensor is missing, superfluous or of
another shape than the configuration says, all of them are listed and nothing is written.

DeepSeek's own folder:

  hf download deepseek-ai/Janus-Pro-7B --local-dir weights/original
  minimal-aia convert weights/original weights/janus-pro-7b

The checkpoint of the AIA authors, a file of weights without a configuration; their scripts load it into
Janus-Pro-7B:

  minimal-aia convert aia.pth weights/aia-7b --config weights/janus-pro-7b

Back, for a harness that needs DeepSeek's code (a folder) or the authors' scripts (a .pth file). After
training, the tensors that only the original layout has are taken from --leftovers:

  minimal-aia convert weights/janus-pro-7b weights/again --to-original
  minimal-aia convert runs/my-model my-model.pth --to-original --leftovers weights/original"""


def add_convert(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the sub-parsers of `minimal-aia`."""
    summary = "original Janus checkpoints to Hugging Face's layout, and back"
    command = add_command(commands, "convert", run, summary, HELP)
    add = command.add_argument
    add("source", metavar="SRC", help="a folder, or a file with a state dict (.pth, .safetensors)")
    add("out", metavar="OUT", help="a new folder; with --to-original also a new .pth file")
    add("--config", metavar="PATH", help="Hugging Face folder or config.json with the model's sizes")
    add("--to-original", action="store_true", help="SRC is a Hugging Face folder; write DeepSeek's layout")
    add("--leftovers", metavar="PATH", help="with --to-original: where the tensors only the original has are")
    add("--shard-size", type=_gigabytes, default=4 * 10**9, metavar="GB", help="of a weight file (default 4)")
    return command


def run(args: argparse.Namespace) -> int:
    if args.to_original and args.config:
        raise ValueError("--config does not go with --to-original: a Hugging Face folder has a configuration")
    if args.leftovers and not args.to_original:
        raise ValueError("--leftovers goes with --to-original")
    from minimal_aia.models.convert import convert, convert_back

    if args.to_original:
        done = convert_back(args.source, args.out, args.leftovers, args.shard_size)
    else:
        done = convert(args.source, args.out, args.config, args.shard_size)
    files = done.files[0] if len(done.files) == 1 else f"{len(done.files)} files"
    print(f"wrote {done.out}: {done.n_tensors} tensors, {done.n_bytes / 1e9:.3g} GB in {files}")
    for note in done.notes:
        print(f"note: {note}")
    return 0


def _gigabytes(text: str) -> int:
    return max(1, int(number(text, above=True) * 1e9))
