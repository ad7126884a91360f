"""Putting BAGEL together from its weights folder and a checkout of its authors' code, without flash-attn."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from minimal_aia.models.remote import authors_code

REPOSITORY = "github.com/ByteDance-Seed/Bagel"


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    **_unused: Any,
) -> Tensor:
    """flash-attn's packed attention, sample by sample: q [T, H, D], k and v [T', Hk, D] -> [T, H, D].

    Causal means what it means there: the last query sees the last key.
    """
    out = []
    bounds = zip(
        cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], cu_seqlens_k.tolist(), cu_seqlens_k.tolist()[1:]
    )
    for q0, q1, k0, k1 in bounds:
        query, key, value = (x.transpose(0, 1)[None] for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
        rows, columns = q1 - q0, k1 - k0
        mask = None
        if causal and rows > 1:
            mask = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
        out.append(
            F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)[0].transpose(
                0, 1
            )
        )
    return torch.cat(out)


def load_inferencer(folder: Path, code: str | Path | None, device_map: Any, dtype: torch.dtype) -> Any:
    """The authors' model, tokenizer, transforms and VAE put together as their own demo does."""
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch

    with _flash_attn_stood_in(), authors_code(str(folder), code, "inferencer", REPOSITORY) as inferencer:
        bagel = importlib.import_module("modeling.bagel")
        qwen2 = importlib.import_module("modeling.qwen2")
        autoencoder = importlib.import_module("modeling.autoencoder")
        data = importlib.import_module("data.data_utils")
        transforms = importlib.import_module("data.transforms")
        for part in ("qwen2_navit", "siglip_navit"):
            attention: Any = importlib.import_module(f"modeling.bagel.{part}")
            attention.flash_attn_varlen_func = varlen_attention

        text = bagel.Qwen2Config(**json.loads((folder / "llm_config.json").read_text()))
        text.qk_norm, text.tie_word_embeddings, text.layer_module = True, False, "Qwen2MoTDecoderLayer"
        vision = bagel.SiglipVisionConfig(**json.loads((folder / "vit_config.json").read_text()))
        vision.rope, vision.num_hidden_layers = False, vision.num_hidden_layers - 1
        vae, vae_config = autoencoder.load_ae(local_path=str(folder / "ae.safetensors"))
        config = bagel.BagelConfig(
            visual_gen=True,
            visual_und=True,
            llm_config=text,
            vit_config=vision,
            vae_config=vae_config,
            vit_max_num_patch_per_side=70,
            connector_act="gelu_pytorch_tanh",
            latent_patch_size=2,
            max_latent_size=64,
        )
        with init_empty_weights():
            model = bagel.Bagel(bagel.Qwen2ForCausalLM(text), bagel.SiglipVisionModel(vision), config)
            model.vit_model.vision_model.embeddings.convert_conv2d_to_linear(vision, meta=True)
        model = load_checkpoint_and_dispatch(
            model, str(folder / "ema.safetensors"), device_map=device_map, dtype=dtype
        ).eval()
        tokenizer, new_token_ids, _ = data.add_special_tokens(
            qwen2.Qwen2Tokenizer.from_pretrained(str(folder))
        )
        device = next(model.parameters()).device
        return inferencer.InterleaveInferencer(
            model,
            vae.to(device).eval(),
            tokenizer,
            transforms.ImageTransform(1024, 512, 16),
            transforms.ImageTransform(980, 224, 14),
            new_token_ids,
        )


@contextmanager
def _flash_attn_stood_in() -> Iterator[None]:
    """The authors' modules import flash_attn; where it is not installed, hand them our function."""
    if importlib.util.find_spec("flash_attn") is not None:
        yield
        return
    module: Any = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = varlen_attention
    sys.modules["flash_attn"] = module
    try:
        yield
    finally:
        del sys.modules["flash_attn"]
