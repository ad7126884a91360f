"""Teach a `JanusVQVAE` the lab's k-means codebook, so that the Janus-like model is Janus all through.

Plain VQ-VAE training does not work with this class (its forward pass gives the encoder no reconstruction
gradient), so the encoder is distilled to name the k-means code of every patch and the decoder to paint it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from minimal_aia.lab import images, scenes
from minimal_aia.lab.models import vq_config


def distill(
    codebook: np.ndarray, steps: int = 2400, batch: int = 24, seed: int = 0, progress: bool = True
) -> JanusVQVAE:
    """A trained, frozen image tokenizer that agrees with the k-means one."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model: Any = JanusVQVAE(JanusVQVAEConfig(**vq_config()))
    # `decode` normalises codes and `encode` does not: a fixed unit-norm codebook makes the two agree.
    codes = nn.functional.normalize(torch.randn(model.quantize.embedding.weight.shape), dim=-1)
    model.quantize.embedding.weight.data.copy_(codes)
    model.quantize.embedding.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="image tokenizer", disable=not progress):
        pictures = np.stack([scenes.render(s) for s in scenes.draw_scenes(rng, batch)])
        codes_of = images.encode(pictures, codebook)
        target = torch.from_numpy(images.decode(codes_of, codebook)).permute(0, 3, 1, 2) / 127.5 - 1
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
        ids: Any = torch.from_numpy(codes_of)
        latent = model.quant_conv(model.encoder(pixels)).flatten(2).transpose(1, 2)  # [B, 36, D]
        # Nearest code by distance = largest of 2 z·e - |e|², and all codes have norm 1.
        naming = nn.functional.cross_entropy((10 * latent @ codes.T).flatten(0, 1), ids.flatten())
        # Latents near the sphere keep the distance-based argmin well conditioned.
        radius = (latent.norm(dim=-1) - 1).square().mean()
        painting = nn.functional.mse_loss(model.decode(ids), target)
        optimizer.zero_grad()
        (naming + 0.1 * radius + painting).backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def agreement(model: Any, codebook: np.ndarray, count: int = 500, seed: int = 1) -> dict[str, float]:
    """On held-out scenes: share of patches named alike, and of scenes read alike after a round trip."""
    found = scenes.draw_scenes(np.random.default_rng(seed), count, held_out=True)
    pictures = np.stack([scenes.render(s) for s in found])
    ids = images.encode(pictures, codebook)
    named = model.encode(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1).image_tokens.view(
        count, -1
    )
    painted = model.decode(named).permute(0, 2, 3, 1).add(1).mul(127.5).clamp(0, 255).round().byte().numpy()
    read = np.mean([images.same_content(images.detect(p), s) for p, s in zip(painted, found, strict=True)])
    return {"same_code": float((named.numpy() == ids).mean()), "read_after_round_trip": float(read)}
