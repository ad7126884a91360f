"""SimpleAR, generation: a Qwen2 whose vocabulary goes on with image codes after the words.

Its parameter names are Qwen2's, so it loads as `Qwen2ForCausalLM`. Its picture tokenizer (Cosmos) is a
separate model: either the model draws the picture itself (default), or you pass a function that turns a
picture into codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minimal_aia.models.base import Adapter, AdapterError, Batch, find_layers
from minimal_aia.models.draw import Drawer
from minimal_aia.models.loading import display_name, load_model, load_tokenizer, own_settings
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
    image_codes: picture -> its codes; given that, samples with a target picture are teacher-forced on it.
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

    @classmethod
    def load(cls, name: str, family: Family, **options: Any) -> SimpleARAdapter:
        from transformers import Qwen2ForCausalLM

        settings = own_settings(cls, options)
        tokenizer = load_tokenizer(name)
        return cls(display_name(name), load_model(name, Qwen2ForCausalLM, **options), tokenizer, **settings)

    def bad_text(self, text: str) -> str | None:
        return special_inside(text, self.tokenizer)

    def codes(self, sample: Sample) -> list[int]:
        """The picture's tokens as vocabulary ids: of its target picture, or drawn once and remembered."""
        if self.image_codes is not None and sample.images:
            codes = [int(code) + self.first_code for code in self.image_codes(sample.images[0])]
            if not codes or max(codes) >= self.model.config.vocab_size or min(codes) < self.first_code:
                raise AdapterError(f"{sample.id}: image_codes gave codes outside the vocabulary")
            return codes
        return self.drawn(sample, SimpleARDrawer(self), self.seed).tolist()

    def collate(self, samples: Sequence[Sample], task: str) -> Batch:
        self.check(samples, task)
        front = self.template.index("{}")
        rows = []
        for sample in samples:
            prompt = sample.turns[0][0]
            text = self.tokenizer(self.template.replace("{}", prompt), return_offsets_mapping=True)
            words = token_mask(torch.tensor([text["offset_mapping"]]), [[(front, front + len(prompt))]])[0]
            codes = self.codes(sample)
            queries = [*[0] * len(words), *[1] * len(codes)]
            keys = [*words.int().tolist(), *[0] * len(codes)]
            rows.append(([*text["input_ids"], *codes], queries, keys))
        return Batch.of_rows(rows, samples, task).to(self.device)

    def forward(self, batch: Batch) -> Any:
        return self.model(
            input_ids=batch.inputs["input_ids"],
            attention_mask=batch.attention_mask,
            use_cache=False,
            logits_to_keep=1,
        )

    def layers(self) -> list[nn.Module]:
        return find_layers(self.model.model, self.model.config.num_hidden_layers)


class SimpleARDrawer(Drawer):
    """Codes at the end of the vocabulary. It draws tokens only: their decoder (Cosmos) is not at hand."""

    def __init__(self, adapter: SimpleARAdapter) -> None:
        super().__init__(adapter)
        self.n_tokens, self.guidance = adapter.n_codes, adapter.guidance or 1.0
        self.codes = torch.arange(self.model.config.vocab_size, device=adapter.device) >= adapter.first_code

    def prompt(self, text: str) -> list[int]:
        return list(self.adapter.tokenizer(self.adapter.template.replace("{}", text))["input_ids"])

    def negative(self, text: str) -> list[int]:
        return list(self.adapter.tokenizer(self.adapter.negative)["input_ids"])

    def step(self, ids: Tensor, drawn: bool, **inputs: Any) -> tuple[Tensor, Any]:
        out = self.model.model(input_ids=ids, **inputs)
        return self.model.lm_head(out.last_hidden_state[:, -1]), out.past_key_values

    def allowed(self, position: int) -> Tensor:
        return self.codes
