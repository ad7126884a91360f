"""Where training samples come from: the authors' JSON lines, `datasets` folders, parquet files, streams.

All give the same `Sample` objects, one at a time, so that a million of them opens in seconds, without memory:

=====================================  =====================================================================
in a recipe                            read as
=====================================  =====================================================================
``data/train.jsonl`` (or ``.json``)    the layout of `minimal_aia.data`
``data/folder``                        what `datasets.save_to_disk` wrote, or a folder of parquet files
``data/*.parquet``                     parquet files
``hub:owner/name``                     a data set of the hub, downloaded, its split "train"
``stream:...``                         any of the last three without a copy on disk: read from front to back
=====================================  =====================================================================

A row of `datasets` or parquet has the columns `image` (or `images`, `jpg`, `png`, `webp`) and `conversations`
as in JSON lines; or `image` and one of `prompt`, `caption`, `text` (also `txt`), which makes it generation.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from minimal_aia.data import IMAGE, Sample, SampleError, parse_sample
from minimal_aia.pictures import Check, PictureBytes

IMAGES = ("image", "images", "jpg", "png", "webp")
PROMPTS = ("prompt", "caption", "text", "txt")
# The markers of a line, seen without parsing it. Where this errs, a sample turns out to be of the other task.
_IMAGE = re.compile(rb"(<|\\u003[cC])image(>|\\u003[eE])")
_GENERATION = re.compile(rb'"value"\s*:\s*"(\\[nrt]|\s)*(<|\\u003[cC])image(>|\\u003[eE])(\\[nrt]|\s)*"')


class Source:
    """Samples by number. `source[i]` raises SampleError when sample i is bad.

    name: what ids begin with. block: how many samples are shuffled together: all, where that is possible.
    fingerprint: changes when the data do. endless: numbers go on after the last sample, with the first again.
    """

    name: str
    block: int
    fingerprint: str
    endless = False

    def __init__(self, task: str, folder: Path) -> None:
        self.task = task
        self.folder = folder.resolve()  # image paths are relative to it
        self.check: Check = "header"  # what is asked of a picture; "none" if only its codes are needed

    def entry(self, i: int) -> tuple[Any, str]:
        """What `parse_sample` takes: the line or object of sample i, and its id."""
        raise NotImplementedError

    def text_bytes(self, i: int) -> int:
        """About how much text sample i has, in bytes; cheap."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.block

    def count(self) -> int:
        """How many samples there are; a stream must be read for it."""
        return self.block

    def __getitem__(self, i: int) -> Sample:
        entry, where = self.entry(i)
        sample = parse_sample(entry, where, self.folder, self.check)
        if sample.task != self.task:
            raise SampleError(f"{where}: a sample for {sample.task} among those for {self.task}")
        return sample


class LineSource(Source):
    """A `.jsonl` file. Lines that are plainly for the other task are left out."""

    def __init__(self, path: Path, task: str, folder: Path | None = None) -> None:
        super().__init__(task, folder or path.parent)
        self.path, self.name = path, path.name
        digest, position, rows = hashlib.sha256(), 0, []  # rows: (where a line begins, its size, its number)
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                if not line.isspace() and _is_for(task, line):
                    rows.append((position, len(line), number))
                position += len(line)
        self._rows = np.asarray(rows, dtype=np.int64).reshape(-1, 3)
        self.fingerprint, self.block = digest.hexdigest(), len(rows)
        _check_not_empty(self)

    def entry(self, i: int) -> tuple[Any, str]:
        begin, size, number = self._rows[i].tolist()
        with self.path.open("rb") as file:  # opened anew: forked workers would share one file's position
            file.seek(begin)
            line = file.read(size)
        return line.rstrip(b"\n").removeprefix(b"\xef\xbb\xbf"), f"{self.name}:{number}"

    def text_bytes(self, i: int) -> int:
        return int(self._rows[i, 1])


