"""Loading from Hugging Face layout, with one clear error for each thing that is usually missing."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from minimal_aia.models.base import AdapterError

GIB = 2**30
# `model_type` of checkpoints in their authors' own layout, and where the Hugging Face layout of the same
# model is.
ORIGINAL_LAYOUTS = {
    "multi_modality": "deepseek-community/Janus-Pro-1B (or -7B), or convert it with `minimal-aia convert`",
    "Emu3": "BAAI/Emu3-Chat-hf or BAAI/Emu3-Gen-hf",
    "internvl_chat": "the checkpoints named InternVL3-*-hf",
}


def read_types(name: str) -> list[str]:
    """What a model's config says it is: `_class_name` of model_index.json, or `model_type` and architectures.

    name: a folder, or a hub id "owner/model". AdapterError if it is neither, or has no readable config.
    """
    path = config_file(name)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        types = [config.get("_class_name"), config.get("model_type"), *(config.get("architectures") or ())]
    except (ValueError, AttributeError, TypeError) as error:
        raise AdapterError(f"{path}: not a JSON config ({first_line(error)})") from error
    return [str(t) for t in types if t]


def config_file(name: str) -> Path:
    """Where model_index.json or config.json of a folder or hub id lies (downloaded if need be)."""
    names = ("model_index.json", "config.json")
    folder = Path(name).expanduser()
    if folder.is_dir():
        for file in names:
            if (folder / file).is_file():
                return folder / file
        raise AdapterError(
            f"{name}: the folder has neither model_index.json nor config.json; is it a checkpoint?"
        )
    if folder.is_file():
        raise AdapterError(f"{name}: no such folder, it is a file; give the folder that it lies in")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise AdapterError(f"{name}: no such folder (hub models are owner/model, the course's are lab/NAME)")
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    for file in names:
        cached = try_to_load_from_cache(name, file)  # first, for it needs no network
        if isinstance(cached, str):
            return Path(cached)
    reason: Exception | None = None
    for file in names:
        try:
            return Path(hf_hub_download(name, file))
        except LocalEntryNotFoundError as error:  # half a minute of trying: the other file would take as long
            raise AdapterError(
                f"{name}: no such folder here, not downloaded before, and the hub cannot be reached; "
                "check the spelling and the connection, or download the weights first"
            ) from error
        except Exception as error:  # the hub's many ways to say no: not found, gated
            reason = error
    raise AdapterError(
        f"{name}: no such folder here, and the hub gave no config ({type(reason).__name__}); "
        "check the spelling, or log in if the model is gated"
    ) from reason


def require(package: str, name: str) -> None:
    """AdapterError with the install command when `package` is not installed."""
    if importlib.util.find_spec(package) is None:
        raise AdapterError(
            f"{name} needs the package {package}, which is not installed: pip install {package}"
        )


@contextmanager
def authors_code(name: str, code: str | Path | None, module: str, repository: str) -> Iterator[Any]:
    """The authors' `module`, imported from a checkout of their repository; only after the user's consent.

    code: the checkout's folder; None if the module is already importable. Its folder is on sys.path inside
    the context only. AdapterError, naming the repository, if the module is not there.
    """
    if code is not None and not Path(code).expanduser().is_dir():
        raise AdapterError(f"{name}: code={str(code)!r} is no folder; give a checkout of {repository}")
    before = list(sys.path)
    if code is not None:
        sys.path.insert(0, str(Path(code).expanduser()))
    try:
        yield importlib.import_module(module)
    except ImportError as error:
        raise AdapterError(
            f"{name} needs its authors' code ({error}): check out {repository}, install what it asks for and "
            "pass code=<that folder>"
        ) from error
    finally:
        sys.path[:] = before


def default_device() -> str:
    """The GPU if there is one (under torchrun, this process's own), else the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def first_line(error: BaseException) -> str:
    """An error of another library, short enough to stand inside ours."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def display_name(name: str) -> str:
    """What tables call a model: a folder's own name, or the whole hub id."""
    folder = Path(name).expanduser()
    return folder.resolve().name if folder.is_dir() else name


def own_settings(cls: type, options: dict[str, Any]) -> dict[str, Any]:
    """Take out of `options` what an adapter's constructor wants; the rest is for loading its model."""
    return {key: options.pop(key) for key in inspect.signature(cls).parameters if key in options}


def weight_bytes(folder: Path, dtype: torch.dtype | None, in_4bit: bool = False) -> int:
    """Bytes the weights of a folder take once loaded, read from the safetensors headers alone.

    AdapterError if the folder has no safetensors file, or only pickled weights.
    """
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for pattern in ("*.bin", "*.pth", "*.pt") for p in folder.glob(pattern))
        hint = (
            f"; {pickled[0]} is a pickle file, which can run code: convert it to safetensors first"
            if pickled
            else "; download the model's *.safetensors files into it"
        )
        raise AdapterError(f"{folder}: the folder holds no weights (*.safetensors){hint}")
    total = 0.0
    for file in files:
        for entry in _safetensors_header(file).values():
            begin, end = entry["data_offsets"]
            stored = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}.get(entry["dtype"])
            wanted = 0.56 if in_4bit else (dtype.itemsize if dtype else stored)
            total += (end - begin) * (wanted / stored if stored and wanted else 1)
    return int(total)


