"""Let a model draw the picture that a prompt-only sample lacks, so that there is something to teacher-force.

The paper measures intensity while models generate. A causal row does not see what comes after it, so one
pass over the finished sequence gives the same numbers as the steps that drew it; only the drawing itself
takes one step a token. Each sample has its own seed, made from its id: what is drawn does not depend on the
batch it is in.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def own_seed(seed: int, name: str, device: torch.device) -> Iterator[None]:
    """Random numbers that depend on `seed` and a sample's `name` only; the outer state is put back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed + zlib.crc32(name.encode()))
        yield


def draw_tokens(
    model: Any,
    prompt: Tensor,
    n: int,
    allowed: Callable[[int], Tensor],
    *,
    guidance: float | None = None,
    negative: Tensor | None = None,
    top_k: int = 0,
) -> Tensor:
    """Sample `n` image tokens after a prompt from a decoder whose vocabulary holds them.

    prompt: int [1, P]. allowed: step -> bool [V], the vocabulary entries possible at that step.
    guidance, negative: classifier-free guidance against a negative prompt, int [1, P'] (None: no guidance).
    Returns int [n].
    """
    from transformers import LogitsProcessor, LogitsProcessorList

    class Allowed(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores.masked_fill(~allowed(input_ids.shape[1] - prompt.shape[1]), -torch.inf)

    drawn = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        top_k=top_k,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=n,
        min_new_tokens=n,
        logits_processor=LogitsProcessorList([Allowed()]),
        **(
            {"guidance_scale": guidance, "negative_prompt_ids": negative}
            if guidance and negative is not None
            else {}
        ),
    )
    return drawn[0, prompt.shape[1] :]
