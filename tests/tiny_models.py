"""Tiny random transformers models, one a family, and a padded two-sample batch with its spans for each.

    model = tiny_model("qwen3_vl")
    batch = tiny_batch("qwen3_vl", padding="left")
    model(**batch.inputs)

Every model is seeded, in eval mode, fp32, without dropout unless `dropout=` says so, and takes a few
milliseconds. Layout of a sample: `bos`, text, image tokens (multimodal families), text, answer; the second
sample is three tokens shorter, so it is the one that gets padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor

PAD, BOS, EOS, IMAGE, VIDEO, VISION_START, VISION_END, EOL, FIRST_WORD = 0, 1, 2, 3, 4, 5, 6, 7, 10
VOCAB, FIRST_CODE, N_CODES = 120, 80, 16  # codes: the part of the vocabulary that names discrete image tokens
WIDTH = 32  # hidden size of every decoder

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "initializer_range": 0.3,  # wide: attention that is far from flat is a sharper test
}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def _janus(text: dict) -> Any:
    return hf.JanusForConditionalGeneration(
        hf.JanusConfig(
            text_config={"model_type": "llama", **text},
            vision_config={
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "mlp_ratio": 1.5,
                "image_size": 8,
                "patch_size": 4,
                "projection_dim": WIDTH,
                "num_image_tokens": 4,
            },
            vq_config={
                "embed_dim": 8,
                "num_embeddings": N_CODES,
                "latent_channels": 32,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "projection_dim": WIDTH,
                "image_token_embed_dim": WIDTH,
            },
            image_token_id=IMAGE,
        )
    )


def _emu3(text: dict) -> Any:
    codes = {f"<|visual token {i:06d}|>": FIRST_CODE + i for i in range(N_CODES)}
    return hf.Emu3ForConditionalGeneration(
        hf.Emu3Config(
            text_config=text,
            vq_config={
                "codebook_size": N_CODES,
                "embed_dim": 4,
                "latent_channels": 4,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "attn_resolutions": [1],
                "hidden_size": 32,
                "temporal_downsample_factor": 2,
            },
            vocabulary_map={**codes, "<image>": IMAGE, "<|extra_200|>": EOL},
        )
    )


def _chameleon(text: dict) -> Any:
    codes = {f"IMGIMG{_letters(i)}Z": FIRST_CODE + i for i in range(N_CODES)}
    return hf.ChameleonForConditionalGeneration(
        hf.ChameleonConfig(
            **text,
            vq_config={
                "embed_dim": 8,
                "num_embeddings": N_CODES,
                "latent_channels": 8,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "resolution": 4,
            },
            vocabulary_map={**codes, "<image>": IMAGE},
        )
    )


def _letters(number: int) -> str:
    return "".join(chr(ord("A") + int(digit)) for digit in str(number))


def _qwen2_5_vl(text: dict) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    return hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": rope},
            vision_config={
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "patch_size": 4,
                "out_hidden_size": WIDTH,
                "fullatt_block_indexes": [1],
                "window_size": 8,
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=VISION_START,
            vision_end_token_id=VISION_END,
        )
    )


def _qwen3_vl(text: dict) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    return hf.Qwen3VLForConditionalGeneration(
        hf.Qwen3VLConfig(
            text_config={**text, "head_dim": 8, "rope_parameters": rope},
            vision_config={
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "patch_size": 4,
                "out_hidden_size": WIDTH,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 1],
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=VISION_START,
            vision_end_token_id=VISION_END,
        )
    )


def _internvl(text: dict) -> Any:
    return hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(
            text_config={"model_type": "qwen2", **text},
            vision_config={**VISION, "image_size": [16, 16], "patch_size": [4, 4]},
            image_token_id=IMAGE,
            image_seq_length=4,
        )
    )


def _llava_onevision(text: dict) -> Any:
    return hf.LlavaOnevisionForConditionalGeneration(
        hf.LlavaOnevisionConfig(
            text_config={"model_type": "qwen2", **text},
            vision_config={
                "model_type": "siglip_vision_model",
                **VISION,
                "image_size": 8,
                "patch_size": 4,
                "vision_use_head": False,
            },
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=[[8, 8]],
        )
    )


def _llama(text: dict) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**text, "num_key_value_heads": text["num_attention_heads"]}))


def _llama_gqa(text: dict) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**text, "num_key_value_heads": 1}))


def _qwen2(text: dict) -> Any:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**text))


def _qwen2_sliding(text: dict) -> Any:
    """Layers 1 and 2 see only the last four tokens; layer 0 sees everything."""
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**text, **window))


_FACTORIES = {
    "janus": _janus,
    "emu3": _emu3,
    "chameleon": _chameleon,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "llava_onevision": _llava_onevision,
    "llama": _llama,
    "llama_gqa": _llama_gqa,
    "qwen2": _qwen2,
    "qwen2_sliding": _qwen2_sliding,
}
MULTIMODAL = ("janus", "emu3", "chameleon", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision")
NAMES = tuple(_FACTORIES)


def tiny_model(name: str, seed: int = 0, dropout: float = 0.0, **text: Any) -> Any:
    """A random model of the family; `text` overrides entries of the decoder's configuration (see TEXT)."""
    torch.manual_seed(seed)
    return _FACTORIES[name]({**TEXT, "attention_dropout": dropout, **text}).eval()


