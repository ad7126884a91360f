"""Chameleon, understanding. Its chat format is text with a separator after every turn; there is no template
file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minimal_aia.models.chat import ChatAdapter
from minimal_aia.models.text import Spans, fill

if TYPE_CHECKING:
    from minimal_aia.data import Sample


class ChameleonAdapter(ChatAdapter):
    """Chameleon 7B and 30B (`ChameleonForConditionalGeneration`).

    Generation is left out: the released weights do not draw, and the library class sets the logits of image
    tokens to their minimum.
    """

    def render(self, sample: Sample, task: str) -> tuple[str, Spans]:
        # The processor itself adds the separator after the last turn.
        separator = self.tokenizer.sep_token or ""
        texts = [part for turn in sample.turns for part in turn]

        def conversation(parts: list[str]) -> str:
            return self.image_token * len(sample.images) + separator.join(parts)

        text, spans = fill(conversation, texts, self.name)
        return text, spans[1::2]
