"""`minimal-aia evaluate WHAT`: one function a thing to evaluate, and `minimal-aia report`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minimal_aia.console import add_command, not_negative, positive
from minimal_aia.evaluation.generation import add_generation
from minimal_aia.evaluation.imported import check_table, save_table
from minimal_aia.evaluation.understanding import add_understanding
from minimal_aia.profile_command import check_writable

LAB_HELP = """\
Ask lab models questions and let them draw, on scenes that no lab model was trained on:

  minimal-aia evaluate lab lab/unified lab/janus --out scores.csv

A model is a name (lab/unified) or a folder that `python -m minimal_aia.lab.train` or `minimal-aia train`
wrote. The table has the columns model, seed, task, metric, group, value, items, low, high; low and high are a
95 % bootstrap interval over items. Three more "models" say what the scores mean: two guessers (one never sees
the picture, one sees everything but not what belongs together) and perfect drawings, which the tokenizer and
the detector misread now and then. Items and the noise of sampling depend on --seed and --items alone: two
models are asked the same. With 400 items a group it takes a minute or two of processor time a model."""

REPORT_HELP = """\
Evaluate runs side by side and write one page: scores with intervals, paired differences to the first run,
layer curves, the same prompts drawn by each, recipes and versions.

  minimal-aia report runs/train/plain runs/train/aia --out report.html
  minimal-aia report lab/unified lab/janus --items 100 --out report.md

RUN is a lab model (lab/unified) or the folder of a run; a run of another model family is shown without the
lab's scores. Put the run to compare with first. --scores adds tables that `minimal-aia import-scores` or
`minimal-aia evaluate lab` wrote. An .html page is a single file; an .md page has its pictures in a folder
beside it."""


def add_evaluate(commands: Any) -> argparse.ArgumentParser:
    """Add the group to the sub-parsers of `minimal-aia`."""
    group: argparse.ArgumentParser = commands.add_parser(
        "evaluate",
        help="score models: the lab's benchmark, and other people's harnesses",
        description="Score models. `minimal-aia evaluate WHAT --help` says more about each.",
    )
    kinds = group.add_subparsers(dest="what", metavar="WHAT", required=True, parser_class=type(group))
    adders: list[Callable[[Any], argparse.ArgumentParser]] = [add_lab, add_generation, add_understanding]
    for add in adders:
        # SUPPRESS: a sub-parser's default would overwrite a --debug that was given before WHAT.
        add(kinds).add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
    return group


def add_lab(kinds: Any) -> argparse.ArgumentParser:
    summary = "the lab's own benchmark: answers, yes/no balance, drawings, interleaved check"
    command = add_command(kinds, "lab", run_lab, summary, LAB_HELP)
    add = command.add_argument
    add("models", nargs="+", metavar="MODEL", help="lab/unified, lab/janus, ..., or a lab training folder")
    add("--out", type=Path, metavar="FILE", help="the table, .csv or .parquet (default: only print it)")
    add("--items", type=positive, default=400, metavar="N", help="items a group (default 400)")
    add("--seed", type=not_negative, default=0, help="of the items and of sampling (default 0)")
    return command


def run_lab(args: argparse.Namespace) -> int:
    if args.out:
        check_table(args.out)
    for model in args.models:
        if args.models.count(model) > 1:
            raise ValueError(f"{model} is given twice: it would count as two models in the table")
    import pandas as pd
    from tqdm import tqdm

    from minimal_aia.evaluation.interleaved import everything
    from minimal_aia.evaluation.lab_benchmark import ground_truth, guesser
    from minimal_aia.evaluation.scores import scores, side_by_side
    from minimal_aia.evaluation.subjects import lab_subject

    # All are loaded first: a wrong name is found before anything is measured.
    subjects = [lab_subject(model) for model in args.models]
    asked = (args.items, args.seed)
    frames = [everything(subject, *asked) for subject in tqdm(subjects, desc="evaluate", unit="model")]
    frames += [guesser(kind, *asked) for kind in ("blind", "unbound")]
    frames += [ground_truth(codebook, *asked) for codebook in (None, subjects[0].codebook)]
    table = pd.concat([scores(frame) for frame in frames], ignore_index=True)
    print(side_by_side(table).to_string(index=False))
    if args.out:
        save_table(table, args.out)
    return 0


def add_report(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the sub-parsers of `minimal-aia`."""
    summary = "one page about runs: scores, differences, curves, drawings, recipes"
    command = add_command(commands, "report", run_report, summary, REPORT_HELP)
    add = command.add_argument
    add("runs", nargs="+", metavar="RUN", help="lab models or folders of runs; the first is compared with")
    add("--out", type=Path, required=True, metavar="FILE", help="the page, .html or .md")
    add("--items", type=positive, default=400, metavar="N", help="items a group (default 400)")
    add("--samples", type=positive, default=6, metavar="N", help="prompts drawn side by side (default 6)")
    add("--seed", type=not_negative, default=0, help="of the items and of sampling (default 0)")
    add("--scores", type=Path, nargs="+", default=[], metavar="FILE", help="score tables, .csv or .parquet")
    return command


def run_report(args: argparse.Namespace) -> int:
    if args.out.suffix not in (".html", ".md"):
        raise ValueError(f"--out {args.out}: the suffix must be .html or .md")
    check_writable(args.out)
    from minimal_aia.evaluation.report import report

    report(args.runs, args.items, args.samples, args.seed, args.scores).write(args.out)
    print(f"wrote {args.out}")
    return 0