class ListSource(Source):
    """A `.json` file that holds a list of the same objects; kept in memory. Ids count from 1."""

    def __init__(self, path: Path, task: str, folder: Path | None = None) -> None:
        super().__init__(task, folder or path.parent)
        raw, self.path, self.name = path.read_bytes(), path, path.name
        try:
            items = json.loads(raw.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not a JSON file in UTF-8 ({error})") from None
        if not isinstance(items, list):
            raise ValueError(f"{path}: a .json file holds a list; name it .jsonl if it has one object a line")
        texts = [json.dumps(item).encode() for item in items]
        self._rows = [row for row in enumerate(texts, 1) if _is_for(task, row[1])]
        self.fingerprint, self.block = hashlib.sha256(raw).hexdigest(), len(self._rows)
        _check_not_empty(self)

    def entry(self, i: int) -> tuple[Any, str]:
        number, text = self._rows[i]
        return text, f"{self.name}:{number}"

    def text_bytes(self, i: int) -> int:
        return len(self._rows[i][1])


def _is_for(task: str, line: bytes) -> bool:
    """A line without any marker is for both: it is bad, and must be found to be so."""
    generation = _GENERATION.search(line) is not None
    return generation or not _IMAGE.search(line) if task == "generation" else not generation


def _check_not_empty(source: LineSource | ListSource) -> None:
    if not source.block:
        raise ValueError(f"{source.path}: holds no sample for {source.task} (see data_samples/README.md)")


class TableSource(Source):
    """A `datasets.Dataset`: rows by number, memory-mapped."""

    def __init__(self, table: Any, name: str, task: str, folder: Path) -> None:
        super().__init__(task, folder)
        self.name, self.block = name, len(table)
        if not self.block:
            raise ValueError(f"{name}: the data set has no rows")
        self.table = _undecoded(table)
        self.texts = table.select_columns([c for c in table.column_names if c not in IMAGES])
        _check_columns(name, table.column_names)
        files = [(Path(f["filename"]).name, Path(f["filename"]).stat().st_size) for f in table.cache_files]
        facts = [len(table), str(table.features), sorted(files)]
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def entry(self, i: int) -> tuple[Any, str]:
        where = f"{self.name}:{i}"
        return row_entry(self.table[int(i)], where, self.folder), where

    def text_bytes(self, i: int) -> int:
        return len(str(self.texts[int(i)]).encode())


class StreamSource(Source):
    """A `datasets.IterableDataset`, read from front to back, again and again, shuffled in blocks.

    Every process and every data loader worker reads the whole stream and keeps its own part, so one worker is
    best. A resumed run reads up to its place, without decoding pictures; a folder of save_to_disk need not.
    """

    endless = True

    def __init__(self, stream: Any, name: str, task: str, folder: Path, block: int) -> None:
        super().__init__(task, folder)
        self.name, self.block = name, block
        self.stream = _undecoded(stream)
        self.fingerprint = hashlib.sha256(json.dumps([name, block]).encode()).hexdigest()
        self._blocks: dict[int, list[Any]] = {}  # the last two: a length window may lie across a border
        self._rows: Iterator[Any] = iter(())
        self._next = -1  # number of the row that `_rows` gives next
        self._length = 0  # of the stream, once that is known
        _check_columns(name, list(next(iter(self.stream), {})))

    def entry(self, i: int) -> tuple[Any, str]:
        where = f"{self.name}:{i}"
        return row_entry(self._row(i), where, self.folder), where

    def text_bytes(self, i: int) -> int:
        return len(str({k: v for k, v in self._row(i).items() if k not in IMAGES}).encode())

    def count(self) -> int:
        self._length = self._length or sum(1 for _ in self.stream)
        return self._length

    def _row(self, i: int) -> Mapping[str, Any]:
        number, place = divmod(int(i), self.block)
        if number not in self._blocks:
            if self._next != number * self.block:
                self._go_to(number * self.block)
            self._blocks[number] = [self._read() for _ in range(self.block)]
            for old in sorted(self._blocks, key=lambda b: abs(b - number))[2:]:
                del self._blocks[old]
        return self._blocks[number][place]

    def _go_to(self, position: int) -> None:
        place = position % self._length if self._length else position
        self._rows, self._next = iter(self.stream.skip(place)), position
        first = next(self._rows, None)
        if first is None:  # beyond the end, which only reading finds
            self.count()
            self._go_to(position)
        else:
            self._rows = chain([first], self._rows)

    def _read(self) -> Any:
        row = next(self._rows, None)
        if row is None:
            self._rows = iter(self.stream)
            row = next(self._rows)
        self._next += 1
        return row

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": iter(()), "_next": -1, "_blocks": {}}


def row_entry(row: Mapping[str, Any], where: str, folder: Path) -> dict[str, Any]:
    """A row of a table as an object of a sample file, its pictures as `PictureBytes` or paths."""
    found: Any = next((row[c] for c in IMAGES if row.get(c) is not None), [])
    pictures = found if isinstance(found, list) else [found]
    turns = row.get("conversations")
    if isinstance(turns, Mapping):  # how older versions of `datasets` keep a list of objects
        turns = [dict(zip(turns, values)) for values in zip(*turns.values())]
    prompt = next((row[c] for c in PROMPTS if row.get(c) is not None), None)
    if turns is None and prompt is not None:
        turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": IMAGE}]
    images = [_picture(p, f"{where} image {i}", folder) for i, p in enumerate(pictures)]
    labels = {key: row[key] for key in ("type", "source") if isinstance(row.get(key), str)}
    return {"image": images, "conversations": turns, **labels}


def _picture(value: Any, name: str, folder: Path) -> Any:
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return PictureBytes(value["bytes"], value.get("path") or name)
        value = value.get("path")
    if isinstance(value, bytes):
        return PictureBytes(value, name)
    # Whoever made the table may have stored absolute paths: fine, where they lead into the folder.
    return value.removeprefix(f"{folder}/") if isinstance(value, str) else value


def _undecoded(table: Any) -> Any:
    """The same table, giving pictures as they are stored: decoding is for the sample that is used."""
    import datasets

    if isinstance(table, datasets.IterableDataset):
        return table.decode(False) if table.features else table
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            table = table.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return table


def _check_columns(name: str, columns: list[str]) -> None:
    if not set(columns) & {"conversations", *PROMPTS}:
        has = ", ".join(columns) or "none"
        raise ValueError(f"{name}: no column conversations, {', '.join(PROMPTS)} (it has: {has})")
