"""Original Janus checkpoints <-> Hugging Face's `JanusForConditionalGeneration`, bit for bit and any size.

    convert("janus-pro-7b", "janus-pro-7b-hf")  # DeepSeek's folder: it has a configuration
    convert("iter_999.pth", "aia-7b", config="janus-pro-7b-hf")  # the AIA authors' file: it has none
    convert_back("aia-7b", "aia-7b-original")  # for harnesses that need DeepSeek's code
    convert_back("aia-7b", "aia.pth")  # the same as a bare state dict

What was read where:

- The AIA authors (repository zhengdian1/AIA; weights, by their README, at zhengli1013/AIA on the hub, whose
  list of files we have not seen): `trainer/utils/checkpoint.py` writes `ckpt/iter_N.pth`, the plain state
  dict of the whole model in the original names; `trainer/trainer_t2i.py` reads it back from the top level, or
  from under `ema` or `module`; `generation_inference.py` and the evaluations load it strictly into DeepSeek's
  class with the configuration of Janus-Pro-7B. Their copies of the model files have DeepSeek's module names.
- DeepSeek (repository deepseek-ai/Janus, `janus/models/`): module names, shapes and sizes; see `convert_keys`
  and `convert_config`.
- transformers' history has a converter of its own (`models/janus/convert_janus_weights_to_hf.py`, no longer
  shipped) whose names agree with ours. It drops what Hugging Face's class lacks and leaves the codebook as it
  is; there, image tokens differ from the original's wherever a codebook row has not length one (see
  `convert_keys.unit`).

What one layout cannot hold lies in the folder `other_layout` inside the other: the leftover tensors, the
untouched codebook, configuration and processor files. With it the way back is exact; without it, it says what
is missing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from minimal_aia.models import convert_keys as keys
from minimal_aia.models.convert_config import to_hf, to_original
from minimal_aia.models.convert_processor import (
    copy_files,
    has_processor,
    write_hf_processor,
    write_original_processor,
)
from minimal_aia.models.tensor_files import (
    load_tensors,
    new_path,
    read_json,
    unwrap,
    write_json,
    write_shards,
)

if TYPE_CHECKING:
    from torch import Tensor

OTHER = "other_layout"
SHARD_BYTES = 4 * 10**9
_NO_CONFIG = (
    "a bare file of weights carries no configuration: give --config, a Hugging Face folder or config.json of "
    "the same size (for the AIA authors' checkpoint that of deepseek-community/Janus-Pro-7B)"
)


@dataclass
class Conversion:
    """What a conversion did: tensors and bytes written, weight files, remarks that the user should read."""

    out: Path
    n_tensors: int
    n_bytes: int
    files: list[str]
    notes: list[str] = field(default_factory=list)


def convert(
    source: str | Path, out: str | Path, config: str | Path | None = None, shard_bytes: int = SHARD_BYTES
) -> Conversion:
    """Write an original checkpoint as a Hugging Face folder.

    Args:
        source: DeepSeek's folder, or a file with the state dict (.pth, .safetensors; top level or under
            `ema`, `module` or `state_dict`).
        out: a new folder.
        config: Hugging Face folder or config.json with the sizes; required if the source has no
            configuration, and believed before the source's own. A folder's processor is copied along.
        shard_bytes: size of a weight file.

    Every tensor keeps its precision. Raises ValueError listing every missing, extra or mis-shaped tensor; for
    a pickle that would run code; for a configuration that Hugging Face's class cannot express. OSError for
    files that are missing or damaged and for a full disk.
    """
    source, out = Path(source), Path(out)
    settings, where = _config_of(source, Path(config) if config else None)
    loaded, wrappers = unwrap(load_tensors(source))
    entries = keys.layout(settings)
    leftovers = {name: tensor for name, tensor in loaded.items() if keys.LEFTOVER.fullmatch(name)}
    found = {name: tensor for name, tensor in loaded.items() if name not in leftovers}
    optional = {keys.HEAD} if settings.tie_word_embeddings else set()
    keys.require_fit(source, where, found, {k: e.shape for k, e in entries.items()}, optional)

    notes = [f"took the weights under {wrappers[0]!r} (of: {', '.join(wrappers)})"] if wrappers else []
    head = found.get(keys.HEAD)
    tied = head is None or (settings.tie_word_embeddings and torch.equal(head, found[keys.WORDS]))
    if settings.tie_word_embeddings and not tied:
        notes.append("output and input embeddings differ: wrote tie_word_embeddings=false")
    settings.tie_word_embeddings = settings.text_config.tie_word_embeddings = tied
    tensors: dict[str, Tensor] = {}
    for name, entry in entries.items():
        if name in found:
            tensors |= keys.split(name, found[name], entry)
    if tied:
        tensors.pop(keys.HF_HEAD, None)

    side, codebook = dict(leftovers), found[keys.CODEBOOK]
    raw = _side_tensors(source / OTHER).get(keys.HF_CODEBOOK)
    if raw is not None and torch.equal(raw, codebook):  # the source came from Hugging Face's layout
        notes += keys.codebook_note(codebook)
    elif not keys.is_unit(codebook):
        tensors[keys.HF_CODEBOOK] = keys.unit(codebook)
        side[keys.CODEBOOK] = codebook
    notes += _set_dtype(settings, tensors)

    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    with new_path(out, sum(sizes.values()) + sum(t.nbytes for t in side.values())) as part:
        (part / OTHER).mkdir(parents=True)
        if source.is_dir():
            copy_files(source, part / OTHER)
        _write_side(part / OTHER, side, {"from": source.name, "has_lm_head": head is not None})
        if not _write_processor([Path(config)] if config else [], source, part, settings):
            notes.append("no processor was at hand: copy one from a Hugging Face folder of the model")
        settings.architectures = ["JanusForConditionalGeneration"]
        settings.save_pretrained(part)
        files = write_shards(part, sizes, tensors.__getitem__, shard_bytes)
    return Conversion(out, len(sizes), sum(sizes.values()), files, notes)


def convert_back(
    source: str | Path, out: str | Path, leftovers: str | Path | None = None, shard_bytes: int = SHARD_BYTES
) -> Conversion:
    """Write a Hugging Face folder in the original layout.

    Args:
        source: a folder of `JanusForConditionalGeneration` weights, made by `convert`, by training, or from
            the hub.
        out: a new folder (safetensors, config.json, processor files), or a new .pth file (a bare state dict).
        leftovers: where the tensors are that only the original has, if not in `source`: a folder made by
            `convert`, or an original checkpoint of the same model. Without them DeepSeek's code works, but
            strict loading does not.

    Raises as `convert` does.
    """
    source, out = Path(source), Path(out)
    stated = read_json(source / "config.json")
    if stated.get("model_type") != "janus":
        raise ValueError(
            f"{source}: not a Hugging Face Janus folder (model_type {stated.get('model_type')!r})"
        )
    settings = _hf_config(stated, source / "config.json")
    loaded = load_tensors(source)
    entries, shapes = keys.layout(settings), keys.hf_shapes(settings)
    optional = {keys.HF_HEAD} if settings.tie_word_embeddings else set()
    keys.require_fit(source, source / "config.json", loaded, shapes, optional)
    loaded.setdefault(keys.HF_HEAD, loaded[keys.HF_WORDS])
    tied = torch.equal(loaded[keys.HF_HEAD], loaded[keys.HF_WORDS])
    settings.tie_word_embeddings = settings.tie_word_embeddings and tied

    side = Path(leftovers) if leftovers else source / OTHER
    side = side / OTHER if (side / OTHER).is_dir() else side
    kept, has_head = _leftovers(side)
    notes = []
    if not any("attn_pool" in name for name in kept):
        notes.append(
            "no leftover tensors were at hand (vision_tower.attn_pool.*, quantize.codebook_used; unused in "
            "the forward pass): strict loading will miss them; --leftovers takes them from an original "
            "checkpoint"
        )
    untouched, codebook = kept.pop(keys.CODEBOOK, None), loaded[keys.HF_CODEBOOK]
    if untouched is not None and keys.alike(keys.unit(untouched), codebook):
        loaded[keys.HF_CODEBOOK] = untouched
    else:
        notes += keys.codebook_note(codebook)

    def tensor(name: str) -> Tensor:
        return kept[name] if name in kept else keys.merge(name, [loaded[n] for n in entries[name].names])

    names = [name for name in entries if has_head or not tied or name != keys.HEAD] + sorted(kept)
    sizes = {
        name: kept[name].nbytes if name in kept else sum(loaded[n].nbytes for n in entries[name].names)
        for name in names
    }
    with new_path(out, sum(sizes.values())) as part:
        if out.suffix == ".pth":
            torch.save({name: tensor(name) for name in names}, part)
            return Conversion(out, len(sizes), sum(sizes.values()), [out.name], notes)
        (part / OTHER).mkdir(parents=True)
        copy_files(source, part / OTHER)
        _write_side(part / OTHER, {keys.HF_CODEBOOK: codebook}, {"from": source.name})
        dtype = str(loaded[keys.HF_WORDS].dtype).removeprefix("torch.")
        copy_files(side, part)
        if not has_processor(part, "VLChatProcessor") and not write_original_processor(
            source, part, settings
        ):
            notes.append("no processor was at hand: copy one from DeepSeek's folder of the model")
        if not _same_shapes(part / "config.json", shapes):
            write_json(part / "config.json", to_original(settings, dtype))
        files = write_shards(part, sizes, tensor, shard_bytes)
    return Conversion(out, len(sizes), sum(sizes.values()), files, notes)


def _config_of(source: Path, config: Path | None) -> tuple[Any, Path]:
    """The target `JanusConfig` and the file it came from."""
    if not source.exists():
        raise OSError(
            f"{source}: no such file or folder; download the checkpoint first (`hf download OWNER/NAME`)"
        )
    own = source / "config.json"
    if source.is_dir() and own.is_file() and read_json(own).get("model_type") == "janus":
        raise ValueError(f"{source}: is in Hugging Face's layout already (--to-original is the way back)")
    if config is None and not source.is_dir():
        raise ValueError(f"{source}: {_NO_CONFIG}")
    path = config or next((p for p in (source / OTHER / "config.json", own) if p.is_file()), own)
    path = path / "config.json" if path.is_dir() else path
    stated = read_json(path)
    original = stated.get("model_type") == "multi_modality"
    return (to_hf(stated, path) if original else _hf_config(stated, path)), path


def _hf_config(stated: dict[str, Any], path: Path) -> Any:
    from transformers import JanusConfig

    if stated.get("model_type") != "janus":
        raise ValueError(f"{path}: model_type {stated.get('model_type')!r}; a Janus configuration is needed")
    return JanusConfig.from_dict(stated)


def _same_shapes(path: Path, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether an original config.json, kept from before, still describes the weights."""
    try:
        return keys.hf_shapes(to_hf(read_json(path), path)) == shapes
    except (OSError, ValueError):
        return False


