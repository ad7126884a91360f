"""Tiny random FLUX and Qwen-Image pipelines in the real diffusers layout, written to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from checkpoints import QWEN2_TEXT, bpe, qwen_tokenizer

CLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "projection_dim": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def sharpen(model: Any) -> Any:
    """Attention far from flat makes a sharper test."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("to_q.weight", "to_k.weight", "add_q_proj.weight", "add_k_proj.weight")):
                parameter.mul_(4)
            elif "norm" in name and "linear.bias" not in name and name.endswith(("q.weight", "k.weight")):
                parameter.mul_(3)
    return model.eval()


def clip_tokenizer() -> Any:
    letters = sorted(bpe().get_vocab(), key=lambda t: (len(t), t))[:256]
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def t5_tokenizer() -> Any:
    words = "the a red circle blue square sign says hello world two and user : assistant ,".split()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -2.0)]
    pieces += [("\u2581" + word, -3.0) for word in words] + [(word, -4.0) for word in words if len(word) > 1]
    pieces += [(chr(i), -6.0) for i in range(33, 127)]
    return transformers.T5Tokenizer(vocab=list(dict(pieces).items()), extra_ids=0)


def flux(folder: Path) -> Path:
    import diffusers

    torch.manual_seed(0)
    t5 = t5_tokenizer()
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    clip = clip_tokenizer()
    text = transformers.CLIPTextConfig(**CLIP, vocab_size=len(clip), max_position_embeddings=77)
    text.eos_token_id, text.bos_token_id, text.pad_token_id = (
        clip.eos_token_id,
        clip.bos_token_id,
        clip.pad_token_id,
    )
    t5_config = transformers.T5Config(
        vocab_size=len(t5) + 4,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), latent_channels=1, norm_num_groups=2, shift_factor=0.0, scaling_factor=1.0,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=clip,
        text_encoder_2=transformers.T5EncoderModel(t5_config),
        tokenizer_2=t5,
        transformer=sharpen(transformer),
    ).save_pretrained(folder)
    return folder


def qwen_image(folder: Path) -> Path:
    import diffusers

    torch.manual_seed(0)
    tokenizer = qwen_tokenizer(folder / "vocabulary", ["<|image_pad|>", "<|video_pad|>"])
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={
                **{k: v for k, v in QWEN2_TEXT.items() if k != "model_type"},
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "vocab_size": len(tokenizer),
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "num_heads": 2,
                "out_hidden_size": 16,
                "intermediate_size": 8,
            },
            image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
            video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        )
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=sharpen(transformer),
    ).save_pretrained(folder)
    return folder


PIPELINES = {"flux": flux, "qwen-image": qwen_image}
