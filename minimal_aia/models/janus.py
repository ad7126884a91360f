"""Janus and Janus-Pro, both tasks. Two vision paths meet in one language model.

Understanding is the ordinary forward of the library class. Generation is not offered by it outside
`generate`: the target picture becomes codes by the VQ encoder, the codes become embeddings by the
generation embedding and its aligner, and those stand after the prompt in one pass of the language model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minimal_aia.data import Sample
from minimal_aia.models.base import AdapterError, Batch
from minimal_aia.models.chat import ChatAdapter
from minimal_aia.models.convert_keys import is_unit, unit
from minimal_aia.models.draw import Drawer
from minimal_aia.models.text import Spans, fill
from minimal_aia.pictures import PictureCodes, crop_to_fit
from minimal_aia.record import shift_left

if TYPE_CHECKING:
    from PIL import Image

    from minimal_aia.models.registry import Family


class JanusAdapter(ChatAdapter):
    """Janus-1.3B, Janus-Pro-1B and -7B in Hugging Face layout (`JanusForConditionalGeneration`)."""

    tasks = ("generation", "understanding")
    definitions = ("paper", "predicting", "code")
    drops_prompts = True
    coded_tasks = ("generation",)  # understanding sees pixels
    # How a target picture becomes square: by grey bars, as the processor does, or by "crop". The released
    # training code crops targets and leaves understanding to the processor (its filter differs for pictures
    # twice as large and more). A model trained on padded targets learns to draw the bars.
    image_fit = "pad"

    @classmethod
    def load(cls, name: str, family: Family, **options: Any) -> JanusAdapter:
        adapter = super().load(name, family, **options)
        codebook = adapter.model.model.vqmodel.quantize.embedding.weight
        # DeepSeek's code gives the codebook's rows length one at each use; the library does so in `decode`
        # only, and would name other codes for a picture than those that the model was trained to draw.
        if codebook.device.type != "meta" and not is_unit(codebook.detach()):
            with torch.no_grad():
                codebook.copy_(unit(codebook))
        return adapter  # type: ignore[return-value]

    def render(self, sample: Sample, task: str) -> tuple[str, Spans]:
        if task == "understanding":
            return super().render(sample, task)

        def template(texts: list[str]) -> str:
            user = {"role": "user", "content": [{"type": "text", "text": texts[0]}]}
            return self.chat([user], add_generation_prompt=True)

        text, spans = fill(template, [sample.turns[0][0]], self.name)
        image = self.image_token * self.processor.num_image_tokens
        return text + self.processor.image_start_token + image, spans

    def process(
        self, texts: Sequence[str], spans: Sequence[Spans], samples: Sequence[Sample], task: str
    ) -> tuple[Any, list[Spans]]:
        if task != "generation":
            return super().process(texts, spans, samples, task)
        made = self.tokenize(texts)
        if all(sample.images and not isinstance(sample.images[0], PictureCodes) for sample in samples):
            made["pixel_values"] = self.pixels(samples)
        else:
            made["codes"] = torch.stack([self.codes_of(sample) for sample in samples])
        dropped = torch.tensor([sample.dropped for sample in samples])
        self._drop_prompts(made["input_ids"], made["attention_mask"].bool() & dropped[:, None])
        return made, [[] if sample.dropped else s for s, sample in zip(spans, samples, strict=True)]

    def _drop_prompts(self, input_ids: Tensor, rows: Tensor) -> None:
        """Pad over prompts, in place, as guidance does at inference (`generate`; the authors' training too).

        All but begin-of-sentence and begin-of-image becomes padding; it keeps the prompt's length and is
        attended to. rows: bool [B, S], the real tokens of samples whose prompt is dropped.
        """
        begin = self.tokenizer.convert_tokens_to_ids(self.processor.image_start_token)
        kept = (input_ids == self.tokenizer.bos_token_id) | (input_ids == begin)
        input_ids[rows & ~kept & ~self.image_mask(input_ids)] = self.tokenizer.pad_token_id

    def pixels(self, samples: Sequence[Sample]) -> Tensor:
        """The target pictures of samples. [B, 3, height, width]"""
        pictures = [picture for row in self.pictures(samples) for picture in row]
        if self.image_fit == "crop":
            size = self.processor.image_processor.size
            pictures = [crop_to_fit(picture, size["height"], size["width"]) for picture in pictures]
        made = self.processor.image_processor(pictures, return_tensors="pt")
        return made["pixel_values"].to(self.device, self.dtype)

    def codes_of(self, sample: Sample) -> Tensor:
        """The codes of a sample's target picture, or of one that the model draws once for its prompt. [N]"""
        if sample.images and isinstance(sample.images[0], PictureCodes):
            return sample.images[0].codes.to(self.device)
        if sample.images:
            return self.image_codes(self.pixels([sample]))[0]
        return self.drawn(sample, self.drawer(), self.seed)

    def drawer(self) -> Drawer:
        return JanusDrawer(self)

    def encode_pictures(self, samples: Sequence[Sample]) -> list[list[PictureCodes]]:
        codes = self.image_codes(self.pixels(samples)).cpu()
        side = math.isqrt(codes.shape[1])
        return [[PictureCodes(row, side, side, s.id)] for s, row in zip(samples, codes, strict=True)]

    def set_pictures(self, fit: str = "pad", area: int = 0) -> None:
        self.image_fit = fit

    def image_codes(self, pixel_values: Tensor) -> Tensor:
        """The VQ codes of pictures. [B, 3, height, width] -> int [B, N]"""
        with torch.no_grad():
            encoded = self.model.model.vqmodel.encode(pixel_values)
        return encoded.image_tokens.view(len(pixel_values), -1)

    def generation_embeddings(self, batch: Batch, codes: Tensor) -> Tensor:
        """The prompt's embeddings with those of the image codes [B, N] at the image positions. [B, S, D]"""
        where = self.image_mask(batch.inputs["input_ids"])
        if int(where.sum()) != codes.numel():
            raise AdapterError(
                f"{self.name}: its picture makes {codes.shape[1]} codes, its processor leaves room for "
                f"{int(where[0].sum())}: processor and model do not belong together"
            )
        # The placeholder's id may lie outside a small embedding table: it is replaced anyway.
        words = self.model.get_input_embeddings()(batch.inputs["input_ids"].masked_fill(where, 0))
        image = self.model.prepare_embeddings_for_image_generation(codes).to(words.dtype)
        return words.masked_scatter(where.unsqueeze(-1), image)

    def target_codes(self, batch: Batch) -> Tensor:
        """The codes of a generation batch's target pictures. int [B, N]"""
        codes = batch.inputs.get("codes")
        return self.image_codes(batch.inputs["pixel_values"]) if codes is None else codes

    def label_states(self, batch: Batch) -> tuple[Tensor, nn.Module, Tensor]:
        if batch.task != "generation":
            return super().label_states(batch)
        codes = self.target_codes(batch)
        hidden = self.model.model.language_model(
            inputs_embeds=self.generation_embeddings(batch, codes),
            attention_mask=batch.inputs["attention_mask"],
            use_cache=False,
        ).last_hidden_state
        wanted = self.label_mask(batch)[:, 1:]
        head = self.model.model.generation_head  # two layers and an activation; the last one makes the logits
        return head.activation_fn(head.proj_out(hidden[:, :-1][wanted])), head.vision_head, codes.flatten()

    def spans(self, batch: Batch, definition: str = "paper") -> tuple[Tensor, Tensor]:
        """Also "code": what the training loss of the released code counts (see `minimal_aia.lab.spans`)."""
        if definition != "code":
            return super().spans(batch, definition)
        query, key, real = batch.query_mask, batch.key_mask, batch.attention_mask.bool()
        if batch.task == "generation":
            first = query.int().argmax(-1, keepdim=True)
            before = torch.arange(query.shape[1], device=query.device) < first - 1  # up to begin-of-image
            dropped = ~key.any(-1, keepdim=True)
            return query & shift_left(query), before & real & ~dropped
        marker = shift_left(key) & ~key  # begin-of-image
        end = self.label_mask(batch)
        last = end & (end.flip(-1).cumsum(-1).flip(-1) == 1)  # the end of the last turn
        return query | last, (key | marker) & shift_left(key | marker)

    def forward(self, batch: Batch) -> Any:
        if batch.task != "generation":
            return super().forward(batch)
        codes = self.target_codes(batch)
        return self.model(
            inputs_embeds=self.generation_embeddings(batch, codes),
            attention_mask=batch.inputs["attention_mask"],
            use_cache=False,
            logits_to_keep=1,
        )


class JanusDrawer(Drawer):
    """Codes with a head and an embedding of their own; guidance 5, as the authors."""

    guidance = 5.0

    def __init__(self, adapter: JanusAdapter) -> None:
        super().__init__(adapter)
        self.n_tokens = adapter.processor.num_image_tokens

    def prompt(self, text: str) -> list[int]:
        whole, _ = self.adapter.render(Sample("", "generation", ((text, ""),), ()), "generation")
        return list(self.adapter.tokenizer(whole.replace(self.adapter.image_token, ""))["input_ids"])

    def negative(self, text: str) -> list[int]:
        """As many tokens as the prompt: padding that is seen, but for the first mark and the last."""
        ids = torch.tensor([self.prompt(text)])
        self.adapter._drop_prompts(ids, torch.ones_like(ids, dtype=torch.bool))
        return ids[0].tolist()

    def step(self, ids: Tensor, drawn: bool, **inputs: Any) -> tuple[Tensor, Any]:
        if drawn:
            embeds = self.model.prepare_embeddings_for_image_generation(ids)
        else:
            embeds = self.model.get_input_embeddings()(ids)
        out = self.model.model.language_model(inputs_embeds=embeds, **inputs)
        return self.model.model.generation_head(out.last_hidden_state[:, -1]), out.past_key_values

    def picture(self, tokens: Tensor) -> Image.Image:
        # Not `decode_image_tokens`: its channels come last, and the processor would take rows for them.
        return self.adapter.to_picture(self.model.model.vqmodel.decode(tokens[None]))
