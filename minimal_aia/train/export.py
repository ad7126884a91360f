"""A training checkpoint -> one folder that `load_adapter`, `from_pretrained` and `generate` read.

A finished run has exported itself; this is for the checkpoint of a run that was stopped, and for checkpoints
that other trainers wrote. What it reads:

==============================  ==========================================================================
in the folder                   written by
==============================  ==========================================================================
config.json, model*             `Trainer` in one process or DDP, `save_pretrained`
model*, pytorch_model*          the same for a module around the model (names with a prefix)
trained.safetensors             this library's LoRA runs
adapter_config.json             peft
pytorch_model_fsdp_0/.metadata  accelerate with FSDP; or .metadata itself: torch.distributed.checkpoint
global_step*/                   DeepSpeed ZeRO-1 to 3 (put together by DeepSpeed's own utility, in float32)
==============================  ==========================================================================
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from minimal_aia.models.convert_keys import require_fit
from minimal_aia.models.tensor_files import load_tensors, new_path, read_json, unwrap
from minimal_aia.train import checkpoints as ck
from minimal_aia.train import sharded
from minimal_aia.train.config import TrainConfig
from minimal_aia.train.module import TRAINED, SFTModule
from minimal_aia.train.parts import merged, untie

_PEFT, _FULL_FSDP = "adapter_config.json", "pytorch_model_fsdp.bin"
# What wrappers put into the names of what they wrap.
_WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.")
_SIDE = "other_layout"  # of `minimal_aia.models.convert`


@dataclass
class Export:
    """What an export did: the kind of checkpoint, tensors and bytes written, remarks for the user."""

    out: Path
    kind: str
    n_tensors: int
    n_bytes: int
    notes: list[str] = field(default_factory=list)


def export(
    checkpoint: str | Path, out: str | Path, base: str | None = None, dtype: str | None = None
) -> Export:
    """Write the model inside a training checkpoint as one folder.

    checkpoint: a checkpoint's folder, or a run's (its newest whole checkpoint is taken).
    out: a new folder.
    base: the model that was trained (folder, hub id, lab/...), for configuration and processor and, with
        LoRA, the weights; by default what the checkpoint itself says.
    dtype: "bfloat16", "float16" or "float32"; by default every tensor keeps its own.

    Raises ValueError for a damaged checkpoint, for weights of another model (all differences are listed), and
    if there is no saying what the base is; OSError for missing shards; ImportError for DeepSpeed and peft.
    """
    notes: list[str] = []
    out = Path(out)
    folder = _newest(Path(checkpoint), notes)
    kind, recipe = _kind(folder), _recipe(folder)
    name = base or recipe.get("model") or _stated_base(folder, kind)
    if name is None:
        raise ValueError(f"{folder}: does not say which model it is of; give --base, its folder or hub id")
    with new_path(out) as part:
        adapter, state = _read(folder, kind, name, recipe, getattr(torch, dtype) if dtype else None)
        notes += untie(adapter.model, state)
        adapter.save(part, state)
        for card in (folder / "README.md", folder.parent / "README.md"):
            if card.is_file() and not (part / "README.md").exists():
                shutil.copyfile(card, part / "README.md")
        if (Path(name) / _SIDE).is_dir():  # keeps the way back to the original layout open
            shutil.copytree(Path(name) / _SIDE, part / _SIDE)
    return Export(out, kind, len(state), sum(tensor.nbytes for tensor in state.values()), notes)


def _newest(folder: Path, notes: list[str]) -> Path:
    """A run's newest whole checkpoint for the run's folder; the folder itself if it is a checkpoint."""
    if not folder.is_dir():
        raise OSError(f"{folder}: no such folder")
    if newest := ck.last_good(folder, say=notes.append):
        notes.append(f"took {newest.name}")
        return newest
    if (folder / ck.MANIFEST).is_file() and (wrong := ck.problems(folder)):
        raise ValueError(f"{folder}: the checkpoint is damaged: {'; '.join(wrong)}")
    return folder


def _recipe(folder: Path) -> dict[str, Any]:
    """The configuration of the run, if this library wrote the checkpoint."""
    return ck.read_manifest(folder).get("config", {}) if (folder / ck.MANIFEST).is_file() else {}


def _kind(folder: Path) -> str:
    if (folder / _PEFT).is_file():
        return "peft"
    if (folder / TRAINED).is_file():
        return "lora"
    if sharded.find_dcp(folder):
        return "fsdp"
    return "deepspeed" if sharded.is_deepspeed(folder) else "plain"


def _stated_base(folder: Path, kind: str) -> str | None:
    if kind == "peft":
        return read_json(folder / _PEFT).get("base_model_name_or_path")
    return str(folder) if (folder / "config.json").is_file() else None


def _read(
    folder: Path, kind: str, base: str, recipe: Mapping[str, Any], dtype: torch.dtype | None
) -> tuple[Any, dict[str, Tensor]]:
    """The base's adapter, and the trained model's weights by the names that its class gives them."""
    from minimal_aia.models import load_adapter

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor

    if kind in ("peft", "lora"):  # what was added to the base: it must be there in full
        adapter: Any = load_adapter(base, device="cpu", dtype=getattr(torch, str(recipe.get("dtype")), None))
        state = _peft(adapter, folder) if kind == "peft" else _lora(adapter, folder, recipe)
    else:
        adapter = load_adapter(base, device="meta")
        if kind == "plain" and (folder / "config.json").is_file():
            state = _from_pretrained(adapter, folder)
        else:
            rank = recipe.get("lora_rank")
            scale = recipe["lora_alpha"] / rank if rank else None
            state = _by_name(adapter.model, folder, *_source(folder, kind, cast), scale)
    state = {name: cast(tensor) for name, tensor in state.items()}
    sizes: Counter[torch.dtype] = Counter()
    for tensor in state.values():
        sizes[tensor.dtype] += tensor.numel() * tensor.is_floating_point()
    adapter.model.to(sizes.most_common(1)[0][0])  # what its configuration will say
    return adapter, state


def _peft(adapter: Any, folder: Path) -> dict[str, Tensor]:
    if importlib.util.find_spec("peft") is None:
        raise ImportError(f"{folder}: a peft adapter; merging it needs the package peft: pip install peft")
    from peft import PeftModel

    try:
        adapter.model = PeftModel.from_pretrained(adapter.model, str(folder)).merge_and_unload()
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: does not fit its base ({str(error).splitlines()[0]})") from error
    return dict(adapter.model.state_dict())


def _lora(adapter: Any, folder: Path, recipe: Mapping[str, Any]) -> dict[str, Tensor]:
    known = {f.name for f in fields(TrainConfig)}  # another version may have known more
    config = TrainConfig(**{key: value for key, value in recipe.items() if key in known})
    module = SFTModule(adapter, config, None)
    module.load(folder)
    state = {name.removeprefix("model."): tensor for name, tensor in module.state_dict().items()}
    return merged(state, config.lora_alpha / config.lora_rank)


def _from_pretrained(adapter: Any, folder: Path) -> dict[str, Tensor]:
    """A folder with a configuration: transformers knows how its names on disk differ from the model's."""
    try:
        model, info = type(adapter.model).from_pretrained(folder, dtype="auto", output_loading_info=True)
    except SafetensorError as error:
        raise OSError(f"{folder}: a weight file is damaged ({error}); get it again") from error
    wrong = [
        f"{kind}: {name}" for kind in ("missing", "unexpected", "mismatched") for name in info[f"{kind}_keys"]
    ]
    if wrong:
        raise ValueError(f"{folder}: its weights are not those of its config.json:\n  " + "\n  ".join(wrong))
    adapter.model = model
    return dict(model.state_dict())


