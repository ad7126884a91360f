"""Emu3, both tasks: one vocabulary for words and image codes, so both are the same kind of sequence.

Generation, as the processor lays it out: begin, prompt, image start, "height*width", the image, image end.
Understanding: the chat template. In both, the image's own tokens are its codes and the line end after
each row of codes: the library puts one placeholder for each, and the model predicts line ends like codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minimal_aia.models.chat import ChatAdapter
from minimal_aia.models.draw import Drawer
from minimal_aia.models.text import Spans
from minimal_aia.pictures import PictureCodes, picture_size

if TYPE_CHECKING:
    from PIL import Image

    from minimal_aia.data import Sample
    from minimal_aia.models.base import Batch
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

    def render(self, sample: Sample, task: str) -> tuple[str, Spans]:
        if task == "understanding":
            return super().render(sample, task)
        # A dropped prompt is an empty one, as guidance asks at inference (and as Emu3's authors trained).
        prompt = "" if sample.dropped else sample.turns[0][0]
        return prompt + self.image_token, [(0, len(prompt))]

    def process(
        self, texts: Sequence[str], spans: Sequence[Spans], samples: Sequence[Sample], task: str
    ) -> tuple[Any, list[Spans]]:
        if all(s.images and not any(isinstance(p, PictureCodes) for p in s.images) for s in samples):
            return super().process(texts, spans, samples, task)
        rows = zip(texts, spans, samples, strict=True)
        filled, placed, codes = zip(*(self._with_codes(*row) for row in rows))
        made = self.tokenize(filled)
        made["codes"] = torch.cat(codes)
        return made, list(placed)

    def _with_codes(self, text: str, spans: Spans, sample: Sample) -> tuple[str, Spans, Tensor]:
        """A sample as its processor lays it out, with the spans and the codes [N] of all its pictures."""
        parts, token, pictures = self.processor, self.image_token, self.codes_of(sample)
        made = [
            f"{parts.image_start_token}{picture.height}*{picture.width}{parts.fake_token_around_image}"
            f"{token * len(picture.codes)}{parts.eof_token}{parts.image_end_token}"
            for picture in pictures
        ]
        pieces = zip(text.split(token), [*made, ""], strict=True)
        filled = parts.bos_token + "".join(piece + picture for piece, picture in pieces)
        grown = [len(parts.bos_token), *(len(picture) - len(token) for picture in made)]

        def moved(position: int) -> int:
            return position + sum(grown[: text.count(token, 0, position) + 1])

        codes = torch.cat([picture.codes for picture in pictures])
        return filled, [(moved(begin), moved(end)) for begin, end in spans], codes

    def codes_of(self, sample: Sample) -> list[PictureCodes]:
        """A sample's pictures as codes: given, encoded here, or drawn for its prompt."""
        if not sample.images:
            drawer = Emu3Drawer(self)
            codes = self.drawn(sample, drawer, self.seed)
            return [PictureCodes(codes, drawer.height, drawer.width, sample.id)]
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

    def drawer(self) -> Drawer:
        return Emu3Drawer(self)

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
        return ids.masked_scatter(self.image_mask(ids), codes.to(ids.dtype))

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


class Emu3Drawer(Drawer):
    """Codes of the vocabulary, a line end after each row; guidance 3, best 2048, as the authors."""

    guidance = 3.0
    top_k = 2048

    def __init__(self, adapter: Emu3Adapter) -> None:
        super().__init__(adapter)
        parts, config = adapter.processor, adapter.model.config
        self.height, self.width = parts.calculate_generate_size(
            "1:1", adapter.image_area, parts.downsample_ratio
        )
        self.n_tokens = self.height * (self.width + 1)
        empty = torch.zeros(config.text_config.vocab_size, dtype=torch.bool, device=adapter.device)
        self.codes, self.line_end = empty, empty.clone()
        names = config.vocabulary_map
        self.codes[[i for name, i in names.items() if name.startswith("<|visual token")]] = True
        self.line_end[names["<|extra_200|>"]] = True

    def prompt(self, text: str) -> list[int]:
        parts = self.adapter.processor
        ends = f"{parts.image_start_token}{self.height}*{self.width}{parts.fake_token_around_image}"
        return list(self.adapter.tokenizer(f"{parts.bos_token}{text}{ends}")["input_ids"])

    def step(self, ids: Tensor, drawn: bool, **inputs: Any) -> tuple[Tensor, Any]:
        out = self.model.model.text_model(input_ids=ids, **inputs)
        return self.model.lm_head(out.last_hidden_state[:, -1]), out.past_key_values

    def allowed(self, position: int) -> Tensor:
        return self.line_end if (position + 1) % (self.width + 1) == 0 else self.codes

    def picture(self, tokens: Tensor) -> Image.Image:
        closed = torch.nn.functional.pad(tokens, (0, 3))  # the library cuts off three closing tokens
        return self.adapter.to_picture(
            self.model.model.decode_image_tokens(closed[None], self.height, self.width)
        )
