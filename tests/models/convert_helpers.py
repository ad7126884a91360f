"""What the converter's tests share: configurations of the reference model and of a published one."""

from __future__ import annotations

from original_janus import Sizes
from transformers import JanusConfig

IMAGE = 5
# DeepSeek's published config.json of Janus-Pro-7B (the language model's other sizes are transformers'
# defaults).
PRO_7B = {
    "model_type": "multi_modality",
    "language_config": {
        "max_position_embeddings": 16384,
        "model_type": "llama",
        "num_hidden_layers": 30,
        "torch_dtype": "bfloat16",
        "vocab_size": 102400,
    },
    "vision_config": {
        "cls": "CLIPVisionTower",
        "params": {
            "image_size": 384,
            "model_name": "siglip_large_patch16_384",
            "select_feature": "same",
            "select_layer": -1,
        },
    },
    "aligner_config": {
        "cls": "MlpProjector",
        "params": {"depth": 2, "input_dim": 1024, "n_embed": 4096, "projector_type": "mlp_gelu"},
    },
    "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": 16384, "n_embed": 8}},
    "gen_aligner_config": {
        "cls": "MlpProjector",
        "params": {"depth": 2, "input_dim": 8, "n_embed": 4096, "projector_type": "mlp_gelu"},
    },
    "gen_head_config": {
        "cls": "vision_head",
        "params": {"image_token_embed": 4096, "image_token_size": 16384, "n_embed": 4096},
    },
}


def hf_config(s: Sizes, **more) -> JanusConfig:
    return JanusConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": s.vocab,
            "hidden_size": s.width,
            "intermediate_size": s.feed,
            "num_hidden_layers": s.layers,
            "num_attention_heads": s.heads,
            "num_key_value_heads": s.kv_heads,
            "rope_theta": s.theta,
            "rms_norm_eps": s.eps,
        },
        vision_config={
            "hidden_size": s.vit,
            "num_hidden_layers": s.vit_layers,
            "num_attention_heads": s.vit_heads,
            "image_size": s.image,
            "patch_size": s.patch,
            "mlp_ratio": s.ratio,
            "projection_dim": s.width,
            "depth": s.depth,
            "num_image_tokens": (s.image // s.patch) ** 2,
        },
        vq_config={
            "embed_dim": s.code,
            "num_embeddings": s.codes,
            "latent_channels": s.latent,
            "base_channels": s.channels,
            "channel_multiplier": list(s.levels),
            "num_res_blocks": s.blocks,
            "projection_dim": s.width,
            "num_hidden_layers": s.gen_depth,
            "image_token_embed_dim": s.width,
        },
        image_token_id=IMAGE,
        **more,
    )