@dataclass
class TinyBatch:
    inputs: dict[str, Tensor]  # what model(**inputs) takes
    query_mask: Tensor  # bool [B, S]: the answer
    key_mask: Tensor  # bool [B, S]: the image tokens; in text-only families two words stand in for them
    attention_mask: Tensor  # [B, S], 1 on real tokens


def tiny_batch(name: str, padding: str = "left", seed: int = 1) -> TinyBatch:
    """Two samples of unequal length; `padding`: "left", "right", or "none" (then both have full length)."""
    torch.manual_seed(seed)
    image, n_image = _image_inputs(name)
    rows = []  # (ids, query, key) of each sample
    for extra in (3, 3 if padding == "none" else 0):
        before, after, answer = _words(2 + extra), _words(2), _words(4)
        span = torch.full((n_image,), IMAGE) if image else _words(2)
        wrap = (
            [torch.tensor([t]) for t in (VISION_START, VISION_END)]
            if name.startswith("qwen3")
            else [None, None]
        )
        parts = [torch.tensor([BOS]), before, wrap[0], span, wrap[1], after, answer]
        marks = [0, 0, 0, 1, 0, 0, 2]
        kept = [(p, torch.full_like(p, m)) for p, m in zip(parts, marks, strict=True) if p is not None]
        rows.append(tuple(torch.cat(column) for column in zip(*kept, strict=True)))
    length = max(len(ids) for ids, _ in rows)

    def pad(x: Tensor, value: int) -> Tensor:
        fill = torch.full((length - len(x),), value)
        return torch.cat([fill, x] if padding == "left" else [x, fill])

    ids = torch.stack([pad(i, PAD) for i, _ in rows])
    role = torch.stack([pad(m, 0) for _, m in rows])
    attention_mask = torch.stack([pad(torch.ones_like(i), 0) for i, _ in rows])
    inputs = {"input_ids": ids, "attention_mask": attention_mask, **image}
    if name.startswith("qwen") and image:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return TinyBatch(inputs, role == 2, role == 1, attention_mask)


def _words(n: int) -> Tensor:
    return torch.randint(FIRST_WORD, FIRST_CODE, (n,))


def _image_inputs(name: str) -> tuple[dict[str, Tensor], int]:
    """Pixels of two random pictures as the family wants them, and image tokens a picture."""
    if name == "janus":
        return {"pixel_values": torch.randn(2, 3, 8, 8)}, 4
    if name == "emu3":  # the VQ halves the side twice: 2 x 2 codes and an end of line after each row
        return {"pixel_values": torch.randn(2, 3, 4, 4), "image_sizes": torch.tensor([[4, 4], [4, 4]])}, 6
    if name == "chameleon":
        return {"pixel_values": torch.randn(2, 3, 4, 4)}, 4
    if name in ("qwen2_5_vl", "qwen3_vl"):  # 4 x 4 patches of 2 x 3 x 4 x 4 values, merged 2 x 2
        return {
            "pixel_values": torch.randn(32, 96),
            "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
        }, 4
    if name == "internvl":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}, 4
    if name == "llava_onevision":  # one base picture, one crop with a newline after each row
        return {"pixel_values": torch.randn(2, 2, 3, 8, 8), "image_sizes": torch.tensor([[8, 8], [8, 8]])}, 10
    return {}, 0
