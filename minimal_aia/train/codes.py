"""Image codes on disk: made once by `minimal-aia prepare`, read instead of pictures in every epoch.

A folder holds `index.json` and shards: shard k of a task has the codes of samples k·size to (k+1)·size of
that task's source, as safetensors:

    codes   [N]       all codes one after the other, less the `base` in the index; uint16 where they fit
    starts  [P + 1]   where the codes of each picture begin
    sizes   [P, 2]    height and width of each picture, in codes
    first   [size+1]  number of the first picture of each sample; samples that were left out have none

A shard is checked against its SHA-256 when a process first opens it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minimal_aia.models.base import Adapter
from minimal_aia.pictures import PictureCodes
from minimal_aia.train.checkpoints import is_disk_full
from minimal_aia.train.sources import Source

INDEX = "index.json"
FORMAT = 1
# What a configuration says besides the tokenizer's shape.
NOT_VQ = ("_name_or_path", "architectures", "dtype", "transformers_version")


class CodeStore:
    """Reads a folder of codes. ValueError if it is damaged, or was made for other pictures or another model.

    Args:
        folder: what `minimal-aia prepare` wrote.
        adapter: the model that is to read the codes.
    """

    def __init__(self, folder: str | Path, adapter: Adapter) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        differ = [key for key, value in facts(adapter).items() if self.index["facts"].get(key) != value]
        if differ:
            raise self._unfit(f"made with another {' and '.join(differ)}")
        self._shards: dict[tuple[str, int], _Shard] = {}

    def check_source(self, task: str, source: Source) -> None:
        """ValueError unless the codes were made from these very samples."""
        made = self.index["tasks"].get(task)
        if made is None:
            raise self._unfit(f"not for {task}")
        if made["fingerprint"] != source.fingerprint:
            raise self._unfit(f"made from other data than {source.name} is now")

    def check_model(self, adapter: Adapter) -> None:
        """ValueError if the codes come from another VQ tokenizer than the model has. Needs its weights."""
        if self.index["vq"] != vq_fingerprint(adapter):
            raise self._unfit(f"from another VQ tokenizer than {adapter.name}'s")

    def _unfit(self, why: str) -> ValueError:
        return ValueError(f"{self.folder}: codes {why}; run `minimal-aia prepare` into a new folder")

    def pictures(self, task: str, i: int) -> tuple[PictureCodes, ...]:
        """The codes of a sample's pictures; none if the sample was left out."""
        shard, place = self._shard(task, i)
        return tuple(shard.picture(n) for n in range(*shard.first[place : place + 2]))

    def length(self, task: str, i: int) -> int:
        """How many codes that is."""
        shard, place = self._shard(task, i)
        begin, end = shard.first[place : place + 2]
        return int(shard.starts[end] - shard.starts[begin])

    def _shard(self, task: str, i: int) -> tuple[_Shard, int]:
        made = self.index["tasks"][task]
        number, place = divmod(i, made["shard_size"])
        if (task, number) not in self._shards:
            self._shards[task, number] = _Shard(self.folder, made["shards"][number])
        return self._shards[task, number], place

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}  # open files do not travel to another process


class _Shard:
    def __init__(self, folder: Path, entry: Mapping[str, Any]) -> None:
        path = folder / entry["file"]
        if why := damage(path, entry["sha256"]):
            raise ValueError(f"{path}: {why}; run the same `minimal-aia prepare` again to repair it")
        self.file = safe_open(path, framework="np")
        self.name, self.base = path.name, entry["base"]
        self.first, self.starts, self.sizes = (self.file.get_tensor(n) for n in ("first", "starts", "sizes"))

    def picture(self, n: int) -> PictureCodes:
        begin, end = self.starts[n : n + 2].tolist()
        codes = self.file.get_slice("codes")[begin:end].astype(np.int64) + self.base
        height, width = self.sizes[n].tolist()
        return PictureCodes(torch.from_numpy(codes), height, width, f"{self.name}:{n}")


def write_shard(path: Path, samples: Sequence[Sequence[PictureCodes]]) -> dict[str, Any]:
    """Write a shard, whole or not at all. Returns its entry for the index."""
    pictures = [picture for sample in samples for picture in sample]
    codes = np.concatenate([np.zeros(0, np.int64), *(picture.codes.numpy() for picture in pictures)])
    base = int(codes.min()) if len(codes) else 0
    fits = len(codes) == 0 or int(codes.max()) - base < 2**16
    tensors = {
        "codes": (codes - base).astype(np.uint16 if fits else np.int64),
        "starts": np.cumsum([0, *(len(picture.codes) for picture in pictures)], dtype=np.int64),
        "sizes": np.asarray([[p.height, p.width] for p in pictures], dtype=np.int64).reshape(-1, 2),
        "first": np.cumsum([0, *map(len, samples)], dtype=np.int64),
    }
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, aside)
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        if is_disk_full(error):
            raise OSError(f"{path}: the disk is full; make room and run the same command again") from error
        raise
    return {"file": path.name, "sha256": digest, "base": base, "pictures": len(pictures), "codes": len(codes)}


def damage(path: Path, sha256: str) -> str:
    """What is wrong with a shard; empty if nothing is."""
    if not path.is_file():
        return "the file is missing"
    with path.open("rb") as file:
        same = hashlib.file_digest(file, "sha256").hexdigest() == sha256
    return "" if same else "the file is damaged (its SHA-256 is not the one in the index)"


def read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(f"{folder}: no finished image codes ({INDEX} is missing); run `minimal-aia prepare`")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(f"format {index['format']}")
        return dict(index)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not an index of image codes that this version reads ({error})") from None


def facts(adapter: Adapter) -> dict[str, Any]:
    """What decides codes besides data and weights: how pictures are brought to size, and the precision."""
    images: Any = getattr(adapter, "processor", None)
    settings = json.loads(images.image_processor.to_json_string()) if images is not None else {}
    vq = json.loads(adapter.model.config.vq_config.to_json_string(use_diff=False))
    return {
        "picture processing": {**settings, "fit": getattr(adapter, "image_fit", None)},
        "dtype": str(adapter.dtype).removeprefix("torch."),
        "VQ configuration": {key: value for key, value in vq.items() if key not in NOT_VQ},
    }


def vq_fingerprint(adapter: Adapter) -> str:
    """Hash of the VQ tokenizer's weights."""
    from minimal_aia.resume import fingerprint

    return fingerprint(adapter.model.model.vqmodel, {})