def _write_processor(given: list[Path], source: Path, out: Path, settings: Any) -> bool:
    """Processor and generation settings from the first folder that has some, in either layout."""
    for folder in (*given, source / OTHER, source):
        if has_processor(folder, "JanusProcessor"):
            copy_files(folder, out, skip=("config.json",))
            return True
        if has_processor(folder, "VLChatProcessor"):
            write_hf_processor(folder, out, settings)
            return True
    return False


def _set_dtype(settings: Any, tensors: dict[str, Tensor]) -> list[str]:
    """State in the configuration what most weights are; a remark if they are of several kinds."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    settings.dtype = settings.text_config.dtype = max(sizes, key=sizes.__getitem__)
    if len(sizes) == 1:
        return []
    kinds = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in sizes))
    return [
        f"the weights are of several precisions ({kinds}); each kept its own, from_pretrained will unify them"
    ]


def _write_side(folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    if tensors:
        save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "tensors.safetensors")
    write_json(folder / "conversion.json", facts)


def _side_tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / "tensors.safetensors"
    return load_tensors(file) if file.is_file() else {}


def _leftovers(path: Path) -> tuple[dict[str, Tensor], bool]:
    """What only the original has, and whether it had an output embedding of its own.

    path: `other_layout`, or an original checkpoint.
    """
    if (path / "conversion.json").is_file():
        return _side_tensors(path), bool(read_json(path / "conversion.json").get("has_lm_head", True))
    if path.name == OTHER:  # a folder from training or from the hub has none
        return {}, True
    loaded, _ = unwrap(load_tensors(path))
    wanted = {k: t for k, t in loaded.items() if keys.LEFTOVER.fullmatch(k) or k == keys.CODEBOOK}
    if not wanted:
        raise ValueError(f"{path}: neither an original checkpoint nor a folder that `convert` made")
    return wanted, keys.HEAD in loaded
