"""From a recipe's `generation_data` and `understanding_data` to a source."""

from __future__ import annotations

import glob
import importlib.util
from pathlib import Path
from typing import Any

from minimal_aia.train.sources import LineSource, ListSource, Source, StreamSource, TableSource

STREAM_BLOCK = 1000  # samples of a stream that are shuffled together, and held in memory


def open_source(spec: str, task: str, folder: str | Path | None = None, block: int = STREAM_BLOCK) -> Source:
    """The samples that `spec` names (see `minimal_aia.train.sources`), for one task.

    folder: where image paths start; by default the file's own folder. They may not lead out of it.
    ValueError, FileNotFoundError or ImportError, naming the remedy, if there is nothing to read.
    """
    rest = spec.removeprefix("stream:")
    streaming, path = rest != spec, Path(rest)
    root = Path(folder) if folder else (path if path.is_dir() else path.parent)
    if folder and not root.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of images")
    if path.suffix in (".jsonl", ".json"):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such sample file (see data_samples/ for the layout)")
        if streaming:
            raise ValueError(f"{spec}: JSON lines need no streaming, they are read one at a time anyway")
        return (LineSource if path.suffix == ".jsonl" else ListSource)(path, task, root)
    if importlib.util.find_spec("datasets") is None:
        raise ImportError(f'{spec} needs the package datasets: pip install "minimal-aia[train]"')
    table = _open(rest, streaming)
    name = rest.removeprefix("hub:") if rest.startswith("hub:") else path.name
    if streaming:
        return StreamSource(table, name, task, root, block)
    return TableSource(table, name, task, root)


def _open(spec: str, streaming: bool) -> Any:
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would report is in our errors

    def load(*args: Any, **options: Any) -> Any:
        try:
            return datasets.load_dataset(*args, split="train", streaming=streaming, **options)
        except Exception as error:  # missing, gated, offline, damaged: as many classes as causes
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{spec}: the data set could not be read ({first})") from error

    if spec.startswith("hub:"):
        return load(spec.removeprefix("hub:"))
    path = Path(spec)
    if path.is_dir() and not any((path / f).is_file() for f in ("state.json", "dataset_dict.json")):
        spec = str(path / "*.parquet")
    if spec.endswith(".parquet"):
        files = sorted(glob.glob(spec))
        if not files:
            raise FileNotFoundError(f"{spec}: no such parquet file, nor a folder that save_to_disk wrote")
        return load("parquet", data_files=files)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{spec}: no such data: expected a .jsonl or .parquet file, a folder that save_to_disk wrote, or"
            " hub:owner/name"
        )
    try:
        table = datasets.load_from_disk(str(path))
    except Exception as error:
        raise ValueError(f"{spec}: not a complete folder of save_to_disk ({error})") from error
    if isinstance(table, datasets.DatasetDict):
        if "train" not in table:
            raise ValueError(f"{spec}: no split train; give the folder of one of {', '.join(table)}")
        table = table["train"]
    return table.to_iterable_dataset() if streaming else table
