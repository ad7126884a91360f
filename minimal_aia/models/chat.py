"""Understanding with any transformers model that has a processor with a chat template.

Qwen2.5-VL, Qwen3-VL (dense and mixture of experts), InternVL3, LLaVA-OneVision and DeepSeek-VL differ only in
their classes; so does any other decoder-only model once its image token id is known.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from minimal_aia.models.base import Adapter, AdapterError, Batch, find_layers
from minimal_aia.models.loading import display_name, load_model, load_processor
from minimal_aia.models.text import (
    Spans,
    fill,
    messages,
    require_offsets,
    shift_spans,
    special_inside,
    token_mask,
)
from minimal_aia.pictures import open_picture

if TYPE_CHECKING:
    from minimal_aia.data import Sample
    from minimal_aia.models.registry import Family


class ChatAdapter(Adapter):
    """One processor call makes the batch; one forward call of the whole model reads it.

    Options of `load_adapter`: `image_token_id` (the placeholder's id; by default the processor's own).
    Models that
    also generate: `draw=True` lets the model draw the target picture of samples that are only a prompt,
    from `seed`.
    """

    tasks: tuple[str, ...] = ("understanding",)

    def __init__(
        self,
        name: str,
        model: Any,
        processor: Any,
        family: str = "decoder",
        image_token_id: int | None = None,
        draw: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(name, model)
        self.draw, self.seed = draw, seed
        self._drawn: dict[Sample, Tensor] = {}
        self.family, self.processor, self.tokenizer = family, processor, processor.tokenizer
        require_offsets(self.tokenizer, name)
        if image_token_id is None:
            image_token_id = getattr(processor, "image_token_id", None)
        if image_token_id is None and getattr(processor, "image_token", None):
            image_token_id = self.tokenizer.convert_tokens_to_ids(processor.image_token)
        if image_token_id is None:
            raise AdapterError(f"{name}: its processor names no image token; pass image_token_id=")
        self.image_token_id: int = image_token_id
        self.image_token: str = self.tokenizer.convert_ids_to_tokens(image_token_id)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @classmethod
    def load(cls, name: str, family: Family, **options: Any) -> ChatAdapter:
        import transformers

        settings = {key: options.pop(key) for key in inspect.signature(cls).parameters if key in options}
        processor = load_processor(name, getattr(transformers, family.processor))
        model = load_model(name, getattr(transformers, family.model), **options)
        return cls(display_name(name), model, processor, family.name, **settings)

    def no_target(self, sample: Sample) -> str | None:
        """Why a generation sample has nothing to teacher-force, if so."""
        if len(sample.images) > 1:
            return f"{len(sample.images)} target images, not one"
        if not sample.images and not self.draw:
            return "no target image to teacher-force (load the model with draw=True to let it draw one)"
        return None

    def why_not(self, sample: Sample, task: str) -> str | None:
        reason = super().why_not(sample, task)
        if reason is None:
            text = "\n".join(part for turn in sample.turns for part in turn)
            token = special_inside(text, self.tokenizer, (self.image_token,))
            reason = f"its text spells out the special token {token!r}" if token else None
        return reason

    def render(self, sample: Sample, task: str) -> tuple[str, Spans]:
        """The whole conversation as the model reads it, and where its answers are."""
        questions, answers = zip(*sample.turns)

        def template(texts: list[str]) -> str:
            conversation = messages(texts[::2], texts[1::2], len(sample.images))
            return str(self.processor.apply_chat_template(conversation, tokenize=False))

        if not getattr(self.processor, "chat_template", None):
            raise AdapterError(f"{self.name}: its processor has no chat template (chat_template.jinja)")
        texts = [part for turn in zip(questions, answers) for part in turn]
        text, spans = fill(template, texts, self.name)
        if self.ends_turns:
            text = text[: spans[-1][1]] + self.tokenizer.eos_token
        return text, spans[1::2]

    def pictures(self, samples: Sequence[Sample]) -> list[list[Image.Image]]:
        return [[open_picture(picture) for picture in sample.images] for sample in samples]

    def process(self, texts: list[str], pictures: list[list[Image.Image]]) -> Any:
        """The processor's batch, padded on the right, with offsets for the spans."""
        return self.processor(
            text=texts,
            images=pictures,
            padding=True,
            padding_side="right",
            return_tensors="pt",
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
        )

    def collate(self, samples: Sequence[Sample], task: str) -> Batch:
        self.check(samples, task)
        texts, spans = map(list, zip(*(self.render(sample, task) for sample in samples)))
        inputs = self.process(list(texts), self.pictures(samples))
        placed = [
            shift_spans(s, t, self.image_token, r)
            for t, s, r in zip(texts, spans, inputs["text_replacement_offsets"], strict=True)
        ]
        real = inputs["attention_mask"].bool()
        words = token_mask(inputs["offset_mapping"], placed) & real
        image = self.image_mask(inputs["input_ids"], task) & real
        query, key = (words, image) if task == "understanding" else (image, words)
        accepted = self.accepted_inputs()
        return Batch(
            inputs={k: v for k, v in inputs.items() if k in accepted and isinstance(v, Tensor)},
            query_mask=query & ~image if task == "understanding" else query,
            key_mask=key,
            attention_mask=inputs["attention_mask"],
            ids=[sample.id for sample in samples],
            task=task,
        ).to(self.device, self.dtype)

    def image_mask(self, input_ids: Tensor, task: str) -> Tensor:
        """The image placeholder tokens. [B, S] -> bool [B, S]"""
        return input_ids == self.image_token_id

    def accepted_inputs(self) -> set[str]:
        """What the model's forward takes by name; a processor also returns helpers that it does not."""
        return set(inspect.signature(self.model.forward).parameters)

    def forward(self, batch: Batch) -> Any:
        """The model's own forward on the whole batch; logits of the last position only, to save memory.

        For a loss, call the model yourself with `batch.inputs`.
        """
        short = {"logits_to_keep": 1} if "logits_to_keep" in self.accepted_inputs() else {}
        return self.model(**batch.inputs, use_cache=False, **short)

    def label_mask(self, batch: Batch) -> Tensor:
        if batch.task == "generation":
            return batch.query_mask
        after = F.pad(batch.query_mask[:, :-1], (1, 0)) & batch.attention_mask.bool()
        return batch.query_mask | after & (batch.inputs["input_ids"] == self.tokenizer.eos_token_id)

    def label_states(self, batch: Batch) -> tuple[Tensor, nn.Module, Tensor]:
        hidden = self.model.model(**batch.inputs, use_cache=False).last_hidden_state
        wanted = self.label_mask(batch)[:, 1:]
        return hidden[:, :-1][wanted], self.model.lm_head, batch.inputs["input_ids"][:, 1:][wanted]

    def save(
        self, folder: str | Path, state_dict: dict[str, Tensor] | None = None, hub_names: bool = True
    ) -> None:
        super().save(folder, state_dict, hub_names)
        self.processor.save_pretrained(folder)

    def layers(self) -> list[nn.Module]:
        inner = self.model.model
        for name in ("language_model", "text_model"):
            if hasattr(inner, name):
                inner = getattr(inner, name)
                break
        return find_layers(inner, self.model.config.get_text_config().num_hidden_layers)
