"""Janus' two layouts, name by name: the original one (DeepSeek's code) and Hugging Face's.

The table goes from Hugging Face's names to the original ones, because a configuration tells exactly which
names Hugging Face's class has and what their shapes are; what the original must hold then follows, and
everything else is an error. Three things differ besides names: the vision tower's attention has one `qkv` for
three projections, its position embedding has a leading dimension of one, and some tensors exist on one side
only.

Read from DeepSeek's `janus/models/{modeling_vlm,clip_encoder,siglip_vit,projector,vq_model}.py` (repository
deepseek-ai/Janus) and from `modeling_janus.py` of transformers.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_VISION, _VIT = r"model\.vision_model", "vision_model.vision_tower"
_BLOCK = rf"{_VISION}\.encoder\.layers\.(\d+)"
_VQ = r"model\.vqmodel"
_ALIGNERS = {"model.aligner": "aligner", "model.generation_aligner": "gen_aligner"}
_MID = {"block_1": "0", "attn_1": "1", "block_2": "2"}

# Hugging Face's name -> the original's. Exactly one line matches a name.
_RULES: list[tuple[str, Any]] = [
    (r"model\.language_model\.(.+)", r"language_model.model.\1"),
    (r"lm_head\.(.+)", r"language_model.lm_head.\1"),
    (rf"{_VISION}\.embeddings\.patch_embedding\.(.+)", rf"{_VIT}.patch_embed.proj.\1"),
    (rf"{_VISION}\.embeddings\.position_embedding\.weight", rf"{_VIT}.pos_embed"),
    (rf"{_BLOCK}\.self_attn\.[qkv]_proj\.(.+)", rf"{_VIT}.blocks.\1.attn.qkv.\2"),
    (rf"{_BLOCK}\.self_attn\.projection_layer\.(.+)", rf"{_VIT}.blocks.\1.attn.proj.\2"),
    (rf"{_BLOCK}\.layer_norm([12])\.(.+)", rf"{_VIT}.blocks.\1.norm\2.\3"),
    (rf"{_BLOCK}\.mlp\.(.+)", rf"{_VIT}.blocks.\1.mlp.\2"),
    (rf"{_VISION}\.post_layernorm\.(.+)", rf"{_VIT}.norm.\1"),
    (r"(model\.\w*aligner)\.fc1\.(.+)", lambda m: f"{_ALIGNERS[m[1]]}.layers.0.{m[2]}"),
    # Odd places of the original's list are activations.
    (
        r"(model\.\w*aligner)\.hidden_layers\.(\d+)\.(.+)",
        lambda m: f"{_ALIGNERS[m[1]]}.layers.{2 * int(m[2]) + 2}.{m[3]}",
    ),
    (r"model\.generation_embeddings\.(.+)", r"gen_embed.\1"),
    (r"model\.generation_head\.proj_out\.(.+)", r"gen_head.output_mlp_projector.\1"),
    (r"model\.generation_head\.vision_head\.(.+)", r"gen_head.vision_head.\1"),
    (
        rf"{_VQ}\.(encoder|decoder)\.(?:down|up)\.(\d+)\.block\.(.+)",
        r"gen_vision_model.\1.conv_blocks.\2.res.\3",
    ),
    (
        rf"{_VQ}\.(encoder|decoder)\.(?:down|up)\.(\d+)\.((?:attn|downsample|upsample)\..+)",
        r"gen_vision_model.\1.conv_blocks.\2.\3",
    ),
    (
        rf"{_VQ}\.(encoder|decoder)\.mid\.(block_1|attn_1|block_2)\.(.+)",
        lambda m: f"gen_vision_model.{m[1]}.mid.{_MID[m[2]]}.{m[3]}",
    ),
    (rf"{_VQ}\.((?:encoder|decoder)\.(?:conv_in|norm_out|conv_out)\..+)", r"gen_vision_model.\1"),
    (rf"{_VQ}\.((?:quantize\.embedding|quant_conv|post_quant_conv)\..+)", r"gen_vision_model.\1"),
]

# Tensors of the original that Hugging Face's class lacks. None takes part in a forward pass: SigLIP's pooling
# head is switched off, the usage counter is only counted in, and rotary frequencies follow from the
# configuration.
LEFTOVER = re.compile(
    r"vision_model\.vision_tower\.attn_pool\..+"
    r"|gen_vision_model\.quantize\.codebook_used"
    r"|language_model\.model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
)
HEAD, WORDS = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
CODEBOOK = "gen_vision_model.quantize.embedding.weight"
HF_HEAD, HF_WORDS = "lm_head.weight", "model.language_model.embed_tokens.weight"
HF_CODEBOOK = "model.vqmodel.quantize.embedding.weight"


class Entry(NamedTuple):
    """One original tensor: its shape there, and the one (or, for qkv, three) names it has in Hugging Face."""

    shape: tuple[int, ...]
    names: tuple[str, ...]


def original_name(name: str) -> str:
    """Hugging Face's name of a weight -> the original's; q, k and v share one. KeyError if no rule fits."""
    for pattern, replacement in _RULES:
        if match := re.fullmatch(pattern, name):
            return str(replacement(match) if callable(replacement) else match.expand(replacement))
    raise KeyError(name)


def hf_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of `JanusForConditionalGeneration(config)`; nothing is allocated."""
    from transformers import JanusForConditionalGeneration

    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in JanusForConditionalGeneration(config).state_dict().items()}