def _safetensors_header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if not 0 < size <= file.stat().st_size:
            raise AdapterError(f"{file}: not a complete safetensors file; download it again")
        header: dict[str, Any] = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return header


def free_bytes(device: torch.device | None) -> int:
    """Free memory on `device`; None means everything: all GPUs and main memory."""
    import psutil

    gpus = range(torch.cuda.device_count())
    if device is None:
        return psutil.virtual_memory().available + sum(torch.cuda.mem_get_info(i)[0] for i in gpus)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def check_memory(
    name: str, dtype: torch.dtype | None, device: torch.device | None, in_4bit: bool = False
) -> None:
    """AdapterError if a folder's weights are missing or do not fit; a hub id is not checked (its size is
    unknown)."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return
    need, free = weight_bytes(folder, dtype, in_4bit), free_bytes(device)
    if need > free:
        where = device if device is not None else "all devices together"
        raise AdapterError(
            f"{name}: too little memory: the weights take {need / GIB:.1f} GiB and {free / GIB:.1f} GiB are "
            f"free on {where}. Try dtype=torch.bfloat16, load_in_4bit=True, device_map='auto', or a smaller "
            "model"
        )


def load_model(
    name: str,
    model_class: Any,
    *,
    device: Any = None,
    dtype: torch.dtype | None = None,
    device_map: Any = None,
    load_in_4bit: bool = False,
    **options: Any,
) -> Any:
    """`model_class.from_pretrained` in eval mode, after the checks of this file.

    device "meta": the same model without weights, from its config alone, to make batches with.
    """
    device = device or default_device()
    if torch.device(device).type == "meta":
        from accelerate import init_empty_weights

        config = model_class.config_class.from_pretrained(name)
        with init_empty_weights(include_buffers=False):  # (buffers that no file holds are needed by sharding)
            model = model_class._from_config(config, dtype=dtype or config.dtype or torch.float32)
        model.tie_weights()  # each weight became two on its way to meta
        return model.eval()
    check_memory(name, dtype, None if device_map else torch.device(device), load_in_4bit)
    if load_in_4bit:
        require("bitsandbytes", f"{name} with load_in_4bit=True")
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype or torch.bfloat16
        )
        device_map = device_map or {"": device}
    if device_map is not None:
        options["device_map"] = device_map
    try:
        model, info = model_class.from_pretrained(
            name, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True, **options
        )
    except torch.OutOfMemoryError as error:
        raise AdapterError(f"{name}: too little memory while loading it on {device_map or device}") from error
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{name}: its weights could not be read ({first_line(error)}); download them again"
        ) from error
    if missing := sorted(info["missing_keys"]):  # the library would go on with random numbers
        raise AdapterError(
            f"{name}: {len(missing)} of the model's weights are not in the folder, first {missing[0]}; "
            "download it again, or it is another model than its config says"
        )
    if device_map is None:
        model.to(device)
    return model.eval()


def images_only(processor_class: Any) -> Any:
    """The processor class without its video part, which insists on torchvision: stills are enough here."""

    class ImagesOnly(processor_class):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [part for part in super().get_attributes() if "video" not in part]

    ImagesOnly.__name__ = ImagesOnly.__qualname__ = processor_class.__name__
    return ImagesOnly


def load_tokenizer(name: str) -> Any:
    """The tokenizer beside the weights; AdapterError if there is none."""
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if folder.is_dir() and not any((folder / file).is_file() for file in files):
        # The library would go on with an empty vocabulary.
        raise AdapterError(f"{name}: no usable tokenizer beside the weights (none of {', '.join(files)})")
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{name}: no usable tokenizer beside the weights ({first_line(error)})") from error


def load_processor(name: str, model_type: str | None) -> Any:
    """A processor of text and still images, with the PIL image processor (torchvision is never required).

    model_type: tells the processor's class; None for the one that the folder names.
    """
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    try:
        settings, _ = transformers.ProcessorMixin.get_processor_dict(name)
        named = PROCESSOR_MAPPING_NAMES[model_type] if model_type else settings.get("processor_class")
        processor_class = getattr(transformers, str(named), None)
        if processor_class is None:
            return transformers.AutoProcessor.from_pretrained(name)
        images = transformers.AutoImageProcessor.from_pretrained(name, backend="pil")
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{name}: no usable image processor beside the weights ({first_line(error)})"
        ) from error
    cls = images_only(processor_class)
    settings.pop("video_processor", None)
    parts = {"image_processor": images, "tokenizer": load_tokenizer(name)}
    return cls.from_args_and_dict([parts[part] for part in cls.get_attributes()], settings)
