"""`minimal-aia import-scores`: what other people's scorers found, as one tidy table.

Columns `TABLE`: model, task, metric, group, value, items, harness, version. Values keep the scale that the
benchmark publishes (GenEval 0 to 1, DPG-Bench 0 to 100, lmms-eval each task's own). Items is how many things
the value is a mean over, where the file tells. Scores compare only inside one harness and version, so both
stand in every row.

The formats, as their scorers write them:

geneval   results.jsonl of evaluate_images.py, an object a picture: `filename`, `tag`, `correct`, `metadata`
dpg       dpg-bench_*_results.txt of compute_dpg_bench.py: "path, score, ..., mean" a grid, then the summary
lmms      *_results.json of lmms-eval: {"results": {task: {"metric,filter": value}}, "n-samples": ...}
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimal_aia.console import add_command
from minimal_aia.evaluation.prompts import read_text
from minimal_aia.profile_command import check_writable

if TYPE_CHECKING:
    import pandas as pd

TABLE = ["model", "task", "metric", "group", "value", "items", "harness", "version"]
UNKNOWN = "unknown"


def import_scores(
    path: str | Path, harness: str | None = None, model: str | None = None, version: str | None = None
) -> pd.DataFrame:
    """One result file as a table with the columns `TABLE`.

    harness: "geneval", "dpg" or "lmms"; by default told by the suffix (.jsonl, .txt, .json).
    model: what to call the model (default: what the file says; GenEval's says nothing).
    version: the harness's version or commit (default: what the file says, else "unknown").

    Raises ValueError naming file and line, FileNotFoundError.
    """
    import pandas as pd

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such result file")
    harness = harness or {".jsonl": "geneval", ".txt": "dpg", ".json": "lmms"}.get(path.suffix)
    if harness not in READERS:
        raise ValueError(f"{path}: whose result file is this? Say --harness {', '.join(READERS)}")
    rows, said = READERS[harness](path)
    name = model or said.get("model")
    if not name:
        raise ValueError(f"{path}: {harness}'s result file does not name the model: say --model NAME")
    table = pd.DataFrame(rows, columns=["task", "metric", "group", "value", "items"])
    table.insert(0, "model", name)
    table["items"] = table["items"].astype("Int64")
    table["harness"], table["version"] = harness, version or said.get("version") or UNKNOWN
    return table[TABLE]


Row = tuple[str, str, str, float, int | None]  # task, metric, group, value, items
Found = tuple[list[Row], dict[str, str]]


def read_geneval(path: Path) -> Found:
    """Share of right pictures by tag ("score"); their unweighted mean, GenEval's score, is group "overall".

    Two more shares that are easily taken for it, both group "overall": "images", of all pictures; "prompts",
    of prompts with at least one right picture.
    """
    import pandas as pd

    frame = pd.DataFrame(list(_geneval_lines(path)), columns=["filename", "tag", "correct", "metadata"])
    if frame.empty:
        raise ValueError(f"{path}: the file is empty")
    shares = frame.groupby("tag", sort=False)["correct"].agg(["mean", "size"])
    rows: list[Row] = [("geneval", "score", str(t), float(m), int(n)) for t, m, n in shares.itertuples()]
    any_right = frame.groupby("metadata")["correct"].any()
    rows += [
        ("geneval", "score", "overall", float(shares["mean"].mean()), len(frame)),
        ("geneval", "images", "overall", float(frame["correct"].mean()), len(frame)),
        ("geneval", "prompts", "overall", float(any_right.mean()), len(any_right)),
    ]
    return rows, {}


def _geneval_lines(path: Path) -> Iterator[tuple[str, str, bool, str]]:
    seen: dict[str, int] = {}
    for number, line in _lines(path):
        where = f"{path}:{number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error})") from None
        wanted = {"filename": str, "tag": str, "correct": bool, "metadata": str}
        for key, kind in wanted.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                raise ValueError(
                    f"{where}: no {key!r} of type {kind.__name__}; is this GenEval's results.jsonl?"
                )
        if entry["filename"] in seen:
            raise ValueError(
                f"{where}: {entry['filename']} was scored on line {seen[entry['filename']]} already; were "
                "two runs put together?"
            )
        seen[entry["filename"]] = number
        yield entry["filename"], entry["tag"], entry["correct"], entry["metadata"]


_GRID = re.compile(r"(?P<name>.+\.[A-Za-z]\w*)(?P<scores>(?:, [\d.eE+-]+)+), (?P<mean>[\d.eE+-]+)")


def read_dpg(path: Path) -> Found:
    """DPG-Bench's score (group "overall", items: grids) and categories ("L1 entity", "L2 entity - whole").

    The categories' item counts are not in the file; the scorer takes the last picture of each grid for them.
    """
    means: dict[str, float] = {}
    rows: list[Row] = []
    said: dict[str, str] = {}
    level = ""
    for number, line in _lines(path):
        where = f"{path}:{number}"
        if grid := _GRID.fullmatch(line):
            *scores, mean = (_number(x, where) for x in (*grid["scores"].split(", ")[1:], grid["mean"]))
            if abs(sum(scores) / len(scores) - mean) > 1e-6:
                raise ValueError(f"{where}: the last number is not the mean of those before it")
            if grid["name"] in means:
                raise ValueError(f"{where}: {grid['name']} was scored above already")
            means[grid["name"]] = mean
        elif line.startswith("Model: "):
            said["model"] = line.removeprefix("Model: ").strip()
        elif found := re.fullmatch(r"(L[12]) category scores:", line):
            level = found[1]
        elif line.startswith("\t") and level and ": " in line:
            name, value = line.strip().rsplit(": ", 1)
            rows.append(("dpg", "score", f"{level} {name}", _number(value, where), None))
        elif line.startswith("DPG-Bench score: "):
            score = _number(line.removeprefix("DPG-Bench score: "), where)
            expected = 100 * sum(means.values()) / max(len(means), 1)
            if not means or abs(score - expected) > 1e-4:
                raise ValueError(f"{where}: the score {score} is not that of the {len(means)} grids above it")
            rows.append(("dpg", "score", "overall", score, len(means)))
        elif not line.startswith(("Image path: ", "Save results to: ")):
            raise ValueError(f"{where}: not a line that DPG-Bench's scorer writes: {line[:80]!r}")
    if not rows or rows[-1][2] != "overall":
        raise ValueError(f"{path}: no summary at its end; the scorer has not finished")
    return [rows[-1], *rows[:-1]], said


def read_lmms(path: Path) -> Found:
    """Every number of every task; the group is "overall", or the name of the task's filter of answers."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}:{getattr(error, 'lineno', 1)}: not JSON ({error})") from None
    results = content.get("results") if isinstance(content, dict) else None
    if not isinstance(results, dict) or not all(isinstance(r, dict) for r in results.values()):
        raise ValueError(f"{path}:1: no 'results' by task; is this lmms-eval's *_results.json?")
    counts = content.get("n-samples")
    rows: list[Row] = []
    for task, found in results.items():
        count = counts.get(task) if isinstance(counts, dict) else None
        items = count.get("effective") if isinstance(count, dict) else None
        for key, value in found.items():
            metric, _, kind = key.partition(",")
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and kind and not metric.endswith(("_stderr", "_stderr_clt", "_stderr_clustered")):
                rows.append((task, metric, "overall" if kind == "none" else kind, float(value), items))
    if not rows:
        raise ValueError(f"{path}:1: 'results' holds no number")
    said = {"model": content.get("model_name") or "", "version": content.get("harness_version") or ""}
    return rows, said


READERS: dict[str, Callable[[Path], Found]] = {
    "geneval": read_geneval,
    "dpg": read_dpg,
    "lmms": read_lmms,
}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, without blank ones at the end."""
    text = read_text(path)
    lines = text.rstrip("\n").split("\n") if text.strip() else []
    return iter(enumerate(lines, 1))


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where}: {text!r} is not a number")
    return value


HELP = """\
Read the result files of other people's scorers into one table, .csv or .parquet:

  minimal-aia import-scores results.jsonl --model janus-pro-7b+aia --out scores.csv      # GenEval
  minimal-aia import-scores dpg_images/dpg-bench_*_results.txt --out scores.csv          # DPG-Bench
  minimal-aia import-scores lmms/*/*_results.json --out scores.csv                       # lmms-eval

Columns: model, task, metric, group, value, items, harness, version. Values keep the benchmark's own scale."""


def add_import_scores(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the sub-parsers of `minimal-aia`."""
    summary = "read GenEval's, DPG-Bench's and lmms-eval's result files"
    command = add_command(commands, "import-scores", run, summary, HELP)
    add = command.add_argument
    add("files", nargs="+", metavar="FILE", help="result files")
    add("--model", help="what to call the model (default: what the file says)")
    add("--harness", choices=list(READERS), help="whose files they are (default: by .jsonl, .txt, .json)")
    add("--version", help="the harness's version or commit, to keep with the scores")
    add("--out", type=Path, metavar="FILE", help="the table, .csv or .parquet (default: only print it)")
    return command


def run(args: argparse.Namespace) -> int:
    import pandas as pd

    if args.out:
        check_table(args.out)
    tables = [import_scores(file, args.harness, args.model, args.version) for file in args.files]
    table = pd.concat(tables, ignore_index=True)
    if args.out is None:
        print(table.to_string(index=False))
    else:
        save_table(table, args.out)
    return 0


def check_table(path: Path) -> None:
    """ValueError if no table of scores can be written there."""
    if path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"--out {path}: the suffix must be .csv or .parquet")
    check_writable(path)


def save_table(table: pd.DataFrame, path: Path) -> None:
    if path.suffix == ".csv":
        table.to_csv(path, index=False, float_format="%.9g")
    else:
        table.to_parquet(path, index=False)
    print(f"wrote {len(table)} scores to {path}")
