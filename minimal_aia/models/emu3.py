"""Emu3, both tasks: one vocabulary for words and image codes, so both are the same kind of sequence.

Generation, as the processor lays it out: begin, prompt, image start, "height*width", the image, image end.
Understanding: the chat template. In both, the image's own tokens are its codes and the line end after
each row of codes: the library puts one placeholder for each, and the model predicts line ends like codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minimal_aia.models.base import Batch, find_layers
from minimal_aia.models.chat import ChatAdapter
from minimal_aia.models.text import Spans

if TYPE_CHECKING:
    from minimal_aia.data import Sample


class Emu3Adapter(ChatAdapter):
    """Emu3-Chat, Emu3-Gen and Emu3-Stage1 in Hugging Face layout (`Emu3ForConditionalGeneration`)."""

    tasks = ("generation", "understanding")

    def why_not(self, sample: Sample, task: str) -> str | None:
        reason = super().why_not(sample, task)
        if reason is None and task == "generation" and len(sample.images) != 1:
            return "no target image; a teacher-forced pass needs one"
        return reason

    def render(self, sample: Sample, task: str) -> tuple[str, Spans]:
        if task == "understanding":
            return super().render(sample, task)
        prompt = sample.turns[0][0]
        return prompt + self.image_token, [(0, len(prompt))]

    def token_ids(self, batch: Batch) -> Tensor:
        """The sequence in vocabulary ids, image codes in place of placeholders: input, and labels. [B, S]

        Pictures are encoded one by one at their own size: in a padded batch the padding would change their
        codes.
        """
        ids, pixels = batch.inputs["input_ids"], batch.inputs["pixel_values"]
        with torch.no_grad():
            codes = [
                self.model.model.get_image_tokens(picture[None, :, : size[0], : size[1]], size[None])
                for picture, size in zip(pixels, batch.inputs["image_sizes"])
            ]
        return ids.masked_scatter(self.image_mask(ids, batch.task), torch.cat(codes).to(ids.dtype))

    def forward(self, batch: Batch) -> Any:
        mask = batch.inputs["attention_mask"]
        return self.model(
            input_ids=self.token_ids(batch), attention_mask=mask, use_cache=False, logits_to_keep=1
        )

    def layers(self) -> list[nn.Module]:
        text: Any = self.model.model.text_model
        return find_layers(text, text.config.num_hidden_layers)