def layout(config: Any) -> dict[str, Entry]:
    """What an original checkpoint of this configuration holds, leftovers apart: original name -> `Entry`."""
    shapes = hf_shapes(config)
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(original_name(name), []).append(name)
    entries = {}
    for original, names in groups.items():
        names.sort(key=lambda name: "qkv".find(name.split(".")[-2][0]) if len(names) > 1 else 0)
        first, *rest = shapes[names[0]]
        shape = (first * len(names), *rest)
        entries[original] = Entry((1, *shape) if original.endswith("pos_embed") else shape, tuple(names))
    return entries


def split(original: str, tensor: Tensor, entry: Entry) -> dict[str, Tensor]:
    """An original tensor -> Hugging Face's, as views."""
    if original.endswith("pos_embed"):
        return {entry.names[0]: tensor[0]}
    return dict(zip(entry.names, tensor.chunk(len(entry.names)), strict=True))


def merge(original: str, parts: list[Tensor]) -> Tensor:
    """Hugging Face's tensors, in `Entry.names`' order -> the original one. A copy for qkv only."""
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    return tensor[None] if original.endswith("pos_embed") else tensor


def unit(codebook: Tensor) -> Tensor:
    """Rows of length one, by the very operation that the original applies at each use. [codes, dim]

    The original compares directions: it normalises picture features and codebook before it looks for the
    nearest code. Hugging Face's `encode` normalises neither, so it finds the same codes only if the rows have
    length one already (the length of the feature then changes nothing).
    """
    return F.normalize(codebook, p=2, dim=-1)


def is_unit(codebook: Tensor) -> bool:
    """Whether all rows have length one, within what the precision can say. [codes, dim]"""
    off = (codebook.float().norm(dim=-1) - 1).abs().max()
    return bool(off <= max(1e-5, torch.finfo(codebook.dtype).eps))


def alike(made: Tensor, found: Tensor) -> bool:
    """The same numbers up to the last bits, in which two devices' divisions differ."""
    return torch.allclose(made.float(), found.float(), rtol=4 * torch.finfo(found.dtype).eps, atol=1e-9)


def codebook_note(codebook: Tensor) -> list[str]:
    """A remark for the user if rows are not of length one."""
    if is_unit(codebook):
        return []
    return [
        "the codebook's rows have not length one: DeepSeek's code normalises them before it looks for the "
        "nearest, transformers' encode does not, so image tokens of the two differ"
    ]


def require_fit(
    source: Any, where: Any, found: dict[str, Any], expected: dict[str, tuple[int, ...]], optional: set[str]
) -> None:
    """ValueError naming every tensor that is missing, extra, no tensor or of another shape than expected.

    source, where: what the message calls the weights and the configuration.
    optional: names that may be missing.
    """
    lines = [
        f"missing: {name} {list(expected[name])}" for name in expected if name not in {*found, *optional}
    ]
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor):
            lines.append(f"not a tensor: {name} ({type(tensor).__name__})")
        elif name not in expected:
            lines.append(f"extra: {name} {list(tensor.shape)}")
        elif tuple(tensor.shape) != expected[name]:
            lines.append(f"shape: {name} is {list(tensor.shape)}, should be {list(expected[name])}")
    if lines:
        raise ValueError(
            f"{source}: {len(lines)} entries do not fit the configuration {where}; nothing was written:\n  "
            + "\n  ".join(sorted(lines))
        )
