"""Turn the pictures of a recipe's data into image codes, once, instead of in every epoch.

For Janus the target pictures, for Emu3 all pictures. The work is cut into shards: when the same command is
given again, a killed run goes on with those that are missing; several processes share them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minimal_aia.data import Sample, SampleError
from minimal_aia.models.base import Adapter
from minimal_aia.pictures import PictureCodes
from minimal_aia.profiles import barrier, rank_and_world
from minimal_aia.resume import PartFile
from minimal_aia.train.checkpoints import write_whole
from minimal_aia.train.codes import FORMAT, INDEX, damage, facts, read_index, vq_fingerprint, write_shard
from minimal_aia.train.sources import Source


def prepare(
    adapter: Adapter,
    sources: Mapping[str, Source],
    out: str | Path,
    batch_size: int = 8,
    shard_size: int = 1024,
    on_bad_sample: str = "skip",
    progress: bool = True,
) -> dict[str, Any]:
    """Write the codes of all pictures of `sources`, by task, into the folder `out`. Returns its index.

    Under torch.distributed every process does its part of the shards and all return the same.

    Raises:
        ValueError: a model without codes; a stream; an `out` made from other data or with another model.
        SampleError: a bad sample. With on_bad_sample "skip" it is left out instead, and listed in the index.
    """
    out = Path(out)
    sources = {task: source for task, source in sources.items() if task in adapter.coded_tasks}
    if not sources:
        raise ValueError(f"{adapter.name}: the {adapter.family} family reads no image codes for these tasks")
    for source in sources.values():
        if source.endless:
            raise ValueError(f"{source.name}: a stream has no end; prepare needs data that can be numbered")
    made = {
        "format": FORMAT,
        "model": adapter.name,
        "vq": vq_fingerprint(adapter),
        "facts": facts(adapter),
        "tasks": {
            t: {"source": s.name, "fingerprint": s.fingerprint, "samples": len(s), "shard_size": shard_size}
            for t, s in sources.items()
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    rank, world = rank_and_world()
    parts = PartFile(out / INDEX, rank)
    key = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()
    shards = [(task, k) for task, s in sources.items() for k in range(-(-len(s) // shard_size))]
    done = _done(out, made, parts, key, shards)
    done = {n: entry for n, entry in done.items() if not damage(out / entry["file"], entry["sha256"])}
    barrier()  # every process has read before any writes
    todo = [n for n in range(len(shards)) if n not in done]
    if todo:
        parts.start(key)
    bar = tqdm(todo[rank::world], desc="shards", disable=not progress or rank > 0)
    for n in bar:
        task, k = shards[n]
        codes, skipped = _encode(adapter, sources[task], task, k, shard_size, batch_size, on_bad_sample)
        entry = write_shard(out / f"{task}-{k:05d}.safetensors", codes)
        parts.append({"batch": n, **entry, "skipped": skipped})
    barrier()
    if todo:
        done |= {n: _entry(record) for n, record in parts.read(key).items() if n in todo}
        for task in sources:
            mine = [done[n] for n, (other, _) in enumerate(shards) if other == task]
            made["tasks"][task]["shards"] = mine  # type: ignore[index]
        if rank == 0:
            write_whole(out / INDEX, json.dumps(made, indent=1))
            parts.remove()
        barrier()
    return read_index(out)


def _done(
    out: Path, made: dict[str, Any], parts: PartFile, key: str, shards: Sequence[tuple[str, int]]
) -> dict[int, dict[str, Any]]:
    """Shards by number that an earlier run finished, from its index or its part files."""
    if not (out / INDEX).exists():
        return {n: _entry(record) for n, record in parts.read(key).items()}
    index = read_index(out)
    plain = {t: {k: v for k, v in task.items() if k != "shards"} for t, task in index["tasks"].items()}
    if {**index, "tasks": plain} != made:
        raise ValueError(f"{out}: codes of other data, another model or shard size; choose a new folder")
    finished = {n: index["tasks"][task]["shards"][k] for n, (task, k) in enumerate(shards)}
    return finished | {n: _entry(record) for n, record in parts.read(key).items()}


def _entry(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "batch"}


def _encode(
    adapter: Adapter, source: Source, task: str, k: int, shard_size: int, batch_size: int, on_bad: str
) -> tuple[list[Sequence[PictureCodes]], dict[str, str]]:
    """The codes of one shard's samples, and why some have none."""
    numbers = range(k * shard_size, min((k + 1) * shard_size, len(source)))
    codes: dict[int, Sequence[PictureCodes]] = {}
    skipped: dict[str, str] = {}

    def bad(number: int, reason: str) -> None:
        if on_bad != "skip":
            raise SampleError(f"{reason} (on_bad_sample: skip goes on without it)", (reason,))
        skipped[str(number)] = reason

    def good() -> Iterator[tuple[int, Sample]]:
        for number in numbers:
            try:
                sample = source[number]
            except SampleError as error:
                bad(number, str(error))
                continue
            if (why := adapter.why_not(sample, task)) is not None:
                bad(number, f"{sample.id}: {why}")
            else:
                yield number, sample

    found = list(good())
    for i in range(0, len(found), batch_size):
        some = found[i : i + batch_size]
        try:
            codes |= zip([n for n, _ in some], adapter.encode_pictures([s for _, s in some]), strict=True)
        except (ValueError, OSError):
            for number, sample in some:  # which of them?
                try:
                    codes[number] = adapter.encode_pictures([sample])[0]
                except (ValueError, OSError) as error:
                    bad(number, f"{sample.id}: {error}")
    return [codes.get(number, ()) for number in numbers], skipped
