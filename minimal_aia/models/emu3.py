"""Emu3, both tasks: one vocabulary for words and image codes, so both are the same kind of sequence.

Generation, as the processor lays it out: begin, prompt, image start, "height*width", the image, image end.
Understanding: the chat template. In both, the image's own tokens are its codes and the line end after
each row of codes: the library puts one placeholder for each, and the model predicts line ends like codes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minimal_aia.models.base import Batch
from minimal_aia.models.chat import ChatAdapter
from minimal_aia.models.draw import draw_tokens, own_seed
from minimal_aia.models.text import Spans, shift_spans, token_mask
from minimal_aia.pictures import PictureCodes, picture_size

if TYPE_CHECKING:
    from minimal_aia.data import Sample
    from minimal_aia.pictures import Picture


class Emu3Adapter(ChatAdapter):
    """Emu3-Chat, Emu3-Gen and Emu3-Stage1 in Hugging Face layout (`Emu3ForConditionalGeneration`).

    Options beside those of `ChatAdapter`: `image_area`, pixels of a drawn picture (default 720 x 720).
    """

    tasks = ("generation", "understanding")
    drops_prompts = True
    coded_tasks = ("generation", "understanding")

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
        # A dropped prompt is an empty one, as guidance asks at inference (and as Emu3's authors trained).
        prompt = "" if sample.dropped else sample.turns[0][0]
        return prompt + self.image_token, [(0, len(prompt))]

    def collate(self, samples: Sequence[Sample], task: str) -> Batch:
        if all(s.images and not any(isinstance(p, PictureCodes) for p in s.images) for s in samples):
            return super().collate(samples, task)
        self.check(samples, task)
        texts, spans, codes = zip(*(self._with_codes(sample, task) for sample in samples))
        tokens = self.tokenizer(
            list(texts),
            padding=True,
            padding_side="right",
            return_tensors="pt",
            return_offsets_mapping=True,
        )
        ids, real = tokens["input_ids"], tokens["attention_mask"].bool()
        words = token_mask(tokens["offset_mapping"], spans) & real
        image = self.image_mask(ids, task) & real
        query, key = (words, image) if task == "understanding" else (image, words)
        return Batch(
            inputs={"input_ids": ids, "attention_mask": tokens["attention_mask"], "codes": torch.cat(codes)},
            query_mask=query,
            key_mask=key,
            attention_mask=tokens["attention_mask"],
            ids=[sample.id for sample in samples],
            task=task,
        ).to(self.device, self.dtype)

    def _with_codes(self, sample: Sample, task: str) -> tuple[str, Spans, Tensor]:
        """A sample as its processor lays it out, with the spans and the codes [N] of all its pictures."""
        text, spans = self.render(sample, task)
        pictures = self.codes_of(sample)
        parts, token = self.processor, self.image_token
        filled, offsets = parts.bos_token, []
        for piece, picture in zip(text.split(token), [*pictures, None]):
            filled += piece
            if picture is not None:
                made = (
                    f"{parts.image_start_token}{picture.height}*{picture.width}{parts.fake_token_around_image}"
                    f"{token * len(picture.codes)}{parts.eof_token}{parts.image_end_token}"
                )
                offsets.append((len(filled), len(filled) + len(made)))
                filled += made
        begins = [match.start() + len(parts.bos_token) for match in re.finditer(re.escape(token), text)]
        replaced = [
            {"span": (begin, begin + len(token)), "new_span": new} for begin, new in zip(begins, offsets)
        ]
        return filled, shift_spans(spans, text, token, replaced), torch.cat([p.codes for p in pictures])

    def codes_of(self, sample: Sample) -> list[PictureCodes]:
        """A sample's pictures as codes: given, encoded here, or drawn for its prompt."""
        if not sample.images:
            height, width = self.processor.calculate_generate_size(
                "1:1", self.image_area, self.processor.downsample_ratio
            )
            return [PictureCodes(self._draw(sample, height, width), height, width, sample.id)]
        if all(isinstance(picture, PictureCodes) for picture in sample.images):
            return [picture for picture in sample.images if isinstance(picture, PictureCodes)]
        made = self.processor.image_processor(self.pictures([sample])[0], return_tensors="pt")
        pixels, sizes = made["pixel_values"].to(self.device, self.dtype), made["image_sizes"]
        encoded = []
        for picture, size in zip(pixels, sizes):
            height, width = (int(side) // self.processor.downsample_ratio for side in size)
            encoded.append(PictureCodes(self._codes(picture[None], size[None]), height, width, sample.id))
        return encoded

    def encode_pictures(self, samples: Sequence[Sample]) -> list[list[PictureCodes]]:
        return [
            [replace(picture, codes=picture.codes.cpu()) for picture in self.codes_of(sample)]
            for sample in samples
        ]

    def picture_length(self, picture: Picture) -> int:
        if isinstance(picture, PictureCodes):
            return len(picture.codes)
        tokens = self.processor._get_num_multimodal_tokens(image_sizes=[picture_size(picture)])
        return int(tokens.num_image_tokens[0])

    def set_pictures(self, fit: str = "pad", area: int = 0) -> None:
        """A picture keeps its shape, but for the rounding of its sides to a multiple of eight pixels."""
        if area:
            images = self.processor.image_processor
            images.min_pixels = images.max_pixels = area

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

    def label_states(self, batch: Batch) -> tuple[Tensor, nn.Module, Tensor]:
        ids, mask = self.token_ids(batch), batch.inputs["attention_mask"]
        hidden = self.model.model.text_model(
            input_ids=ids, attention_mask=mask, use_cache=False
        ).last_hidden_state
        wanted = self.label_mask(batch)[:, 1:]
        return hidden[:, :-1][wanted], self.model.lm_head, ids[:, 1:][wanted]

    def forward(self, batch: Batch) -> Any:
        mask = batch.inputs["attention_mask"]
        return self.model(
            input_ids=self.token_ids(batch), attention_mask=mask, use_cache=False, logits_to_keep=1
        )
