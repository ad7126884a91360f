"""HunyuanImage-3.0, generation. **Written against the authors' published code, not run with their weights.**

What it relies on: `HunyuanImage3ForCausalMM` with `load_tokenizer`, `prepare_model_inputs(mode="gen_image")`,
whose `tokenizer_output` tells text and image positions, and `_generate`, which denoises;
`HunyuanImage3SDPAAttention`, which calls `torch.nn.functional.scaled_dot_product_attention` on [B, H, Q, D]
with a boolean mask (causal, but bidirectional inside the image). The first denoising step reads the whole
sequence; later steps only the time token and the image, against cached keys. Tested on a small stand-in of
ours with the same calls and layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minimal_aia.models.base import Adapter, AdapterError, Batch, causal_but_within
from minimal_aia.models.draw import noise_seed
from minimal_aia.models.loading import display_name, load_model, own_settings
from minimal_aia.models.records import CallSpans, StepRecord, capture_sdpa

if TYPE_CHECKING:
    from minimal_aia.data import Sample
    from minimal_aia.models.registry import Family


class HunyuanImageAdapter(Adapter):
    """Keys: the prompt's text section; queries: the image tokens, at every step. `layers()`: decoder layers.

    Options of `load_adapter`: `steps` (denoising steps, default 50), `image_size` ("1024x1024"), `seed`. No
    system prompt and no rewriting of the prompt are used, so that the keys are the user's own words.
    """

    family = "hunyuan-image"
    tasks = ("generation",)

    def __init__(
        self, name: str, model: Any, steps: int = 50, image_size: str = "1024x1024", seed: int = 0
    ) -> None:
        super().__init__(name, model)
        self.steps, self.image_size, self.seed = steps, image_size, seed
        self._now = 0  # the sample that is being denoised

    @classmethod
    def load(cls, name: str, family: Family, **options: Any) -> HunyuanImageAdapter:
        from transformers import AutoModelForCausalLM

        settings = own_settings(cls, options)
        model = load_model(
            name,
            AutoModelForCausalLM,
            trust_remote_code=True,  # `load_adapter` comes here only if the user said so
            attn_implementation="sdpa",
            moe_impl="eager",
            **options,
        )
        model.load_tokenizer(name)
        return cls(display_name(name), model, **settings)

    def prepare(self, prompt: str, sample_id: str) -> dict[str, Any]:
        """The authors' inputs for one prompt; made anew for each run, because a run uses up its cache."""
        inputs: dict[str, Any] = self.model.prepare_model_inputs(
            prompt=[prompt],
            mode="gen_image",
            image_size=self.image_size,
            seed=noise_seed(self.seed, sample_id),
            system_prompt=None,
        )
        return inputs

    def prompt_slice(self, output: Any, prompt: str) -> slice:
        """Where the prompt's text section lies in the first, conditional row of the authors' sequence."""
        wanted = self.model._tkwrapper.tokenizer.encode(prompt, add_special_tokens=False)
        tokens = output.tokens[0].tolist()
        found = [part for part in output.text_slices[0] if tokens[part] == wanted]
        if len(found) != 1:
            raise AdapterError(
                f"{self.name}: its sequence holds the prompt {len(found)} times, not once: {prompt!r}"
            )
        return found[0]

    def collate(self, samples: Sequence[Sample], task: str) -> Batch:
        self.check(samples, task)
        rows, extra = [], []
        for sample in samples:
            prompt = sample.turns[0][0]
            output = self.prepare(prompt, sample.id)["tokenizer_output"]
            ids, queries = output.tokens[0].tolist(), output.gen_image_mask[0].bool().int().tolist()
            keys, part = [0] * len(ids), self.prompt_slice(output, prompt)
            keys[part] = [1] * len(keys[part])
            rows.append((ids, queries, keys))
            extra.append({"prompt": prompt})
        return Batch.of_rows(rows, samples, task, extra).to(self.device)

    def visible(self, batch: Batch) -> Tensor:
        """Which keys each query sees: causal, and the image tokens each other. bool [B, S, S]"""
        return causal_but_within(batch.query_mask, batch)

    def forward(self, batch: Batch) -> list[Any]:
        """Denoise every sample of the batch, one after the other, as the authors' code does."""
        pictures = []
        with torch.no_grad():
            for self._now, (row, name) in enumerate(zip(batch.extra, batch.ids, strict=True)):
                inputs = self.prepare(row["prompt"], name)
                pictures.append(self.model._generate(**inputs, diff_infer_steps=self.steps))
        return pictures

    @contextmanager
    def capture(self, batch: Batch) -> Iterator[StepRecord]:
        record = StepRecord(len(self.layers()), batch.query_mask, batch.key_mask)

        def spans(query: Tensor, key: Tensor) -> CallSpans:
            length = int(batch.attention_mask[self._now].sum())
            image, prompt = batch.query_mask[self._now, :length], batch.key_mask[self._now, :length]
            if query.shape[2] != length:  # a later step: the time token, then the image tokens
                image = torch.cat([image.new_zeros(1), image.new_ones(int(image.sum()))])
            rows = torch.full((len(query),), -1)  # the second row is the guidance pass without a prompt
            rows[0] = self._now
            return rows, image.expand(len(query), -1), prompt.expand(len(query), -1)

        layers: list[Any] = self.layers()
        with capture_sdpa([layer.self_attn for layer in layers], record, spans):
            yield record

    def layers(self) -> list[nn.Module]:
        return list(self.model.model.layers)
