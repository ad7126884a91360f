"""Where a sample's own words end up among the tokens.

A chat template wraps words in role names and markers. To know which tokens are the words, the template is
rendered once with a private-use marker in place of each text; the rendered string is then cut at the
markers, the texts are put in, and their character ranges are known without searching. A fast tokenizer's
offsets turn character ranges into token masks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minimal_aia.models.base import AdapterError

MARK = re.compile("\ue000([0-9]+)\ue001")
Spans = list[tuple[int, int]]


def fill(
    render: Callable[[list[str]], str], texts: Sequence[str], name: str = "the model"
) -> tuple[str, Spans]:
    """`render(texts)` with the character range of each text in the result.

    render: builds the whole string from texts it does not look into; called with markers instead.
    AdapterError if a text is left out, repeated or moved by `render`.
    """
    rendered = render([f"\ue000{i}\ue001" for i in range(len(texts))])
    pieces = MARK.split(rendered)
    if [int(i) for i in pieces[1::2]] != list(range(len(texts))):
        raise AdapterError(
            f"{name}: its chat template does not keep every text once and in order: {rendered!r}"
        )
    result, spans = "", []
    for i, piece in enumerate(pieces):
        if i % 2:
            text = texts[int(piece)]
            spans.append((len(result), len(result) + len(text)))
            piece = text
        result += piece
    return result, spans


def messages(questions: Sequence[str], answers: Sequence[str], n_images: int) -> list[dict[str, Any]]:
    """A conversation for `apply_chat_template`: images first, then question, answer, question, answer, ..."""
    conversation: list[dict[str, Any]] = []
    for turn, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        images = [{"type": "image"}] * (n_images if turn == 0 else 0)
        conversation.append({"role": "user", "content": [*images, {"type": "text", "text": question}]})
        conversation.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return conversation


def shift_spans(spans: Spans, text: str, placeholder: str, replacements: Sequence[dict[str, Any]]) -> Spans:
    """Character ranges in `text` -> the same in the string a processor made of it.

    The processor may put something in front and replaces each `placeholder` by a longer string.
    replacements: its `text_replacement_offsets` for this text ("span" before, "new_span" after).
    """
    if text.count(placeholder) != len(replacements):
        raise AdapterError(
            f"{text.count(placeholder)} image placeholders, but {len(replacements)} were replaced"
        )
    front = replacements[0]["span"][0] - text.index(placeholder) if replacements else 0

    def moved(position: int) -> int:
        before = [r for r in replacements if r["span"][1] <= position + front]
        grown = sum((r["new_span"][1] - r["new_span"][0]) - (r["span"][1] - r["span"][0]) for r in before)
        return position + front + grown

    return [(moved(begin), moved(end)) for begin, end in spans]


def token_mask(offsets: Tensor, spans: Sequence[Spans]) -> Tensor:
    """True where a token shares a character with one of its row's ranges.

    offsets: [B, S, 2] character ranges from a fast tokenizer; empty for added and padding tokens.
    spans: one list of ranges a row. Returns bool [B, S].
    """
    begin, end = offsets[..., 0], offsets[..., 1]
    mask = torch.zeros_like(begin, dtype=torch.bool)
    for row, ranges in enumerate(spans):
        for first, last in ranges:
            if first < last:  # an empty text marks nothing, not even the token around it
                mask[row] |= (begin[row] < last) & (end[row] > first) & (end[row] > begin[row])
    return mask


def require_offsets(tokenizer: Any, name: str) -> None:
    """AdapterError if the tokenizer cannot say which characters a token stands for."""
    if not getattr(tokenizer, "is_fast", False):
        raise AdapterError(f"{name}: its tokenizer gives no character offsets; a tokenizer.json is needed")


def special_inside(text: str, tokenizer: Any, more: Sequence[str] = ()) -> str | None:
    """What is wrong with `text`: it spells out a special token, and would be read as that; or None."""
    for token in (*tokenizer.all_special_tokens, *more):
        if token in text:
            return f"its text spells out the special token {token!r}"
    return None
