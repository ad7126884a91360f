"""DeepSeek-VL2, understanding. **Written against the authors' published code, not run with their weights.**

What it relies on: `DeepseekVLV2Processor.process_one(conversations=, images=, inference_mode=False)` and
`batchify`, whose `images_seq_mask` marks image tokens and whose labels are set on answers only;
`DeepseekVLV2ForCausalLM` called with what `batchify` returns; `language.model.layers[i].self_attn`
(DeepseekV2Attention with multi-head latent attention, or Llama's in the tiny model), which return their
softmax [B, H, Q, K] when asked. Its keys and values have different sizes and the softmax is explicit, so
each layer's matrix exists for a moment; never two. Tested on a small stand-in of ours with the same calls
and layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from minimal_aia.models.base import Adapter, Batch
from minimal_aia.models.loading import authors_code, display_name, load_model
from minimal_aia.models.records import StepRecord, capture_weights
from minimal_aia.models.text import special_inside
from minimal_aia.pictures import open_picture

if TYPE_CHECKING:
    from minimal_aia.data import Sample
    from minimal_aia.models.registry import Family

USER, ASSISTANT, IMAGE = "<|User|>", "<|Assistant|>", "<image>"


class DeepseekVL2Adapter(Adapter):
    """Option of `load_adapter`: `code`, a checkout of github.com/deepseek-ai/DeepSeek-VL2."""

    family = "deepseek-vl2"
    tasks = ("understanding",)

    def __init__(self, name: str, model: Any, processor: Any) -> None:
        super().__init__(name, model)
        self.processor = processor

    @classmethod
    def load(
        cls, name: str, family: Family, *, code: str | Path | None = None, **options: Any
    ) -> DeepseekVL2Adapter:
        with authors_code(
            name, code, "deepseek_vl2.models", "github.com/deepseek-ai/DeepSeek-VL2"
        ) as authors:
            processor = authors.DeepseekVLV2Processor.from_pretrained(name)
            model = load_model(name, authors.DeepseekVLV2ForCausalLM, attn_implementation="eager", **options)
        return cls(display_name(name), model, processor)

    def bad_text(self, text: str) -> str | None:
        return special_inside(text, self.processor.tokenizer, (IMAGE, USER, ASSISTANT))

    def conversation(self, sample: Sample) -> list[dict[str, str]]:
        """The authors' message format, images before the first question."""
        messages = []
        for turn, (question, answer) in enumerate(sample.turns):
            images = f"{IMAGE}\n" * (len(sample.images) if turn == 0 else 0)
            messages += [{"role": USER, "content": images + question}, {"role": ASSISTANT, "content": answer}]
        return messages

    def collate(self, samples: Sequence[Sample], task: str) -> Batch:
        self.check(samples, task)
        rows = [
            self.processor.process_one(
                conversations=self.conversation(sample),
                images=[open_picture(picture) for picture in sample.images],
                inference_mode=False,
            )
            for sample in samples
        ]
        made = self.processor.batchify(rows)
        real, ids = made.attention_mask.bool(), made.input_ids
        # Labels: the begin token, and each answer with its end token; what is neither marker is answer text.
        markers = (ids == self.processor.bos_id) | (ids == self.processor.eos_id)
        return Batch(
            inputs={
                "input_ids": ids,
                "attention_mask": made.attention_mask,
                "images": made.images,
                "images_seq_mask": made.images_seq_mask.bool(),
                "images_spatial_crop": made.images_spatial_crop,
            },
            query_mask=(made.labels != self.processor.ignore_id) & ~markers & real,
            key_mask=made.images_seq_mask.bool() & real,
            attention_mask=made.attention_mask.long(),
            ids=[sample.id for sample in samples],
            task=task,
        ).to(self.device, self.dtype)

    def forward(self, batch: Batch) -> Any:
        return self.model(**batch.inputs, use_cache=False)

    @contextmanager
    def capture(self, batch: Batch) -> Iterator[StepRecord]:
        record = StepRecord(len(self.layers()), batch.query_mask, batch.key_mask)
        spans = (torch.arange(len(batch)), batch.query_mask, batch.key_mask)
        layers: list[Any] = self.layers()
        with capture_weights([layer.self_attn for layer in layers], record, spans):
            yield record

    def layers(self) -> list[nn.Module]:
        return list(self.model.language.model.layers)
