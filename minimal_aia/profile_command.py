"""`minimal-aia profile`: everything that can go wrong is asked before weights are loaded."""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimal_aia.console import a_device, add_command, not_negative, positive

if TYPE_CHECKING:
    from minimal_aia.data import Sample
    from minimal_aia.models.base import Adapter

HELP = """\
Measure the cross-modal intensity (Eq. 1) of a model, layer by layer, over a file of samples. One
teacher-forced forward pass a batch, no attention matrices.

on a laptop, with a model that ships with the course (a minute):

  minimal-aia profile --model lab/unified --task generation \\
      --samples data_samples/generation.jsonl --out profile.csv --plot curve.png

Janus-Pro-7B, both tasks (about 14 GB of weights in bfloat16, a third of that with --load-in-4bit, which also
shifts the numbers). Take the Hugging Face layout; the original deepseek-ai/Janus-Pro-7B is laid out
differently:

  hf download deepseek-community/Janus-Pro-7B --local-dir weights/janus-pro-7b
  minimal-aia profile --model weights/janus-pro-7b --task generation --dtype bfloat16 --batch-size 4 \\
      --samples data_samples/generation.jsonl --out janus_generation.parquet
  minimal-aia profile --model weights/janus-pro-7b --task understanding --dtype bfloat16 --batch-size 4 \\
      --samples data_samples/understanding.jsonl --out janus_understanding.parquet

Qwen3-VL-8B, the paper's reference for understanding, on two GPUs (the samples are split over them):

  accelerate launch --multi_gpu --num_processes 2 -m minimal_aia.cli profile --processes 2 \\
      --model Qwen/Qwen3-VL-8B-Instruct --task understanding --dtype bfloat16 \\
      --samples data_samples/understanding.jsonl --out qwen3vl.parquet --plot qwen3vl.png

The table has one row a layer (0-based), head and sample. Samples that a model cannot take are left out,
counted and named. A killed run goes on where it stopped when the same command is given again. Numbers differ
a little with the precision (about 0.002 between bfloat16 and float32): compare models in the same one."""

PLOTS = (".png", ".svg", ".pdf")


