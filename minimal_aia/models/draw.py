"""Draw pictures from prompts, many at a time: one decoding loop for every family that draws token by token.

Every picture has random numbers of its own, drawn beforehand on the CPU from its own seed: one uniform number
a token, turned into a code by inverting the cumulative distribution. What is drawn does therefore not depend
on the batch it is in, on the device's random generator, or on what was drawn before. (A GPU in half precision
computes logits whose last digits depend on the batch size, so a code can still flip there.)

Classifier-free guidance runs prompt and negative prompt side by side in one batch of twice the size:
logits = negative + guidance * (prompt - negative).

The paper measures intensity while models generate. A causal row does not see what comes after it, so one pass
over the finished sequence gives the same numbers as the steps that drew it: `Adapter.drawn` makes the picture
that a sample without one lacks, and the rest is teacher forcing.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image


def image_seed(seed: int, prompt_id: str, number: int = 0) -> int:
    """The seed of the `number`-th picture of a prompt: 63 bits that depend on these three alone."""
    digest = hashlib.sha256(f"{seed}\n{prompt_id}\n{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def noise_seed(seed: int, sample_id: str) -> int:
    """The seed of the noise that a diffusion model starts from: 31 bits, as some generators take no more."""
    return (seed + zlib.crc32(sample_id.encode())) % 2**31


def uniform_numbers(seeds: Sequence[int], n: int) -> Tensor:
    """`n` numbers in [0, 1) for every seed. float64 [len(seeds), n], on the CPU"""
    return torch.stack(
        [torch.rand(n, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
    )


def pick(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int = 0) -> Tensor:
    """The entry of softmax(logits / temperature) in whose share of [0, 1) the number falls.

    logits: float [B, V]; uniform: float64 [B]; top_k: only the k largest are possible (0: all). -> int [B]
    """
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    place = "cpu" if logits.device.type == "mps" else logits.device  # no float64 there
    total = (logits.to(place).double() / temperature).softmax(-1).cumsum(-1)  # [B, V]
    found = torch.searchsorted(total, uniform.to(place)[:, None] * total[:, -1:], right=True)
    return found.clamp(max=logits.shape[-1] - 1)[:, 0].to(logits.device)


class Drawer:
    """What the loop has to know of a family; each family's own stands beside its adapter."""

    n_tokens: int  # a picture
    guidance: float  # the family's own defaults
    top_k: int = 0

    def __init__(self, adapter: Any) -> None:
        self.adapter, self.model = adapter, adapter.model

    def prompt(self, text: str) -> list[int]:
        """Token ids up to and with the mark after which the picture begins."""
        raise NotImplementedError

    def negative(self, text: str) -> list[int]:
        """The same without the words, for guidance."""
        return self.prompt("")

    def step(self, ids: Tensor, drawn: bool, **inputs: Any) -> tuple[Tensor, Any]:
        """ids: int [R, T], words, or (if `drawn`) one image token each -> logits [R, V] after them, cache."""
        raise NotImplementedError

    def allowed(self, position: int) -> Tensor | None:
        """bool [V]: what may stand at this position of the picture; None for everything."""
        return None

    def picture(self, tokens: Tensor) -> Image.Image:
        """The picture of image tokens, int [N]."""
        raise NotImplementedError


@torch.inference_mode()
def draw_tokens(
    drawer: Drawer,
    texts: Sequence[str],
    seeds: Sequence[int],
    guidance: float | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Tensor:
    """One picture's image tokens for each prompt and its seed; None means the family's default. int [B, N]"""
    guidance = drawer.guidance if guidance is None else guidance
    top_k = drawer.top_k if top_k is None else top_k
    rows = [drawer.prompt(text) for text in texts]
    if guidance != 1:
        rows += [drawer.negative(text) for text in texts]
    device, width = drawer.adapter.device, max(map(len, rows))
    ids = torch.tensor([[*[row[0]] * (width - len(row)), *row] for row in rows], device=device)  # [R, P]
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # padding on the left leaves every row at its own places
    uniform = uniform_numbers(seeds, drawer.n_tokens).to("cpu" if device.type == "mps" else device)
    cache, drawn = None, []
    for position in range(drawer.n_tokens):
        logits, cache = drawer.step(
            ids,
            position > 0,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        logits = logits.float()
        if guidance != 1:
            with_prompt, without = logits.chunk(2)
            logits = without + guidance * (with_prompt - without)
        possible = drawer.allowed(position)
        if possible is not None:
            logits = logits.masked_fill(~possible, -torch.inf)
        drawn.append(pick(logits, uniform[:, position], temperature, top_k))  # [B]
        ids = drawn[-1].repeat(len(rows) // len(texts))[:, None]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return torch.stack(drawn, dim=1)


@torch.inference_mode()
def draw(drawer: Drawer, texts: Sequence[str], seeds: Sequence[int], **settings: Any) -> list[Image.Image]:
    """One picture for each prompt and its seed. Decoded one by one: pixels do not depend on the batch.

    settings: guidance, temperature and top_k of `draw_tokens`.
    """
    return [drawer.picture(row) for row in draw_tokens(drawer, texts, seeds, **settings)]
