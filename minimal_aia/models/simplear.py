"""SimpleAR, generation: a Qwen2 whose vocabulary goes on with image codes after the words.

Its parameter names are Qwen2's, so it loads as `Qwen2ForCausalLM`. Its picture tokenizer (Cosmos) is a
separate model: either the model draws the picture itself (default), or you pass a function that turns a
picture into codes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minimal_aia.models.base import Adapter, AdapterError, Batch, find_layers, pad_rows
from minimal_aia.models.draw import draw_tokens, own_seed
from minimal_aia.models.loading import display_name, load_model, load_tokenizer
from minimal_aia.models.text import require_offsets, special_inside, token_mask

if TYPE_CHECKING:
    from minimal_aia.data import Sample
    from minimal_aia.models.registry import Family
    from minimal_aia.pictures import Picture


class SimpleARAdapter(Adapter):
    """SimpleAR-0.5B and -1.5B, or any decoder with image codes at the end of its vocabulary.

    Options of `load_adapter`:
    template, negative: the prompt around the user's words ("{}"), and the negative prompt for guidance.
    first_code: vocabulary id of image code 0 (default: the tokenizer's length, as the authors count).
    n_codes: image tokens a picture (1024: 512 x 512 pixels; 4096: 1024 x 1024).
    guidance, seed: of the drawing (guidance 6 as the authors use; None for none).
    image_codes: picture path -> its codes; given that, samples with a target picture are teacher-forced on
    it.
    """

    family = "simplear"
    tasks = ("generation",)

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        template: str = "<|t2i|>A highly realistic image of {}<|soi|>",
        negative: str = "<|t2i|>An image of low quality<|soi|>",
        first_code: int | None = None,
        n_codes: int = 1024,
        guidance: float | None = 6.0,
        seed: int = 0,
        image_codes: Callable[[Picture], Sequence[int]] | None = None,
    ) -> None:
        super().__init__(name, model)
        require_offsets(tokenizer, name)
        self.tokenizer, self.template, self.negative = tokenizer, template, negative
        self.n_codes, self.guidance, self.seed, self.image_codes = n_codes, guidance, seed, image_codes
        self.first_code = len(tokenizer) if first_code is None else first_code
        if self.first_code >= model.config.vocab_size:
            raise AdapterError(
                f"{name}: no image codes in its vocabulary ({model.config.vocab_size} entries, the first "
                f"code would be {self.first_code}); it is not a SimpleAR model, or first_code= is needed"
            )
        self._drawn: dict[Sample, list[int]] = {}

    @classmethod
    def load(cls, name: str, family: Family, **options: Any) -> SimpleARAdapter:
        from transformers import Qwen2ForCausalLM

        settings = {key: options.pop(key) for key in inspect.signature(cls).parameters if key in options}
        tokenizer = load_tokenizer(name)
        return cls(display_name(name), load_model(name, Qwen2ForCausalLM, **options), tokenizer, **settings)

    def why_not(self, sample: Sample, task: str) -> str | None:
        reason = super().why_not(sample, task)
        if reason is None and (token := special_inside(sample.turns[0][0], self.tokenizer)):
            return f"its text spells out the special token {token!r}"
        return reason

    def codes(self, sample: Sample, prompt_ids: list[int]) -> list[int]:
        """The picture's tokens as vocabulary ids: of its target picture, or drawn once and remembered."""
        if self.image_codes is not None and sample.images:
            codes = [int(code) + self.first_code for code in self.image_codes(sample.images[0])]
            if not codes or max(codes) >= self.model.config.vocab_size or min(codes) < self.first_code:
                raise AdapterError(f"{sample.id}: image_codes gave codes outside the vocabulary")
            return codes
        if sample not in self._drawn:
            allowed = torch.arange(self.model.config.vocab_size, device=self.device) >= self.first_code
            negative = torch.tensor([self.tokenizer(self.negative)["input_ids"]], device=self.device)
            with own_seed(self.seed, sample.id, self.device):
                drawn = draw_tokens(
                    self.model,
                    torch.tensor([prompt_ids], device=self.device),
                    self.n_codes,
                    lambda _step: allowed,
                    guidance=self.guidance,
                    negative=negative,
                )
            self._drawn[sample] = drawn.tolist()
        return self._drawn[sample]

    def collate(self, samples: Sequence[Sample], task: str) -> Batch:
        self.check(samples, task)
        front = self.template.index("{}")
        ids, keys, queries = [], [], []
        for sample in samples:
            prompt = sample.turns[0][0]
            text = self.tokenizer(self.template.replace("{}", prompt), return_offsets_mapping=True)
            words = token_mask(torch.tensor([text["offset_mapping"]]), [[(front, front + len(prompt))]])[0]
            codes = self.codes(sample, text["input_ids"])
            ids.append([*text["input_ids"], *codes])
            keys.append([*words.int().tolist(), *[0] * len(codes)])
            queries.append([*[0] * len(words), *[1] * len(codes)])
        return Batch(
            inputs={"input_ids": pad_rows(ids)},
            query_mask=pad_rows(queries).bool(),
            key_mask=pad_rows(keys).bool(),
            attention_mask=pad_rows([[1] * len(row) for row in ids]),
            ids=[sample.id for sample in samples],
            task=task,
        ).to(self.device)

    def forward(self, batch: Batch) -> Any:
        return self.model(
            input_ids=batch.inputs["input_ids"],
            attention_mask=batch.attention_mask,
            use_cache=False,
            logits_to_keep=1,
        )

    def token_ids(self, batch: Batch) -> Tensor:
        """The sequence in vocabulary ids: input, and labels. [B, S]"""
        return batch.inputs["input_ids"]

    def layers(self) -> list[nn.Module]:
        return find_layers(self.model.model, self.model.config.num_hidden_layers)
