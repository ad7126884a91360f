"""Emu3, both tasks: one vocabulary for words and image codes, so both are the same kind of sequence.

Generation, as the processor lays it out: begin, prompt, image start, "height*width", the image, image end.
Understanding: the chat template. In both, the image's own tokens are its codes and the line end after
each row of codes: the library puts one placeholder for each, and the model predicts line ends like codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minimal_aia.models.base import Batch
from minimal_aia.models.chat import ChatAdapter
from minimal_aia.models.draw import draw_tokens, own_seed
from minimal_aia.models.text import Spans, token_mask

if TYPE_CHECKING:
    from minimal_aia.data import Sample


class Emu3Adapter(ChatAdapter):
    """Emu3-Chat, Emu3-Gen and Emu3-Stage1 in Hugging Face layout (`Emu3ForConditionalGeneration`).

    Options beside those of `ChatAdapter`: `image_area`, pixels of a drawn picture (default 720 x 720).
    """

    tasks = ("generation", "understanding")

    def __init__(
        self,
        name: str,
        model: Any,
        processor: Any,
        family: str = "emu3",
        image_token_id: int | None = None,
        draw: bool = False,
        seed: int = 0,
        image_area: int = 720 * 720,
    ) -> None:
        super().__init__(name, model, processor, family, image_token_id, draw, seed)
        self.image_area = image_area

    def why_not(self, sample: Sample, task: str) -> str | None:
        reason = super().why_not(sample, task)
        return self.no_target(sample) if reason is None and task == "generation" else reason

    def render(self, sample: Sample, task: str) -> tuple[str, Spans]:
        if task == "understanding":
            return super().render(sample, task)
        prompt = sample.turns[0][0]
        return prompt + self.image_token, [(0, len(prompt))]

    def collate(self, samples: Sequence[Sample], task: str) -> Batch:
        if task == "understanding" or all(sample.images for sample in samples):
            return super().collate(samples, task)
        self.check(samples, task)
        made = [self._with_codes(sample) for sample in samples]
        front = len(self.processor.bos_token)
        tokens = self.tokenizer(
            [text for text, _ in made],
            padding=True,
            padding_side="right",
            return_tensors="pt",
            return_offsets_mapping=True,
        )
        ids, real = tokens["input_ids"], tokens["attention_mask"].bool()
        words = token_mask(tokens["offset_mapping"], [[(front, front + len(s.turns[0][0]))] for s in samples])
        return Batch(
            inputs={
                "input_ids": ids,
                "attention_mask": tokens["attention_mask"],
                "codes": torch.cat([codes for _, codes in made]),
            },
            query_mask=self.image_mask(ids, task) & real,
            key_mask=words & real,
            attention_mask=tokens["attention_mask"],
            ids=[sample.id for sample in samples],
            task=task,
        ).to(self.device, self.dtype)

    def _with_codes(self, sample: Sample) -> tuple[str, Tensor]:
        """A generation sample's whole text, and the codes of its picture, encoded or drawn. codes: int [N]"""
        if sample.images:
            made = self.processor.image_processor(self.pictures([sample])[0], return_tensors="pt")
            height, width = (int(side) // self.processor.downsample_ratio for side in made["image_sizes"][0])
            codes = self._codes(made["pixel_values"].to(self.device, self.dtype), made["image_sizes"])
        else:
            size = self.processor.calculate_generate_size(
                "1:1", self.image_area, self.processor.downsample_ratio
            )
            height, width = size
            codes = self._draw(sample, height, width)
        parts = self.processor
        return (
            f"{parts.bos_token}{sample.turns[0][0]}{parts.image_start_token}{height}*{width}"
            f"{parts.fake_token_around_image}{self.image_token * len(codes)}{parts.eof_token}"
            f"{parts.image_end_token}"
        ), codes

    def _draw(self, sample: Sample, height: int, width: int) -> Tensor:
        """Draw rows of codes, each closed by the line end, after the prompt; guidance 3, best 2048, as its
        authors."""
        if sample not in self._drawn:
            vocabulary: dict[str, int] = self.model.config.vocabulary_map
            codes = torch.zeros(
                self.model.config.text_config.vocab_size, dtype=torch.bool, device=self.device
            )
            codes[[i for token, i in vocabulary.items() if token.startswith("<|visual token")]] = True
            line_end = torch.zeros_like(codes)
            line_end[vocabulary["<|extra_200|>"]] = True
            parts = self.processor
            ends = f"{parts.image_start_token}{height}*{width}{parts.fake_token_around_image}"
            prompt, negative = (
                self.tokenizer(f"{parts.bos_token}{words}{ends}", return_tensors="pt")["input_ids"].to(
                    self.device
                )
                for words in (sample.turns[0][0], "")
            )
            with own_seed(self.seed, sample.id, self.device):
                self._drawn[sample] = draw_tokens(
                    self.model,
                    prompt,
                    height * (width + 1),
                    lambda step: line_end if (step + 1) % (width + 1) == 0 else codes,
                    guidance=3.0,
                    negative=negative,
                    top_k=2048,
                )
        return self._drawn[sample]

    def _codes(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        """Codes and line ends of pictures, one after the other. [I, 3, height, width], [I, 2] -> int [N]

        Encoded one by one at their own size: in a padded batch the padding would change the codes.
        """
        with torch.no_grad():
            codes = [
                self.model.model.get_image_tokens(picture[None, :, : size[0], : size[1]], size[None])
                for picture, size in zip(pixels, sizes)
            ]
        return torch.cat(codes)

    def token_ids(self, batch: Batch) -> Tensor:
        """The sequence in vocabulary ids, image codes in place of placeholders: input, and labels. [B, S]"""
        ids, codes = batch.inputs["input_ids"], batch.inputs.get("codes")
        if codes is None:
            codes = self._codes(batch.inputs["pixel_values"], batch.inputs["image_sizes"])
        return ids.masked_scatter(self.image_mask(ids, batch.task), codes.to(ids.dtype))

    def forward(self, batch: Batch) -> Any:
        mask = batch.inputs["attention_mask"]
        return self.model(
            input_ids=self.token_ids(batch), attention_mask=mask, use_cache=False, logits_to_keep=1
        )
