"""`minimal-aia sweep FILES`: run grids of lab fine-tunings, then write one table and one report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from minimal_aia.console import a_device, not_negative, positive


def add_sweep(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "sweep",
        help="run a grid of lab fine-tunings (arm x seed) and compare the arms",
        description="Run every arm and seed of the given sweep files; runs that are done are skipped, so a "
        "killed sweep goes on. Writes OUT/metrics.csv, OUT/curves.csv, OUT/log.csv and OUT/report.md.",
    )
    command.add_argument("files", nargs="+", type=Path, metavar="FILE", help="recipes/ablations/*.yaml")
    command.add_argument(
        "--jobs", type=positive, default=1, help="runs at a time, one thread each (default 1)"
    )
    command.add_argument("--device", type=a_device, default="cpu", help="cpu (default), cuda, cuda:1, mps")
    command.add_argument("--runs", type=Path, default=Path("runs/sweep"), help="where runs are kept")
    command.add_argument("--out", type=Path, default=Path("runs/sweep-report"), help="tables and report")
    command.add_argument("--seeds", type=not_negative, nargs="+", help="only these seeds of the files' seeds")
    command.add_argument("--report-only", action="store_true", help="no new runs: table and report only")
    command.set_defaults(run=_sweep)
    return command


def _sweep(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from minimal_aia.lab import sweep, sweep_report

    sweeps = [sweep.read_sweep(path) for path in args.files]
    if args.seeds:
        wanted = set(args.seeds)
        sweeps = [replace(s, runs=tuple(r for r in s.runs if r.config.seed in wanted)) for s in sweeps]
        if not any(s.runs for s in sweeps):
            raise ValueError(f"--seeds {' '.join(map(str, args.seeds))}: no file asks for these seeds")
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.report_only:
        sweep.run_all(sweeps, args.runs, args.jobs, args.device)
    for name in ("metrics", "curves", "log"):
        table = sweep.table(sweeps, args.runs, name)
        if name == "log":
            table = table[table["step"] % 10 == 0]
        table.to_csv(args.out / f"{name}.csv", index=False, float_format="%.6g")
        if name == "metrics":
            sweep_report.write(sweeps, table, args.out / "report.md")
    done, asked = len(list(sweep.results(sweeps, args.runs))), sum(len(s.runs) for s in sweeps)
    print(f"{done} of {asked} runs; table and report in {args.out}")
    return 0 if done == asked else 1
