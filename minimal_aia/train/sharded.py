"""Weights out of sharded checkpoints, without the processes that wrote them: torch's format, and DeepSpeed's.

torch.distributed.checkpoint (FSDP2, accelerate's `pytorch_model_fsdp_0`) keeps tensors in files that torch
reads with `weights_only=True`, and their list in a pickle, `.metadata`. That one is read here by an unpickler
that knows the classes of such a list and nothing else. DeepSpeed's own files are pickles that only DeepSpeed
can read: export only what you trained.
"""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import warnings
from collections.abc import Callable, Iterable
from enum import EnumMeta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

_PATHS = ["PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path", "PurePath"]
_KNOWN = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata TensorProperties "
        "MetadataIndex StorageMeta _MEM_FORMAT_ENCODING"
    ).split(),
    "torch.distributed.checkpoint.filesystem": ["_StorageInfo"],
    "torch.serialization": ["_get_layout"],
    "torch": ["Size"],
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
    "collections": ["OrderedDict"],
}


def _member(kind: Any, name: str) -> Any:
    """How pickles of Python 3.11.0 to 3.11.3 name a member of an enumeration; nothing else is got."""
    if isinstance(kind, EnumMeta):
        return kind[name]
    raise pickle.UnpicklingError(f"getattr({kind!r}, {name!r})")


class _ListOfTensors(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


class _Reader(FileSystemReader):
    """torch's reader, but for the list of tensors."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata: Metadata = _ListOfTensors(file).load()
            if not isinstance(metadata, Metadata):
                raise ValueError(f"{path}: holds a {type(metadata).__name__}")
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path}: refused: it holds more than a list of tensors ({error})") from error
        except (EOFError, AttributeError, TypeError, IndexError) as error:
            raise OSError(f"{path}: not a complete list of tensors; the checkpoint is damaged") from error
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def find_dcp(folder: Path) -> Path | None:
    """The torch.distributed.checkpoint folder that is `folder` or lies in it, or None."""
    names = ("", "pytorch_model_fsdp_0", "model")
    return next((folder / name for name in names if (folder / name / ".metadata").is_file()), None)


def dcp_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of a torch.distributed.checkpoint folder, optimizer states among them."""
    entries = _Reader(folder).read_metadata().state_dict_metadata
    return {k: tuple(v.size) for k, v in entries.items() if isinstance(v, TensorStorageMetadata)}


def load_dcp(folder: Path, names: Iterable[str], cast: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Read tensors one by one, each put together from all shards and cast as soon as it is there.

    Raises OSError if a shard is missing or cut short.
    """
    entries = _Reader(folder).read_metadata().state_dict_metadata
    found: dict[str, Tensor] = {}
    for name in names:
        entry: Any = entries[name]
        one = {name: torch.empty(entry.size, dtype=entry.properties.dtype)}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*the intent is to load in a single process")
                load(one, storage_reader=_Reader(folder), no_dist=True)
        except CheckpointException as error:  # whatever happens; not even an Exception
            raise OSError(f"{folder}: a shard is missing or damaged ({_first_cause(error)})") from error
        found[name] = cast(one[name])
    return found


def _first_cause(error: BaseException) -> str:
    failures = getattr(error, "failures", None)
    inner = next(iter(failures.values()))[0] if failures else error
    lines = str(inner).strip().splitlines()
    return f"{type(inner).__name__}: {lines[0][:200] if lines else ''}"


def is_deepspeed(folder: Path) -> bool:
    return any(folder.glob("global_step*/*model_states.pt"))


def load_deepspeed(folder: Path) -> dict[str, Tensor]:
    """All weights of a ZeRO checkpoint, float32, by DeepSpeed's own utility; ImportError without it."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ImportError(f"{folder}: a DeepSpeed checkpoint; to read it: pip install deepspeed")
    utility = importlib.import_module("deepspeed.utils.zero_to_fp32")
    try:
        found = utility.get_fp32_state_dict_from_zero_checkpoint(str(folder))
    except (RuntimeError, ValueError, KeyError, EOFError, FileNotFoundError) as error:
        raise OSError(f"{folder}: DeepSpeed cannot put its shards together ({error})") from error
    return dict(found)
