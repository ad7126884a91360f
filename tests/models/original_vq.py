"""The VQ model of Janus in the original layout, written again in plain torch (see original_janus.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class Res(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.conv1 = norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(swish(self.norm2(self.conv1(swish(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class ConvAttention(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2) for conv in (self.q, self.k, self.v))  # [B, C, N]
        weights = (q.mT @ k / q.shape[1] ** 0.5).softmax(-1)  # [B, N queries, N keys]
        return x + self.proj_out((v @ weights.mT).view_as(x))


class Half(nn.Module):
    """Encoder (down) or decoder (up): levels of residual blocks, attention at the coarsest, a middle."""

    def __init__(self, s: Any, down: bool):
        super().__init__()
        self.down, last = down, len(s.levels) - 1
        widths = [s.channels * m for m in s.levels]
        here = s.channels if down else widths[-1]
        self.conv_in = nn.Conv2d(3 if down else s.latent, here, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for level in range(len(widths)) if down else reversed(range(len(widths))):
            block = nn.Module()
            block.res, block.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(s.blocks + (not down)):
                block.res.append(Res(here, widths[level]))
                here = widths[level]
                if level == last:
                    block.attn.append(ConvAttention(here))
            if down and level != last:
                block.downsample = nn.Module()
                block.downsample.conv = nn.Conv2d(here, here, 3, stride=2)
            if not down and level != 0:
                block.upsample = nn.Module()
                block.upsample.conv = nn.Conv2d(here, here, 3, padding=1)
            self.conv_blocks.append(block)
        middle = widths[-1]
        self.mid = nn.ModuleList([Res(middle, middle), ConvAttention(middle), Res(middle, middle)])
        self.norm_out = norm(here)
        self.conv_out = nn.Conv2d(here, s.latent if down else 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        if not self.down:
            x = self.middle(x)
        for block in self.conv_blocks:
            for i, res in enumerate(block.res):
                x = res(x)
                if len(block.attn):
                    x = block.attn[i](x)
            if hasattr(block, "downsample"):  # a column and a row of zeros, right and below
                x = block.downsample.conv(F.pad(x, (0, 1, 0, 1)))
            if hasattr(block, "upsample"):
                x = block.upsample.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        if self.down:
            x = self.middle(x)
        return self.conv_out(swish(self.norm_out(x)))

    def middle(self, x: Tensor) -> Tensor:
        for module in self.mid:
            x = module(x)
        return x


class Quantizer(nn.Module):
    def __init__(self, s: Any):
        super().__init__()
        self.embedding = nn.Embedding(s.codes, s.code)
        self.register_buffer("codebook_used", torch.randn(100))


class VQ(nn.Module):
    def __init__(self, s: Any):
        super().__init__()
        self.encoder, self.decoder, self.quantize = Half(s, True), Half(s, False), Quantizer(s)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(s.latent, s.code, 1), nn.Conv2d(s.code, s.latent, 1)

    def codebook(self) -> Tensor:
        weight = self.quantize.embedding.weight
        return weight / weight.norm(dim=-1, keepdim=True)

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> codes [B, N]: the code nearest in direction."""
        z = self.quant_conv(self.encoder(pixels)).flatten(2).mT  # [B, N, code]
        return torch.cdist(z / z.norm(dim=-1, keepdim=True), self.codebook()[None]).argmin(-1)

    def decode(self, codes: Tensor) -> Tensor:
        side = int(codes.shape[1] ** 0.5)
        return self.decoder(self.post_quant_conv(self.codebook()[codes].mT.unflatten(2, (side, side))))
