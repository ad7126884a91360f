"""Janus' configuration in its two layouts.

The original config.json names a SigLIP variant and a VQ variant whose sizes stand in DeepSeek's code; their
sizes are the tables below (facts from `janus/models/{siglip_vit,vq_model}.py`). A model of other sizes gets
them written out under the parameters' own names, which this converter reads back and DeepSeek's code refuses
by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Sizes by their names in the original code -> in Hugging Face's; then the named variants, in this order.
_VISION_NAMES = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "patch_size": "patch_size",
    "mlp_ratio": "mlp_ratio",
}
SIGLIP = {
    "siglip_large_patch16_384": (1024, 24, 16, 16, 4),
    "siglip_so400m_patch14_384": (1152, 27, 16, 14, 3.7362),
    "siglip_so400m_patch14_224": (1152, 27, 16, 14, 3.7362),
}
_VQ_NAMES = {
    "ch": "base_channels",
    "ch_mult": "channel_multiplier",
    "num_res_blocks": "num_res_blocks",
    "z_channels": "latent_channels",
}
VQ = {"VQ-16": (128, [1, 1, 2, 2, 4], 2, 256)}
_SECTIONS = ("language", "vision", "aligner", "gen_vision", "gen_aligner", "gen_head")
# What the original language model (transformers 4) is told; the rest are defaults that both share.
_TEXT_NAMES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim hidden_act max_position_embeddings initializer_range rms_norm_eps attention_bias mlp_bias "
    "attention_dropout tie_word_embeddings pad_token_id bos_token_id eos_token_id"
).split()


def to_hf(original: dict[str, Any], path: Path) -> Any:
    """An original config.json -> `JanusConfig`. ValueError listing all that Hugging Face's class lacks."""
    try:
        return _to_hf(original, path)
    except KeyError as error:
        raise ValueError(f"{path}: no Janus or Janus-Pro configuration, {error} is not stated") from error


