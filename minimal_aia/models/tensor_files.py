"""Weights on disk, without ever holding them in memory twice: files are mapped, not read.

Both directions work through plain dictionaries of tensors. A mapped tensor costs no memory until it is used,
and the pages it then takes can be dropped again, so a 14 GB checkpoint is copied in the memory of its largest
tensor. Pickled files are opened with `weights_only=True` only; one that asks for anything but tensors is
refused.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

PICKLED = (".pth", ".pt", ".bin", ".ckpt")
STEMS = ("model", "pytorch_model")  # the names under which folders hold weights, safetensors first
WRAPPERS = ("ema", "module", "state_dict")  # the order in which the authors' trainer looks


def load_tensors(path: Path) -> dict[str, Any]:
    """The tensors of a file or of a checkpoint folder (one file, or shards and their index), mapped.

    Raises ValueError for a pickle that would run code, OSError for a file that is missing, cut short or of no
    known kind.
    """
    if path.is_dir():
        merged: dict[str, Any] = {}
        for file in weight_files(path):
            part = load_tensors(file)
            if twice := sorted(set(part) & set(merged)):
                raise ValueError(f"{file}: holds {twice[0]}, which an earlier shard holds too")
            merged.update(part)
        return merged
    if not path.is_file():
        raise OSError(f"{path}: no such file or folder")
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise OSError(f"{path}: not a complete safetensors file ({error}); get it again") from error
    if path.suffix not in PICKLED:
        raise OSError(f"{path}: neither a folder nor a file of weights (.safetensors, {', '.join(PICKLED)})")
    return _load_pickled(path)


def _load_pickled(path: Path) -> dict[str, Any]:
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        try:
            loaded = torch.load(path, mmap=True, **options)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):  # said of files older than torch 1.6
                raise
            loaded = torch.load(path, **options)
    except pickle.UnpicklingError as error:
        what = re.search(r"GLOBAL ([\w.]+)", str(error))
        named = f" ({what.group(1)})" if what else ""
        raise ValueError(
            f"{path}: refused: this file holds more than tensors{named}, and reading that can run code; ask "
            "its publisher for the bare weights"
        ) from error
    except (RuntimeError, EOFError, KeyError) as error:
        reason = (str(error) or "cut short").splitlines()[0]
        raise OSError(f"{path}: not a complete PyTorch file ({reason}); get it again") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: holds a {type(loaded).__name__}, not a dictionary of tensors")
    return loaded


def unwrap(loaded: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The weights inside `loaded`, and the keys under which there were some; the first is the one taken."""
    wrappers = [key for key in WRAPPERS if isinstance(loaded.get(key), dict)]
    return (loaded[wrappers[0]] if wrappers else loaded), wrappers


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder, in order; OSError if there are none or a shard is missing."""
    for stem, suffix in zip(STEMS, ("safetensors", "bin"), strict=True):
        index = folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            try:
                files = sorted({folder / name for name in read_json(index)["weight_map"].values()})
            except (KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{index}: not an index of shards (no weight_map)") from error
            if gone := [file.name for file in files if not file.is_file()]:
                raise OSError(f"{folder}: {len(gone)} shards are missing: {', '.join(gone)}")
            return files
        if (folder / f"{stem}.{suffix}").is_file():
            return [folder / f"{stem}.{suffix}"]
    raise OSError(
        f"{folder}: no weights here (model.safetensors, pytorch_model.bin, or shards with an index)"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; OSError if there is no such file, ValueError if it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_shards(
    folder: Path, sizes: dict[str, int], tensor: Callable[[str], Tensor], shard_bytes: int
) -> list[str]:
    """Write tensors as model.safetensors, or as shards and their index; returns the files' names.

    sizes: name -> bytes, in the order they are to be written.
    tensor: makes one of them; called shard by shard, so that only one shard need exist at a time.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for file, shard in zip(names, shards, strict=True):
        save_file(_apart({name: tensor(name) for name in shard}), folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = {"total_size": sum(sizes.values())}
        write_json(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": where})
    return names


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, contiguous and no two at one address (tied weights), as the format requires."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensors[name] = tensor.clone() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(tensor.data_ptr())
    return tensors


@contextmanager
def new_path(out: Path, expected_bytes: int = 0) -> Iterator[Path]:
    """A temporary path beside `out` that takes its name when the block ends well and is removed otherwise.

    Raises ValueError if `out` exists already (an empty folder may), OSError if its folder does not, or if the
    disk has too little room for `expected_bytes`.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out}: exists already; give a new name, nothing is overwritten")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise OSError(f"{out}: there is no folder {parent}; create it first")
    if not os.access(parent, os.W_OK):
        raise OSError(f"{out}: no permission to write into {parent}")
    if (free := shutil.disk_usage(parent).free) < expected_bytes:
        raise OSError(f"{out}: needs {expected_bytes / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free")
    part = parent / f".{out.name}.part"
    _remove(part)  # of a run that was killed
    try:
        yield part
        if out.is_dir():
            out.rmdir()
        os.replace(part, out)
    finally:
        _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
