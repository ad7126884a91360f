"""`minimal-aia evaluate understanding`: the paper's understanding benchmarks through lmms-eval."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimal_aia.console import add_command, nearest, positive
from minimal_aia.profile_command import add_loading, check_task, load

if TYPE_CHECKING:
    import pandas as pd

    from minimal_aia.models.base import Adapter

# The paper's benchmarks -> lmms-eval's tasks. MMBench is scored by circular evaluation: right only if right
# in every rotation of the options that the data holds. This variant reads the letter from the answer by rules
# alone; the other (mmbench_en_dev) asks an LLM about answers it cannot read, and guesses if none replies.
TASKS = {
    "mme": "mme",
    "pope": "pope",
    "mmmu": "mmmu_val",
    "mmbench-en": "mmbench_en_dev_static",
    "mmvp": "mmvp",
    "mm-vet": "mmvet",
}
JUDGED = {"mmvet"}  # an LLM grades every answer

HELP = """\
Ask a model the questions of understanding benchmarks, through lmms-eval's own evaluator:

  minimal-aia evaluate understanding --model weights/janus-pro-7b --dtype bfloat16 \\
      --tasks mme,pope --limit 8 --out lmms/janus-pro-7b

Tasks of the paper: mme, pope, mmmu (validation split), mmbench-en (dev, circular), mmvp, mm-vet. Any other
name is lmms-eval's own (lmms-eval tasks list), or a task of yours: --include FOLDER with its .yaml files.

It needs lmms-eval: pip install "minimal-aia[eval]", which brings torchvision and some sixty packages. Data
comes from the Hugging Face hub, which wants a login (hf auth login). Several GPUs share the questions:

  accelerate launch --multi_gpu --num_processes 8 -m minimal_aia.cli evaluate understanding --processes 8 ...