def _to_hf(original: dict[str, Any], path: Path) -> Any:
    from transformers import JanusConfig

    if missing := [f"{name}_config" for name in _SECTIONS if f"{name}_config" not in original]:
        raise ValueError(f"{path}: no Janus or Janus-Pro configuration, it lacks {', '.join(missing)}")
    language = dict(original["language_config"])
    vision, aligner, vq, gen_aligner, head = (
        original[f"{name}_config"].get("params", {}) for name in _SECTIONS[1:]
    )
    tower_name = vision.get("model_name", "siglip_large_patch16_384")
    vq_name = original["gen_vision_config"].get("cls", "VQ-16")
    tower, problems = _sizes(SIGLIP, _VISION_NAMES, "vision tower", tower_name, vision)
    tokenizer, more = _sizes(VQ, _VQ_NAMES, "VQ model", vq_name, vq)
    problems += more
    tower["num_hidden_layers"] = tower.get("num_hidden_layers", 0) + min(
        0, vision.get("select_layer", -2) + 1
    )
    for name, params in (("aligner", aligner), ("gen_aligner", gen_aligner)):
        if params.get("projector_type") != "mlp_gelu":
            problems.append(f"{name}: projector {params.get('projector_type')!r} (only mlp_gelu)")
    if vision.get("pixel_mean"):
        problems.append("vision_config.pixel_mean: normalises pictures inside the model")
    if (kind := language.get("model_type", "llama")) != "llama":
        problems.append(f"language model of type {kind!r} (only llama)")
    if head.get("image_token_embed") != gen_aligner.get("n_embed"):
        problems.append(
            "gen_head.image_token_embed and gen_aligner.n_embed differ (Hugging Face has one size)"
        )
    if problems:
        raise ValueError(f"{path}: cannot become a Hugging Face model:\n  " + "\n  ".join(problems))
    text = {k: v for k, v in language.items() if k not in ("torch_dtype", "dtype") and not k.startswith("_")}
    tied = bool(language.get("tie_word_embeddings", False))
    image_size = vision.get("image_size", 336)
    return JanusConfig(
        text_config={**text, "model_type": "llama", "tie_word_embeddings": tied},
        vision_config={
            **tower,
            "image_size": image_size,
            "num_image_tokens": (image_size // tower["patch_size"]) ** 2,
            "projection_dim": aligner["n_embed"],
            "depth": aligner.get("depth", 1),
        },
        vq_config={
            **tokenizer,
            "embed_dim": vq["n_embed"],
            "num_embeddings": vq["image_token_size"],
            "projection_dim": gen_aligner["n_embed"],
            "num_hidden_layers": gen_aligner.get("depth", 1),
            "image_token_embed_dim": head["n_embed"],
        },
        tie_word_embeddings=tied,
    )


def _sizes(
    table: dict[str, Any], names: dict[str, str], what: str, variant: str, stated: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The sizes of a variant or, if it is not known, as stated, in Hugging Face's names; what is missing."""
    found = dict(zip(names, table[variant])) if variant in table else stated
    missing = [f"{what} {variant!r} is not known and {key!r} not stated" for key in names if key not in found]
    return {names[key]: found[key] for key in names if key in found}, missing


def to_original(config: Any, dtype: str) -> dict[str, Any]:
    """A `JanusConfig` -> the original config.json. ValueError for what only Hugging Face's class has."""
    text, vision, vq = config.text_config, config.vision_config, config.vq_config
    if vision.use_qk_norm or vq.double_latent:
        raise ValueError("use_qk_norm and double_latent do not exist in the original Janus code")
    tower_name, tower_sizes = _variant(SIGLIP, _VISION_NAMES, "siglip_of_these_sizes", vision)
    vq_name, vq_sizes = _variant(VQ, _VQ_NAMES, "VQ-of-these-sizes", vq)
    rope = dict(text.rope_parameters)
    language: dict[str, Any] = {key: getattr(text, key) for key in _TEXT_NAMES}
    language |= {"model_type": "llama", "rope_theta": rope.pop("rope_theta"), "torch_dtype": dtype}
    if rope.get("rope_type", "default") != "default":
        language["rope_scaling"] = rope
    language["tie_word_embeddings"] = bool(config.tie_word_embeddings)

    def section(cls: str, name: str, **params: Any) -> dict[str, Any]:
        return {"cls": cls, "model_type": name, "params": params}

    def projector(name: str, depth: int, n_in: int, n_out: int) -> dict[str, Any]:
        sizes = {"depth": depth, "input_dim": n_in, "n_embed": n_out}
        return section("MlpProjector", name, projector_type="mlp_gelu", **sizes)

    tower = {"image_size": vision.image_size, "model_name": tower_name, **tower_sizes}
    codes = {"image_token_size": vq.num_embeddings}
    head = {"image_token_embed": vq.projection_dim, "n_embed": vq.image_token_embed_dim}
    return {
        "model_type": "multi_modality",
        "architectures": ["MultiModalityCausalLM"],
        "torch_dtype": dtype,
        "language_config": {key: value for key, value in language.items() if value is not None},
        "vision_config": section(
            "CLIPVisionTower", "vision", select_feature="same", select_layer=-1, **tower
        ),
        "aligner_config": projector("aligner", vision.depth, vision.hidden_size, vision.projection_dim),
        "gen_vision_config": section(vq_name, "gen_vision", n_embed=vq.embed_dim, **codes, **vq_sizes),
        "gen_aligner_config": projector("gen_aligner", vq.num_hidden_layers, vq.embed_dim, vq.projection_dim),
        "gen_head_config": section("vision_head", "gen_head", **codes, **head),
    }


def _variant(
    table: dict[str, Any], names: dict[str, str], otherwise: str, config: Any
) -> tuple[str, dict[str, Any]]:
    """The variant's name in the original code and, if it has none, the sizes to write out."""
    sizes = {key: getattr(config, name) for key, name in names.items()}
    sizes = {key: list(size) if isinstance(size, tuple) else size for key, size in sizes.items()}
    named = next((name for name, row in table.items() if list(row) == list(sizes.values())), None)
    return (named, {}) if named else (otherwise, sizes)