def _source(
    folder: Path, kind: str, cast: Callable[[Tensor], Tensor]
) -> tuple[dict[str, tuple[int, ...]], Callable[[list[str]], dict[str, Tensor]]]:
    """What tensors a checkpoint has (name -> shape), and how to read some of them."""
    if kind == "fsdp" and (dcp := sharded.find_dcp(folder)):
        return sharded.dcp_shapes(dcp), lambda names: sharded.load_dcp(dcp, names, cast)
    if kind == "deepspeed":
        found: dict[str, Any] = sharded.load_deepspeed(folder)
    else:
        full = folder / _FULL_FSDP  # accelerate with FSDP and full state dicts
        found, _ = unwrap(load_tensors(full if full.is_file() else folder))
    shapes = {name: tuple(t.shape) for name, t in found.items() if isinstance(t, Tensor)}
    return shapes, lambda names: {name: found[name] for name in names}


def _by_name(
    model: Any,
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[list[str]], dict[str, Tensor]],
    lora_scale: float | None,
) -> dict[str, Tensor]:
    """The tensors that are the model's, whatever module was around it; LoRA merged. ValueError if not all."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    plain = {name: _WRAPPERS.sub("", name) for name in shapes}
    prefix = _prefix(folder, plain.values(), wanted)
    mine = {name: p.removeprefix(prefix) for name, p in plain.items() if p.startswith(prefix)}
    found = {
        short.replace(".base_layer.", "."): torch.empty(shapes[name], device="meta")
        for name, short in mine.items()
        if ".lora_" not in short
    }
    require_fit(folder, f"of {type(model).__name__}", found, wanted, set(model.all_tied_weights_keys))
    has_lora = any(".lora_" in short for short in mine.values())
    if has_lora and lora_scale is None:
        raise ValueError(f"{folder}: has LoRA weights, but no recipe that says how they were scaled")
    state = {mine[name]: tensor for name, tensor in read(list(mine)).items()}
    return merged(state, lora_scale or 0.0) if has_lora else state


def _prefix(folder: Path, names: Any, wanted: Mapping[str, Any]) -> str:
    """What stands before the model's own names in a checkpoint: "", "model.", "model.model.", ..."""
    anchor = max(wanted, key=len)
    ends = (anchor, ".base_layer.".join(anchor.rsplit(".", 1)))
    prefixes = {
        name.removesuffix(end) for name in names for end in ends if name == end or name.endswith(f".{end}")
    }
    if len(prefixes) != 1:
        many = ", ".join(repr(prefix) for prefix in sorted(prefixes))
        said = f"holds the model more than once, under {many}" if many else f"has no weight {anchor}"
        raise ValueError(f"{folder}: {said}; is it a checkpoint of this model?")
    return str(prefixes.pop())
