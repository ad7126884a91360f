"""Understanding with any transformers model that has a processor with a chat template.

Qwen2.5-VL, Qwen3-VL (dense and mixture of experts), InternVL3, LLaVA-OneVision and DeepSeek-VL differ only in
their classes; so does any other decoder-only model once its image token id is known. Chameleon's chat format
is text with a separator after every turn; there is no template file.
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
from minimal_aia.models.loading import display_name, load_model, load_processor, own_settings
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

    Options of `load_adapter`: `image_token_id` (the placeholder's id; by default the processor's own). Models
    that also generate: `draw=True` lets the model draw the target picture of samples that are only a prompt,
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

        settings = own_settings(cls, options)
        processor = load_processor(name, next(iter(family.model_types), None))
        model = load_model(name, getattr(transformers, family.model), **options)
        return cls(display_name(name), model, processor, family.name, **settings)

    def why_not(self, sample: Sample, task: str) -> str | None:
        if (reason := super().why_not(sample, task)) or task == "understanding":
            return reason
        if len(sample.images) > 1:
            return f"{len(sample.images)} target images, not one"
        if not sample.images and not self.draw:
            return "no target image to teacher-force (load the model with draw=True to let it draw one)"
        return None

    def bad_text(self, text: str) -> str | None:
        return special_inside(text, self.tokenizer, (self.image_token,))

    def render(self, sample: Sample, task: str) -> tuple[str, Spans]:
        """The whole conversation as the model reads it, and where its answers are."""

        def template(texts: list[str]) -> str:
            return self.chat(messages(texts[::2], texts[1::2], len(sample.images)))

        text, spans = fill(template, [part for turn in sample.turns for part in turn], self.name)
        if self.ends_turns:
            text = text[: spans[-1][1]] + self.tokenizer.eos_token
        return text, spans[1::2]

    def chat(self, conversation: list[dict[str, Any]], **options: Any) -> str:
        """A conversation as the model's own template writes it."""
        if not getattr(self.processor, "chat_template", None):
            raise AdapterError(f"{self.name}: its processor has no chat template (chat_template.jinja)")
        return str(self.processor.apply_chat_template(conversation, tokenize=False, **options))

    def pictures(self, samples: Sequence[Sample]) -> list[list[Image.Image]]:
        return [[open_picture(picture) for picture in sample.images] for sample in samples]

    def tokenize(self, texts: Sequence[str]) -> Any:
        """The tokenizer's batch, padded on the right, with offsets for the spans."""
        return self.tokenizer(
            list(texts),
            padding=True,
            padding_side="right",
            return_tensors="pt",
            return_offsets_mapping=True,
        )

    def process(
        self, texts: Sequence[str], spans: Sequence[Spans], samples: Sequence[Sample], task: str
    ) -> tuple[Any, list[Spans]]:
        """The processor's batch of rendered samples, padded on the right, and where it moved their spans."""
        made = self.processor(
            text=list(texts),
            images=self.pictures(samples),
            padding=True,
            padding_side="right",
            return_tensors="pt",
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
        )
        rows = zip(spans, texts, made["text_replacement_offsets"], strict=True)
        return made, [shift_spans(s, text, self.image_token, replaced) for s, text, replaced in rows]

    def collate(self, samples: Sequence[Sample], task: str) -> Batch:
        self.check(samples, task)
        texts, spans = zip(*(self.render(sample, task) for sample in samples))
        inputs, placed = self.process(texts, spans, samples, task)
        real = inputs["attention_mask"].bool()
        words = token_mask(inputs["offset_mapping"], placed) & real
        image = self.image_mask(inputs["input_ids"]) & real
        query, key = (words & ~image, image) if task == "understanding" else (image, words)
        accepted = {"codes", *self.accepted_inputs()}  # codes: of pictures, for our own forward
        return Batch(
            inputs={k: v for k, v in inputs.items() if k in accepted and isinstance(v, Tensor)},
            query_mask=query,
            key_mask=key,
            attention_mask=inputs["attention_mask"],
            ids=[sample.id for sample in samples],
            task=task,
        ).to(self.device, self.dtype)

    def to_picture(self, decoded: Tensor) -> Image.Image:
        """What a VQ decoder made, [1, 3, height, width], as a picture."""
        made = self.processor.postprocess(list(decoded.float().cpu()), return_tensors="PIL.Image.Image")
        return made["pixel_values"][0]

    def image_mask(self, input_ids: Tensor) -> Tensor:
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
