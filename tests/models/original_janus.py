"""Janus in the original layout, written again in plain torch: an independent reference for the converter.

Only module names, shapes and operations are those of DeepSeek's code (repository deepseek-ai/Janus,
janus/models); the language model is a Llama as its paper has it, by hand. Nothing here imports transformers
or the library.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from original_vq import VQ
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Sizes:
    vocab: int = 60
    width: int = 32  # of the language model
    feed: int = 48
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    theta: float = 10_000.0
    eps: float = 1e-6
    image: int = 16  # pixels a side
    patch: int = 4
    vit: int = 24
    vit_layers: int = 3
    vit_heads: int = 2
    ratio: float = 1.75
    depth: int = 2  # linear layers of the aligner
    codes: int = 40
    code: int = 8
    channels: int = 32
    levels: tuple[int, ...] = (1, 2, 1)
    blocks: int = 1
    latent: int = 16
    gen_depth: int = 2
    head: int = 32  # inner width of the generation head


# --- the language model -------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(s.width)), s.eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x.float() / (x.float().square().mean(-1, keepdim=True) + self.eps).sqrt()).to(x)


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary positions on [B, H, S, D]: pairs (d, d + D/2) turn by position * theta^(-2d/D)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * theta ** (-torch.arange(half) / half)  # [S, D/2]
    a, b = x[..., :half], x[..., half:]
    cos, sin = angle.cos().to(x), angle.sin().to(x)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class LlamaAttention(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        self.s, head = s, s.width // s.heads
        self.q_proj = nn.Linear(s.width, s.width, bias=False)
        self.k_proj = nn.Linear(s.width, s.kv_heads * head, bias=False)
        self.v_proj = nn.Linear(s.width, s.kv_heads * head, bias=False)
        self.o_proj = nn.Linear(s.width, s.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (p(x).view(b, n, -1, self.s.width // self.s.heads).transpose(1, 2)
                   for p in (self.q_proj, self.k_proj, self.v_proj))  # fmt: skip
        q, k = rotate(q, self.s.theta), rotate(k, self.s.theta)
        k, v = (t.repeat_interleave(self.s.heads // self.s.kv_heads, dim=1) for t in (k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
        return self.o_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1))


class LlamaMLP(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        self.gate_proj = nn.Linear(s.width, s.feed, bias=False)
        self.up_proj = nn.Linear(s.width, s.feed, bias=False)
        self.down_proj = nn.Linear(s.feed, s.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        return self.down_proj(gate * torch.sigmoid(gate) * self.up_proj(x))


class LlamaLayer(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        self.self_attn, self.mlp = LlamaAttention(s), LlamaMLP(s)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(s), RMSNorm(s)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        self.embed_tokens = nn.Embedding(s.vocab, s.width)
        self.layers = nn.ModuleList(LlamaLayer(s) for _ in range(s.layers))
        self.norm = RMSNorm(s)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Llama(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        self.model, self.lm_head = LlamaModel(s), nn.Linear(s.width, s.vocab, bias=False)


# --- SigLIP's tower and the aligners ------------------------------------------------------------------------


class FusedAttention(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        self.heads, self.qkv, self.proj = s.vit_heads, nn.Linear(s.vit, 3 * s.vit), nn.Linear(s.vit, s.vit)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, d))


class VisionMLP(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        inner = int(s.vit * s.ratio)
        self.fc1, self.fc2 = nn.Linear(s.vit, inner), nn.Linear(inner, s.vit)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class VisionBlock(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(s.vit, eps=1e-6), nn.LayerNorm(s.vit, eps=1e-6)
        self.attn, self.mlp = FusedAttention(s), VisionMLP(s)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Pool(nn.Module):
    """The unused pooling head: only its weights exist."""

    def __init__(self, s: Sizes):
        super().__init__()
        self.latent = nn.Parameter(torch.randn(1, 1, s.vit))
        self.q, self.kv, self.proj = (nn.Linear(s.vit, n) for n in (s.vit, 2 * s.vit, s.vit))
        self.norm, self.mlp = nn.LayerNorm(s.vit), VisionMLP(s)


class Tower(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, s.vit, s.patch, s.patch)
        self.pos_embed = nn.Parameter(torch.randn(1, (s.image // s.patch) ** 2, s.vit))
        self.blocks = nn.Sequential(*(VisionBlock(s) for _ in range(s.vit_layers)))
        self.norm, self.attn_pool = nn.LayerNorm(s.vit, eps=1e-6), Pool(s)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        return self.norm(self.blocks(patches + self.pos_embed))


class Aligner(nn.Module):
    def __init__(self, inputs: int, outputs: int, depth: int):
        super().__init__()
        linears = [nn.Linear(inputs, outputs), *(nn.Linear(outputs, outputs) for _ in range(depth - 1))]
        self.layers = nn.Sequential(*[m for linear in linears for m in (nn.GELU(), linear)][1:])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


# --- the whole ----------------------------------------------------------------------------------------------


class GenHead(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        self.output_mlp_projector = nn.Linear(s.width, s.head)
        self.vision_head = nn.Linear(s.head, s.codes)

    def forward(self, x: Tensor) -> Tensor:
        return self.vision_head(F.gelu(self.output_mlp_projector(x)))


class OriginalJanus(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        self.s = s
        self.vision_model = nn.Module()
        self.vision_model.vision_tower = Tower(s)
        self.aligner = Aligner(s.vit, s.width, s.depth)
        self.gen_vision_model = VQ(s)
        self.gen_aligner, self.gen_head = Aligner(s.code, s.width, s.gen_depth), GenHead(s)
        self.gen_embed = nn.Embedding(s.codes, s.code)
        self.language_model = Llama(s)

    def understand(self, ids: Tensor, pixels: Tensor, image_id: int) -> Tensor:
        """Logits [B, S, vocab]; the picture's features stand where `ids` is `image_id`."""
        words = self.language_model.model.embed_tokens(ids)
        image = self.aligner(self.vision_model.vision_tower(pixels))
        words = words.masked_scatter((ids == image_id)[..., None], image)
        return self.language_model.lm_head(self.language_model.model(words))

    def draw(self, ids: Tensor, codes: Tensor) -> Tensor:
        """Teacher-forced logits of the image tokens. ids [B, P], codes [B, N] -> [B, N, codes]"""
        image = self.gen_aligner(self.gen_embed(codes))
        x = torch.cat([self.language_model.model.embed_tokens(ids), image], 1)
        return self.gen_head(self.language_model.model(x)[:, ids.shape[1] - 1 : -1])


def random_model(sizes: Sizes | None = None, seed: int = 0) -> OriginalJanus:
    """Seeded, every parameter away from zero and one, attention far from flat, codebook of unlike lengths."""
    torch.manual_seed(seed)
    model = OriginalJanus(sizes or Sizes()).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")) or "layernorm" in name:
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim == 1:
                tensor.normal_(std=0.2)
            elif name.endswith(("qkv.weight", "q_proj.weight", "k_proj.weight")):
                tensor.mul_(4)
        vq = model.gen_vision_model  # features all around the origin, or one code would win everywhere
        features = vq.quant_conv(vq.encoder(torch.randn(8, 3, model.s.image, model.s.image)))
        vq.quant_conv.bias.sub_(features.mean((0, 2, 3)))
        weight = vq.quantize.embedding.weight
        weight.mul_(torch.linspace(0.2, 3, len(weight))[:, None])
    return model
