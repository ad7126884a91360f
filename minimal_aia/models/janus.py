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

from minimal_aia.models.base import AdapterError, Batch
from minimal_aia.models.chat import ChatAdapter
from minimal_aia.models.convert_keys import is_unit, unit
from minimal_aia.models.draw import own_seed
from minimal_aia.models.text import Spans, fill, token_mask
from minimal_aia.pictures import PictureCodes, crop_to_fit
from minimal_aia.record import shift_left

if TYPE_CHECKING:
    from minimal_aia.data import Sample
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

    def why_not(self, sample: Sample, task: str) -> str | None:
        reason = super().why_not(sample, task)
        return self.no_target(sample) if reason is None and task == "generation" else reason

    def render(self, sample: Sample, task: str) -> tuple[str, Spans]:
        if task == "understanding":
            return super().render(sample, task)

        def template(texts: list[str]) -> str:
            user = {"role": "user", "content": [{"type": "text", "text": texts[0]}]}
            return str(self.processor.apply_chat_template([user], tokenize=False, add_generation_prompt=True))

        text, spans = fill(template, [sample.turns[0][0]], self.name)
        image = self.image_token * self.processor.num_image_tokens
        return text + self.processor.image_start_token + image, spans

    def collate(self, samples: Sequence[Sample], task: str) -> Batch:
        if task != "generation":
            return super().collate(samples, task)
        self.check(samples, task)
        texts, spans = zip(*(self.render(sample, task) for sample in samples))
        tokens = self.tokenizer(
            list(texts),
            padding=True,
            padding_side="right",
            return_tensors="pt",
            return_offsets_mapping=True,
        )
        if all(sample.images and not isinstance(sample.images[0], PictureCodes) for sample in samples):
            image = {"pixel_values": self.pixels(samples)}
        else:
            image = {"codes": torch.stack([self.codes_of(sample) for sample in samples])}
        real = tokens["attention_mask"].bool()
        dropped = torch.tensor([sample.dropped for sample in samples])
        self._drop_prompts(tokens["input_ids"], real & dropped[:, None])
        return Batch(
            inputs={
                "input_ids": tokens["input_ids"],
                "attention_mask": tokens["attention_mask"],
                **image,
            },
            query_mask=self.image_mask(tokens["input_ids"], task) & real,
            key_mask=token_mask(tokens["offset_mapping"], spans) & real & ~dropped[:, None],
            attention_mask=tokens["attention_mask"],
            ids=[sample.id for sample in samples],
            task=task,
        ).to(self.device, self.dtype)

    def _drop_prompts(self, input_ids: Tensor, rows: Tensor) -> None:
        """Pad over prompts, in place, as guidance does at inference (`generate`; the authors' training too).

        All but begin-of-sentence and begin-of-image becomes padding; it keeps the prompt's length and is
        attended to. rows: bool [B, S], the real tokens of samples whose prompt is dropped.
        """
        begin = self.tokenizer.convert_tokens_to_ids(self.processor.image_start_token)
        kept = (input_ids == self.tokenizer.bos_token_id) | (input_ids == begin)
        input_ids[rows & ~kept & ~self.image_mask(input_ids, "generation")] = self.tokenizer.pad_token_id

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
        if sample not in self._drawn:
            text, _ = self.render(sample, "generation")
            prompt = self.tokenizer(text.replace(self.image_token, ""), return_tensors="pt").to(self.device)
            settings = self.model.generation_config  # the library's class loses the first when it is saved
            settings.generation_kwargs = {
                "boi_token_id": self.tokenizer.convert_tokens_to_ids(self.processor.image_start_token)
            }
            settings.pad_token_id, settings.bos_token_id = (
                self.tokenizer.pad_token_id,
                self.tokenizer.bos_token_id,
            )
            with own_seed(self.seed, sample.id, self.device):
                self._drawn[sample] = self.model.generate(
                    prompt["input_ids"],
                    attention_mask=prompt["attention_mask"],
                    generation_mode="image",
                    do_sample=True,
                    top_k=0,  # from all codes, as its authors; the library's default is the best 50
                    guidance_scale=5.0,
                    max_length=prompt["input_ids"].shape[1] + self.processor.num_image_tokens,
                )[0]
        return self._drawn[sample]

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
        where = self.image_mask(batch.inputs["input_ids"], "generation")
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
