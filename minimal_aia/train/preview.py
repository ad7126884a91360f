"""What a model will be asked: the first batch in words, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minimal_aia.models.base import Adapter, Batch

SHOWN = 300  # characters of a span


def preview(adapter: Adapter, batches: Mapping[str, Batch], definition: str = "paper", rows: int = 1) -> str:
    """The spans and labels of the first `rows` samples a task, decoded. The adapter needs no weights."""
    lines = []
    for task, batch in batches.items():
        query, key = adapter.spans(batch, definition)
        labels = adapter.label_mask(batch)
        real = batch.attention_mask.bool()
        lines.append(
            f"{task}: {len(batch)} samples of {real.sum(1).min()} to {real.sum(1).max()} tokens, "
            f"{1 - real.float().mean():.0%} padding, {int(labels.sum())} labels"
        )
        for row in range(min(rows, len(batch))):
            lines.append(f"  {batch.ids[row]}")
            spans = {"queries": query, "keys": key, "labels": labels, "all": real}
            for name, mask in spans.items():
                count = int(mask[row].sum())
                lines.append(f"    {name:8}{count:6}  {_words(adapter, batch, row, mask[row])}".rstrip())
    return "\n".join(lines)


def _words(adapter: Adapter, batch: Batch, row: int, mask: Tensor) -> str:
    """The marked tokens as text: runs of them divided by |, long runs of equal tokens and codes shortened."""
    ids = batch.inputs["ids" if "ids" in batch.inputs else "input_ids"][row]
    places = mask.nonzero().flatten()
    if not len(places):
        return "(none)"
    breaks = (places.diff() > 1).nonzero().flatten() + 1
    runs = torch.tensor_split(ids[places], breaks.tolist())
    text = " | ".join(_run(adapter, run.tolist()) for run in runs)
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"


def _run(adapter: Adapter, ids: list[int]) -> str:
    image = getattr(adapter, "image_token_id", None)
    pieces: list[str] = []
    some: list[int] = []
    n_image = 0

    def flush() -> None:
        nonlocal n_image
        if some:
            pieces.append(repr(_decode(adapter, some)))
            some.clear()
        if n_image:
            pieces.append(f"[{n_image} image tokens]")
            n_image = 0

    for token in ids:
        if (is_image := _is_code(adapter, token) or token == image) != bool(n_image):
            flush()
        if is_image:
            n_image += 1
        else:
            some.append(token)
    flush()
    return " ".join(pieces)


def _is_code(adapter: Adapter, token: int) -> bool:
    from minimal_aia.lab.sequences import FIRST_CODE

    return adapter.family == "lab" and token >= FIRST_CODE


def _decode(adapter: Any, ids: list[int]) -> str:
    if adapter.family == "lab":
        from minimal_aia.lab.sequences import WORDS

        return " ".join(WORDS[token] for token in ids)
    return str(adapter.tokenizer.decode(ids))
