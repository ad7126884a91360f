"""`minimal-aia bench`: run the scripts of `benchmarks/`, then print their JSON files as one table."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from minimal_aia.console import a_device

FOLDER = Path(__file__).parents[1] / "benchmarks"
# name -> options that make it short on a CPU; `benchmarks/NAME.py --help` has all of them
SCRIPTS: dict[str, list[str]] = {
    "training_step": [],
    "attention_lengths": [],
    "intensity_methods": ["--repeats", "3"],
    "profile_speed": ["--repeats", "1"],
    "import_time": [],
}
TARGETS = [  # what, target, how to read it from the files
    ("training step with AIA over plain SFT, time", "≤ 1.10", ("training_step", "time_over_sft", "aia")),
    ("the same, peak memory", "≤ 1.05", ("training_step", "memory_over_sft", "aia")),
    ("attention matrices kept (eager) over plain SFT, time", "", ("training_step", "time_over_sft", "eager")),
    ("the same, peak memory", "", ("training_step", "memory_over_sft", "eager")),
    ("growth of AIA's memory with length, exponent", "1", ("attention_lengths", "aia_memory_exponent")),
    ("profiling over decoding token by token, processor time", "≥ 50", ("profile_speed", "ratio", "cpu_s")),
    ("`import minimal_aia` beyond `import torch`, seconds", "≤ 0.3", ("import_time", "added_cpu_s")),
]  # fmt: skip
QUOTIENTS = [  # what, target, file, section, above, below
    ("the released recipe's way over ours, time", "≥ 5", "time_over_sft"),
    ("the same, peak memory", "≥ 4", "memory_over_sft"),
]


def add_bench(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="measure cost beside the alternatives; print the table",
        description="Run the scripts of benchmarks/ (a clone of the repository is needed), each with its "
        "sides alternating in one process, and print their figures beside the targets. CPU sizes take a "
        "quarter of an hour on one core.",
    )
    command.add_argument("--only", nargs="+", choices=SCRIPTS, default=list(SCRIPTS), help="these scripts")
    command.add_argument("--table", action="store_true", help="print the table of stored files, run nothing")
    command.add_argument(
        "--device",
        type=a_device,
        default="cpu",
        help="cpu, or cuda: the training step at Janus-Pro-1B's shape in bf16",
    )
    command.set_defaults(run=_bench)
    return command


def _bench(args: argparse.Namespace) -> int:
    if not FOLDER.is_dir():
        raise FileNotFoundError("no benchmarks/ beside the package: run this in a clone of the repository")
    if args.device != "cpu":
        _on_gpu(args.device)
    elif not args.table:
        for name in args.only:
            print(f"== {name}", flush=True)
            subprocess.run(
                [sys.executable, str(FOLDER / f"{name}.py"), *SCRIPTS[name]], check=True, cwd=FOLDER
            )
    print(table())
    return 0


def _on_gpu(device: str) -> None:
    for shape in ("janus-pro-1b", "janus-pro-7b"):
        out = FOLDER / "results" / f"training_step_{shape}.json"
        options = ["--device", device, "--shape", shape, "--dtype", "bfloat16", "--out", str(out)]
        # 7B in bf16 with gradients and its eager side may not fit: the smaller shape's file is kept then
        command = [sys.executable, str(FOLDER / "training_step.py"), *options]
        subprocess.run(command, check=shape.endswith("1b"), cwd=FOLDER)


def table(folder: Path | None = None) -> str:
    """The figures in the JSON files beside their targets, as Markdown; "not measured" where a file lacks."""
    folder = folder or FOLDER / "results"
    rows = [(what, target, _read(folder, *where)) for what, target, where in TARGETS]
    for what, target, section in QUOTIENTS:
        above, below = (_read(folder, "training_step", section, side) for side in ("authors-recipe", "aia"))
        rows.append((what, target, None if above is None or below is None else above / below))
    for shape in ("janus-pro-1b", "janus-pro-7b"):
        value = _read(folder, f"training_step_{shape}", "time_over_sft", "aia")
        rows.append((f"training step with AIA over plain SFT on a GPU, {shape}, time", "≤ 1.03", value))
    lines = ["| what | target | measured |", "|---|---|---|"]
    for what, target, value in rows:
        lines.append(f"| {what} | {target} | {'not measured' if value is None else f'{value:.2f}'} |")
    return "\n".join(lines)


def _read(folder: Path, name: str, *keys: str) -> float | None:
    file = folder / f"{name}.json"
    if not file.is_file():
        return None
    value = json.loads(file.read_text())
    for key in keys:
        value = value[key]
    return float(value)
