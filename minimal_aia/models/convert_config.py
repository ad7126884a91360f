"""Janus' configuration in its two layouts.

The original config.json names a SigLIP variant and a VQ variant whose sizes stand in DeepSeek's code; their
sizes are the tables below (facts from `janus/models/{siglip_vit,vq_model}.py`). A model of other sizes gets
them written out under the parameters' own names, which this converter reads back and DeepSeek's code refuses
by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIGLIP: dict[str, dict[str, Any]] = {
    "siglip_large_patch16_384": {"width": 1024, "layers": 24, "heads": 16, "patch_size": 16, "mlp_ratio": 4},
    "siglip_so400m_patch14_384": {
        "width": 1152,
        "layers": 27,
        "heads": 16,
        "patch_size": 14,
        "mlp_ratio": 3.7362,
    },
    "siglip_so400m_patch14_224": {
        "width": 1152,
        "layers": 27,
        "heads": 16,
        "patch_size": 14,
        "mlp_ratio": 3.7362,
    },
}
VQ: dict[str, dict[str, Any]] = {
    "VQ-16": {"ch": 128, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "z_channels": 256}
}
_VISION_NAMES = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "patch_size": "patch_size",
    "mlp_ratio": "mlp_ratio",
}
_VQ_NAMES = {
    "ch": "base_channels",
    "ch_mult": "channel_multiplier",
    "num_res_blocks": "num_res_blocks",
    "z_channels": "latent_channels",
}
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
    tower, tower_missing = _sizes(SIGLIP, vision.get("model_name", "siglip_large_patch16_384"), vision)
    tokenizer, vq_missing = _sizes(VQ, original["gen_vision_config"].get("cls", "VQ-16"), vq)
    tower["layers"] = tower.get("layers", 0) + min(0, vision.get("select_layer", -2) + 1)
    problems = [
        *(
            f"vision tower {vision.get('model_name')!r} is not known and {key!r} not stated"
            for key in tower_missing
        ),
        *(
            f"VQ model {original['gen_vision_config'].get('cls')!r} is not known and {key!r} not stated"
            for key in vq_missing
        ),
        *(
            f"{name}: projector {params.get('projector_type')!r} (only mlp_gelu)"
            for name, params in (("aligner", aligner), ("gen_aligner", gen_aligner))
            if params.get("projector_type") != "mlp_gelu"
        ),
        *(
            f"vision_config.{key}: normalises pictures inside the model"
            for key in ("pixel_mean",)
            if vision.get(key)
        ),
        *(
            f"language model of type {language['model_type']!r} (only llama)"
            for _ in range(language.get("model_type", "llama") != "llama")
        ),
    ]
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
            **{_VISION_NAMES[key]: value for key, value in tower.items()},
            "image_size": image_size,
            "num_image_tokens": (image_size // tower["patch_size"]) ** 2,
            "projection_dim": aligner["n_embed"],
            "depth": aligner.get("depth", 1),
        },
        vq_config={
            **{_VQ_NAMES[key]: value for key, value in tokenizer.items()},
            "embed_dim": vq["n_embed"],
            "num_embeddings": vq["image_token_size"],
            "projection_dim": gen_aligner["n_embed"],
            "num_hidden_layers": gen_aligner.get("depth", 1),
            "image_token_embed_dim": head["n_embed"],
        },
        tie_word_embeddings=tied,
    )


def _sizes(
    table: dict[str, dict[str, Any]], name: str, stated: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The sizes of a variant by its name or, if it has none, as stated; and the names of those not stated."""
    wanted = list(next(iter(table.values())))
    found = dict(table.get(name) or {key: stated[key] for key in wanted if key in stated})
    return found, [key for key in wanted if key not in found]


def to_original(config: Any, dtype: str) -> dict[str, Any]:
    """A `JanusConfig` -> the original config.json. ValueError for what only Hugging Face's class has."""
    text, vision, vq = config.text_config, config.vision_config, config.vq_config
    if vision.use_qk_norm or vq.double_latent:
        raise ValueError("use_qk_norm and double_latent do not exist in the original Janus code")
    tower = {key: getattr(vision, name) for key, name in _VISION_NAMES.items()}
    tokenizer = {key: getattr(vq, name) for key, name in _VQ_NAMES.items()}
    tokenizer["ch_mult"] = list(tokenizer["ch_mult"])
    tower_name, tower_extra = _variant(SIGLIP, "siglip_of_these_sizes", tower)
    vq_name, vq_extra = _variant(VQ, "VQ-of-these-sizes", tokenizer)
    rope = dict(text.rope_parameters)
    language: dict[str, Any] = {key: getattr(text, key) for key in _TEXT_NAMES}
    language |= {"model_type": "llama", "rope_theta": rope.pop("rope_theta"), "torch_dtype": dtype}
    if rope.get("rope_type", "default") != "default":
        language["rope_scaling"] = rope
    language["tie_word_embeddings"] = bool(config.tie_word_embeddings)

    def section(cls: str, name: str, **params: Any) -> dict[str, Any]:
        return {"cls": cls, "model_type": name, "params": params}

    return {
        "model_type": "multi_modality",
        "architectures": ["MultiModalityCausalLM"],
        "torch_dtype": dtype,
        "language_config": {key: value for key, value in language.items() if value is not None},
        "vision_config": section(
            "CLIPVisionTower",
            "vision",
            image_size=vision.image_size,
            model_name=tower_name,
            select_feature="same",
            select_layer=-1,
            **tower_extra,
        ),
        "aligner_config": section(
            "MlpProjector",
            "aligner",
            depth=vision.depth,
            input_dim=vision.hidden_size,
            n_embed=vision.projection_dim,
            projector_type="mlp_gelu",
        ),
        "gen_vision_config": section(
            vq_name, "gen_vision", image_token_size=vq.num_embeddings, n_embed=vq.embed_dim, **vq_extra
        ),
        "gen_aligner_config": section(
            "MlpProjector",
            "gen_aligner",
            depth=vq.num_hidden_layers,
            input_dim=vq.embed_dim,
            n_embed=vq.projection_dim,
            projector_type="mlp_gelu",
        ),
        "gen_head_config": section(
            "vision_head",
            "gen_head",
            image_token_embed=vq.projection_dim,
            image_token_size=vq.num_embeddings,
            n_embed=vq.image_token_embed_dim,
        ),
    }


def _variant(
    table: dict[str, dict[str, Any]], otherwise: str, sizes: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The variant's name in the original code and, if it has none, the sizes to write out."""
    named = next((name for name, row in table.items() if row == sizes), None)
    return (named, {}) if named else (otherwise, sizes)