Before you compare: mm-vet's answers are graded by an LLM (OPENAI_API_KEY; MODEL_VERSION names it), whose
version changes the scores. mme needs an even --limit, because questions come in pairs. pope counts an answer
only if it is exactly yes or no, and its pope_yes_ratio is that of the true answers, not of the model's. A
score with --limit is a test of the pipeline, not of the model."""


def manifest() -> Any:
    """What lmms-eval finds at the entry point `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="minimal_aia", chat_class_path="minimal_aia.evaluation.lmms_plugin.MinimalAIA"
    )


def evaluate_understanding(
    adapter: Adapter,
    tasks: Sequence[str],
    *,
    out: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    include: str | Path | None = None,
) -> pd.DataFrame | None:
    """Scores of a model on benchmarks: a table with the columns of `minimal_aia.evaluation.imported.TABLE`.

    tasks: names of `TASKS`, of lmms-eval, or of .yaml files in the folder `include`.
    out: a folder for `results.json` (as lmms-eval gives it), `samples_<task>.jsonl` (every answer) and
        `scores.csv` (the table).
    limit: only the first so many questions of each task.

    Under `accelerate launch` the processes share the questions; the first one returns the table, others None.
    Raises ImportError without lmms-eval; ValueError for an unknown task, an odd limit for MME or a judge that
    cannot be asked; OSError for data that cannot be had.
    """
    check_tasks(tasks, limit)
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from minimal_aia.evaluation.lmms_plugin import MinimalAIA
    from minimal_aia.models.loading import first_line

    manager = TaskManager("ERROR", include_path=str(include) if include else None, model_name="minimal_aia")
    names = [TASKS.get(task, task) for task in tasks]
    for name in names:
        if name not in manager.all_tasks:
            hint = nearest(name, [*TASKS, *manager.all_tasks])
            raise ValueError(f"lmms-eval {version('lmms-eval')} has no task {name!r}{hint}")
    try:
        results = simple_evaluate(
            model=MinimalAIA(adapter=adapter, batch_size=batch_size),
            tasks=names,
            limit=limit,
            batch_size=batch_size,
            device=str(adapter.device),
            task_manager=manager,
            bootstrap_iters=0,  # every answer is kept: intervals can be made from them
            # Some tasks write files of their own; pictures are not needed to score answers.
            cli_args=argparse.Namespace(
                output_path=None if out is None else str(out), process_with_media=False
            ),
        )
    except Exception as error:
        attempt = getattr(error, "last_attempt", None)  # it tries several times to get a task's data
        if attempt is None:
            raise
        raise OSError(
            f"the data of {', '.join(names)} could not be loaded ({first_line(attempt.exception())}); it "
            "comes from the Hugging Face hub: connect, and log in with `hf auth login`"
        ) from error
    if results is None:
        return None
    # The harness puts the commit of whatever repository it is started in where its version should stand.
    results |= {"model_name": adapter.name, "harness_version": version("lmms-eval")}
    return _write(results, Path(out) if out else None)


def _write(results: dict[str, Any], out: Path | None) -> pd.DataFrame:
    """Keep results and answers in `out`, and make the table from what was kept."""
    import tempfile

    from minimal_aia.evaluation.imported import import_scores

    samples = results.pop("samples", {})
    with tempfile.TemporaryDirectory() as nowhere:
        folder = out or Path(nowhere)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=2, default=_plain, ensure_ascii=False)
        (folder / "results.json").write_text(text + "\n", encoding="utf-8")
        for task, rows in samples.items():
            lines = [json.dumps(row, default=_plain, ensure_ascii=False) + "\n" for row in rows]
            (folder / f"samples_{task}.jsonl").write_text("".join(lines), encoding="utf-8")
        table = import_scores(folder / "results.json")
        table.to_csv(folder / "scores.csv", index=False)
    return table


def _plain(value: Any) -> Any:
    """numpy numbers as numbers, anything else (functions of a task's YAML) as its name."""
    return value.item() if hasattr(value, "item") else getattr(value, "__name__", str(value))


def check_tasks(tasks: Sequence[str], limit: int | None) -> None:
    """What can be known before a model is loaded. ImportError, ValueError."""
    names = {TASKS.get(task, task) for task in tasks}
    if not names or "" in names:
        raise ValueError(f"no task given; the paper's are {', '.join(TASKS)}")
    if "mme" in names and limit is not None and limit % 2:
        raise ValueError(f"MME asks two questions a picture and scores pairs: --limit {limit} must be even")
    if (
        names & JUDGED
        and os.environ.get("API_TYPE", "openai") == "openai"
        and not os.environ.get("OPENAI_API_KEY")
    ):
        raise ValueError(
            "MM-Vet's answers are graded by an LLM, over the network and for money: set OPENAI_API_KEY and "
            "MODEL_VERSION (the grader, to be reported with the score), or leave mm-vet out"
        )
    if importlib.util.find_spec("lmms_eval") is None:
        raise ImportError(
            'lmms-eval is not installed: pip install "minimal-aia[eval]", or without torchvision and what '
            "its other models need: pip install --no-deps -r tests/evaluation/requirements.txt"
        )


def add_understanding(kinds: Any) -> argparse.ArgumentParser:
    """Add `evaluate understanding`."""
    summary = "MME, POPE, MMMU, MMBench, MMVP, MM-Vet and others through lmms-eval"
    command = add_command(kinds, "understanding", run, summary, HELP)
    add = command.add_argument
    add(
        "--model",
        required=True,
        help="a model folder or hub id; lab/unified, ... for tasks of lab words",
    )
    add("--tasks", required=True, metavar="A,B", help=f"of the paper: {', '.join(TASKS)}")
    add("--limit", type=positive, metavar="N", help="only the first N questions of each task")
    add("--out", type=Path, metavar="FOLDER", help="keep results, answers and scores (default: print scores)")
    add("--batch-size", type=positive, default=8, metavar="N", help="questions at a time (default 8)")
    add("--include", type=Path, metavar="FOLDER", help="a folder with tasks of your own, .yaml")
    add_loading(command)
    return command


def run(args: argparse.Namespace) -> int:
    if args.out and args.out.is_file():
        raise ValueError(f"{args.out}: is a file; give a folder")
    if args.include and not args.include.is_dir():
        raise ValueError(f"--include {args.include}: no such folder")
    tasks = [task.strip() for task in args.tasks.split(",")]
    check_tasks(tasks, args.limit)
    check_task(args.model, args.family, "understanding")
    adapter, _ = load(args)
    table = evaluate_understanding(
        adapter, tasks, out=args.out, limit=args.limit, batch_size=args.batch_size, include=args.include
    )
    if table is not None:
        print(table.to_string(index=False))
        if args.out:
            print(f"wrote results.json, scores.csv and every answer to {args.out}")
    return 0
