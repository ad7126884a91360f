"""The command line: `minimal-aia COMMAND`, one function a command.

Every error is one message on stderr and exit code 2; `--debug` shows the traceback instead. Commands import
what they need when they run, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

# Errors that our own code raises to tell the user something: their text is the message.
_EXPECTED = (ValueError, OSError, ImportError, MemoryError)


class _Parser(argparse.ArgumentParser):
    """argparse, but with the error alone on one line: the usage is one `--help` away."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 a check failed, 2 an error."""
    args = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        message = str(error).strip()
        if not isinstance(error, _EXPECTED) or not message:
            message = f"{type(error).__name__}: {message} (a bug? --debug shows where it came from)"
        print(f"minimal-aia {args.command}: error: {message}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    from minimal_aia import __version__

    parser = _Parser(prog="minimal-aia", description="Measure and align cross-modal attention (AIA).")
    parser.add_argument("--version", action="version", version=f"minimal-aia {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for add in (_add_doctor, _add_profile):
        command = add(commands)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


# --- doctor -------------------------------------------------------------------------------------------------


def _add_doctor(commands: argparse._SubParsersAction[_Parser]) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "doctor",
        help="say what this machine has and lacks",
        description="Check Python, packages, torch, data, disk, memory and Jupyter; say how to repair.",
    )
    command.set_defaults(run=_doctor)
    return command


def _doctor(args: argparse.Namespace) -> int:
    from minimal_aia.doctor import checks, report

    results = checks()
    print(report(results))
    return 1 if any(check.state == "FAIL" for check in results) else 0


# --- profile ------------------------------------------------------------------------------------------------

_PROFILE_HELP = """\
Measure the cross-modal intensity (Eq. 1) of a model, layer by layer, over a file of samples.

  minimal-aia profile --model lab/unified --task generation \\
      --samples data_samples/generation.jsonl --out profile.csv

  # a downloaded model, two GPUs, samples split over them
  accelerate launch --num_processes 2 -m minimal_aia.cli profile --model deepseek-community/Janus-Pro-7B \\
      --task understanding --samples data_samples/understanding.jsonl --dtype bfloat16 --out janus.parquet

The table has one row a layer, head and sample. An interrupted run goes on where it stopped when it is started
again with the same --out."""


def _add_profile(commands: argparse._SubParsersAction[_Parser]) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "profile",
        help="measure a model's layer curve over samples",
        description=_PROFILE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--model", required=True, help="lab/unified, lab/janus, ..., a model folder or a hub id")
    add("--task", required=True, choices=["generation", "understanding"])
    add("--samples", required=True, metavar="FILE", help="a .jsonl file, see data_samples/README.md")
    add(
        "--out",
        metavar="FILE",
        help="where to write the table: .csv or .parquet (default: print a summary only)",
    )
    add("--batch-size", type=_positive, default=16, metavar="N", help="samples a forward pass (default 16)")
    add("--family", help="the model's family, if its config does not tell")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the GPU if there is one)")
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="precision (default: the checkpoint's own)",
    )
    add("--skip-bad", action="store_true", help="leave out samples that cannot be read, and count them")
    add(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that lies beside the weights (some families need it; read it first)",
    )
    command.set_defaults(run=_profile)
    return command


def _profile(args: argparse.Namespace) -> int:
    import minimal_aia as aia

    device, first = _join_processes(args.device)  # before a model is loaded: every process has its own device
    samples = aia.read_samples(args.samples, on_error="skip" if args.skip_bad else "raise")
    adapter = aia.load_adapter(
        args.model,
        family=args.family,
        device=device,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
    )
    result = aia.profile(adapter, samples, args.task, batch_size=args.batch_size, out=args.out)
    if not first:
        return 0
    print(result.curve().to_string(float_format="{:.4f}".format))
    print(f"{result.n_samples} samples, {result.n_layers} layers" + (f" -> {args.out}" if args.out else ""))
    if samples.n_skipped:
        print(
            f"{samples.n_skipped} lines of {args.samples} could not be read:",
            *samples.problems[:5],
            sep="\n  ",
        )
    if result.skipped:
        reasons = sorted(set(result.skipped.values()))
        print(f"{len(result.skipped)} samples left out:", *reasons[:5], sep="\n  ")
    return 0


def _join_processes(device: str | None) -> tuple[torch.device | str | None, bool]:
    """-> this process' device, and whether it is the first (torchrun starts several)."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device, True
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    return state.device, state.is_main_process


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