def add_profile(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the sub-parsers of `minimal-aia`."""
    command = add_command(commands, "profile", run, "measure a model's layer curve over samples", HELP)
    add = command.add_argument
    add("--model", required=True, help="lab/unified, lab/janus, ..., a model folder or a hub id")
    add("--task", required=True, choices=["generation", "understanding"])
    add("--samples", required=True, metavar="FILE", help="a .jsonl file, see data_samples/README.md")
    add("--out", metavar="FILE", help="the table: .csv or .parquet (default: only print the curve)")
    add("--plot", metavar="FILE", help="also draw the curve: .png, .svg or .pdf")
    add("--batch-size", type=positive, default=16, metavar="N", help="samples a forward pass (default 16)")
    add("--limit", type=positive, metavar="N", help="use N samples: the first, or with --seed a random N")
    add("--seed", type=not_negative, help="of --limit's choice and of models that draw noise (default 0)")
    add("--draw", action="store_true", help="let the model draw the pictures that prompt-only samples lack")
    add("--skip-bad", action="store_true", help="leave out lines of FILE that cannot be read, and count them")
    add_loading(command)
    return command


def run(args: argparse.Namespace) -> int:
    import minimal_aia as aia

    if args.out:
        from minimal_aia.profile_table import check_suffix

        check_writable(check_suffix(args.out))
    if args.plot:
        if Path(args.plot).suffix not in PLOTS:
            raise ValueError(f"--plot {args.plot}: the suffix must be one of {', '.join(PLOTS)}")
        check_writable(Path(args.plot))
    check_task(args.model, args.family, args.task)
    read = aia.read_samples(args.samples, on_error="skip" if args.skip_bad else "raise")
    samples = choose(read, args.task, args.limit, args.seed)
    if not samples:
        raise ValueError(f"{args.samples}: none of its {len(read)} samples is for {args.task}")
    drawing = {"draw": True, "seed": args.seed or 0} if args.draw else {}
    adapter, first = load(args, **drawing)
    result = aia.profile(
        adapter, samples, args.task, batch_size=args.batch_size, out=args.out, seed=args.seed or 0
    )
    if not first:
        return 0
    if args.plot:
        from minimal_aia.plots import plot_curves

        figure: Any = plot_curves(result).figure
        figure.savefig(args.plot, bbox_inches="tight")
    print(report(result, args.out, args.plot))
    if read.n_skipped:
        print(f"{read.n_skipped} lines of {args.samples} could not be read:", *read.problems[:5], sep="\n  ")
    return 0


def add_loading(command: argparse.ArgumentParser) -> None:
    """The options of commands that load a model and may run as several processes: see `load`."""
    add = command.add_argument
    add("--family", help="the model's family, if its config does not tell")
    add("--device", type=a_device, help="cpu, cuda, cuda:1, mps (default: the GPU if there is one)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the checkpoint's own")
    add("--load-in-4bit", action="store_true", help="quantise while loading (needs a GPU and bitsandbytes)")
    add("--processes", type=positive, metavar="N", help="stop unless N processes were started (see above)")
    add(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that lies beside the weights (some families need it; read it first)",
    )


def load(args: argparse.Namespace, **options: Any) -> tuple[Adapter, bool]:
    """The model that was asked for, on this process' own device -> (adapter, is this the first process?)"""
    from minimal_aia import load_adapter

    device, first = join_processes(args.device, args.processes)
    adapter = load_adapter(
        args.model,
        family=args.family,
        device=device,
        dtype=args.dtype,
        load_in_4bit=args.load_in_4bit,
        trust_remote_code=args.trust_remote_code,
        **options,
    )
    return adapter, first


def report(result: Any, out: str | None, plot: str | None) -> str:
    """What a run found, for the terminal: the summary, the types, the curve if no file keeps it."""

    def show(table: Any) -> str:
        return table.to_string(index=False, float_format="{:.3f}".format)

    lines = [show(result.summary())]
    if result.samples["type"].nunique() > 1:
        lines += ["", show(result.by("type"))]
    if out is None:
        lines += ["", show(result.curve()[["layer", "mean", "std", "uniform"]])]
    if result.skipped:
        lines += ["", f"{len(result.skipped)} samples left out:"]
        lines += [f"  {name}: {reason}" for name, reason in list(result.skipped.items())[:5]]
        lines += ["  ..."] if len(result.skipped) > 5 else []
    lines += ["", *(f"wrote {path}" for path in (out, plot) if path)]
    return "\n".join(lines).rstrip()


def choose(samples: Sequence[Sample], task: str, limit: int | None, seed: int | None) -> list[Sample]:
    """The samples of the task, in order; at most `limit` of them, drawn at random if a seed is given."""
    mine = [sample for sample in samples if sample.task == task]
    if limit is None or limit >= len(mine):
        return mine
    if seed is None:
        return mine[:limit]
    return [mine[i] for i in sorted(random.Random(seed).sample(range(len(mine)), limit))]


def check_writable(path: Path) -> None:
    """An hour of measuring must not end at a missing folder. Raises ValueError; leaves no file behind."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give a file name")
    folder = path.parent
    if not folder.is_dir():
        raise ValueError(f"{path}: there is no folder {folder}; create it first")
    target = path if path.exists() else folder
    if not os.access(target, os.W_OK) or not os.access(folder, os.W_OK):
        raise ValueError(f"{path}: no permission to write here")


def check_task(model: str, family: str | None, task: str) -> None:
    """The task against the model's family, from its config alone. Lab models load at once and say it then."""
    from minimal_aia.models.loading import read_types
    from minimal_aia.models.registry import find_family, is_lab

    if is_lab(model):
        return

    row = find_family(model, read_types(model), family)
    if task not in row.tasks:
        raise ValueError(f"{model}: the {row.name} family does {' and '.join(row.tasks)}, not {task}")


def join_processes(device: str | None, expected: int | None) -> tuple[Any, bool]:
    """Join the process group of torchrun or `accelerate launch` -> (this process' device, is it the first?).

    Raises ValueError when fewer processes came up than asked for.
    """
    check_processes(expected, "minimal_aia.cli profile")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return device, True
    import torch
    from accelerate import PartialState

    cpu = device == "cpu" or not torch.cuda.is_available()
    # The default time-out (10 minutes on GPUs) is shorter than the wait for a slow colleague.
    state = PartialState(cpu=cpu, timeout=timedelta(hours=12))
    if state.num_processes != world:
        raise ValueError(f"{world} processes were asked for, {state.num_processes} came up")
    return state.device, state.is_main_process


def check_processes(expected: int | None, module: str) -> None:
    """ValueError when fewer processes came up than asked for: they would quietly do all the work alone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    # `accelerate launch --cpu --num_processes 2` starts one process. It leaves this trace: its own variables
    # and a rendezvous address, but no rank.
    lone = world == 1 and "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if (lone and "RANK" not in os.environ) or (expected or world) != world:
        raise ValueError(
            f"{expected or 'several'} processes were asked for, {world} came up; start them with"
            f" `torchrun --nproc_per_node N -m {module} ...` or `accelerate launch --multi_gpu"
            " --num_processes N ...` (on a CPU, `accelerate launch --cpu --num_processes N` starts only one)"
        )
