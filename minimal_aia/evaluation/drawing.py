"""Draw pictures from prompts, many at a time: one decoding loop for Janus, Emu3 and the lab's models.

Every picture has random numbers of its own, drawn beforehand on the CPU from its own seed: one uniform number
a token, turned into a code by inverting the cumulative distribution. What is drawn does therefore not depend
on the batch it is in, on the device's random generator, or on what was drawn before. (A GPU in half precision
computes logits whose last digits depend on the batch size, so a code can still flip there.)

Classifier-free guidance runs prompt and empty prompt side by side in one batch of twice the size:
logits = empty + guidance * (prompt - empty).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minimal_aia.models.base import Adapter, AdapterError

FAMILIES = ("janus", "emu3", "lab")


def image_seed(seed: int, prompt_id: str, number: int) -> int:
    """The seed of the `number`-th picture of a prompt: 63 bits that depend on these three alone."""
    digest = hashlib.sha256(f"{seed}\n{prompt_id}\n{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def uniform_numbers(seeds: Sequence[int], n: int) -> Tensor:
    """`n` numbers in [0, 1) for every seed. float64 [len(seeds), n], on the CPU"""
    return torch.stack(
        [torch.rand(n, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
    )


def pick(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int = 0) -> Tensor:
    """The entry of softmax(logits / temperature) in whose share of [0, 1) the number falls.

    logits: float [B, V]; uniform: float64 [B]; top_k: only the k largest are possible (0: all). -> int [B]
    """
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    place = "cpu" if logits.device.type == "mps" else logits.device  # no float64 there
    total = (logits.to(place).double() / temperature).softmax(-1).cumsum(-1)  # [B, V]
    found = torch.searchsorted(total, uniform.to(place)[:, None] * total[:, -1:], right=True)
    return found.clamp(max=logits.shape[-1] - 1)[:, 0].to(logits.device)


class Drawer:
    """What the loop has to know of a family; the subclasses fill it in."""

    n_tokens: int  # a picture
    guidance: float  # the family's own defaults
    top_k: int = 0

    def __init__(self, adapter: Any) -> None:
        self.adapter, self.model = adapter, adapter.model

    def why_not(self, text: str) -> str | None:
        """Why this prompt cannot be drawn; None if it can."""
        from minimal_aia.models.text import special_inside

        if not text.strip():
            return "the prompt is empty"
        token = special_inside(text, self.adapter.tokenizer, (self.adapter.image_token,))
        return f"its text spells out the special token {token!r}" if token else None

    def prompt(self, text: str) -> list[int]:
        """Token ids up to and with the mark after which the picture begins."""
        raise NotImplementedError

    def negative(self, text: str) -> list[int]:
        """The same without the words, for guidance."""
        raise NotImplementedError

    def step(self, ids: Tensor, drawn: bool, **inputs: Any) -> tuple[Tensor, Any]:
        """ids: int [R, T], words, or (if `drawn`) one image token each -> logits [R, V] after them, cache."""
        raise NotImplementedError

    def allowed(self, position: int) -> Tensor | None:
        """bool [V]: what may stand at this position of the picture; None for everything."""
        return None

    def picture(self, tokens: Tensor) -> Image.Image:
        """The picture of image tokens, int [N]."""
        raise NotImplementedError


class JanusDrawer(Drawer):
    """Janus and Janus-Pro: codes with a head and an embedding of their own; guidance 5, as its authors."""

    guidance = 5.0

    def __init__(self, adapter: Any) -> None:
        super().__init__(adapter)
        self.n_tokens = adapter.processor.num_image_tokens

    def prompt(self, text: str) -> list[int]:
        from minimal_aia.data import Sample

        whole, _ = self.adapter.render(Sample("", "generation", ((text, ""),), ()), "generation")
        return list(self.adapter.tokenizer(whole.replace(self.adapter.image_token, ""))["input_ids"])

    def negative(self, text: str) -> list[int]:
        """As many tokens as the prompt: padding that is seen, but for the first mark and the last."""
        tokenizer, start = self.adapter.tokenizer, self.adapter.processor.image_start_token
        kept = {tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids(start)}
        return [i if i in kept else tokenizer.pad_token_id for i in self.prompt(text)]

    def step(self, ids: Tensor, drawn: bool, **inputs: Any) -> tuple[Tensor, Any]:
        if drawn:
            embeds = self.model.prepare_embeddings_for_image_generation(ids)
        else:
            embeds = self.model.get_input_embeddings()(ids)
        out = self.model.model.language_model(inputs_embeds=embeds, **inputs)
        return self.model.model.generation_head(out.last_hidden_state[:, -1]), out.past_key_values

    def picture(self, tokens: Tensor) -> Image.Image:
        # Not `decode_image_tokens`: its channels come last, and the processor would take rows for them.
        decoded = self.model.model.vqmodel.decode(tokens[None])  # [1, 3, height, width]
        made = self.adapter.processor.postprocess(
            list(decoded.float().cpu()), return_tensors="PIL.Image.Image"
        )
        return made["pixel_values"][0]


class Emu3Drawer(Drawer):
    """Emu3: codes of the vocabulary, a line end after each row; guidance 3, best 2048, as its authors."""

    guidance = 3.0
    top_k = 2048

    def __init__(self, adapter: Any) -> None:
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

    def negative(self, text: str) -> list[int]:
        return self.prompt("")

    def step(self, ids: Tensor, drawn: bool, **inputs: Any) -> tuple[Tensor, Any]:
        out = self.model.model.text_model(input_ids=ids, **inputs)
        return self.model.lm_head(out.last_hidden_state[:, -1]), out.past_key_values

    def allowed(self, position: int) -> Tensor:
        return self.line_end if (position + 1) % (self.width + 1) == 0 else self.codes

    def picture(self, tokens: Tensor) -> Image.Image:
        closed = torch.nn.functional.pad(tokens, (0, 3))  # the library cuts off three closing tokens
        decoded = self.model.model.decode_image_tokens(closed[None], self.height, self.width)
        made = self.adapter.processor.postprocess(
            list(decoded.float().cpu()), return_tensors="PIL.Image.Image"
        )
        return made["pixel_values"][0]


class LabDrawer(Drawer):
    """The lab's models, 24 x 24 pixels. They never saw an empty prompt in training: no guidance."""

    guidance = 1.0

    def __init__(self, adapter: Any) -> None:
        from minimal_aia.lab import images, models

        super().__init__(adapter)
        self.n_tokens = images.N_IMAGE_TOKENS
        self.janus = models.is_janus(self.model)

    def why_not(self, text: str) -> str | None:
        from minimal_aia.lab.sequences import unknown_words

        if not text.strip():
            return "the prompt is empty"
        unknown = unknown_words(text)
        return f"a lab model does not know the word {unknown[0]!r}" if unknown else None

    def prompt(self, text: str) -> list[int]:
        from minimal_aia.lab.sequences import BOI, BOS, word_ids

        return [BOS, *word_ids(text), BOI]

    def negative(self, text: str) -> list[int]:
        return self.prompt("")

    def step(self, ids: Tensor, drawn: bool, **inputs: Any) -> tuple[Tensor, Any]:
        from minimal_aia.lab.models import routed
        from minimal_aia.lab.sequences import FIRST_CODE

        if self.janus:
            return JanusDrawer.step(self, ids, drawn, **inputs)  # type: ignore[arg-type]
        inputs |= routed(self.model, torch.full_like(ids, drawn, dtype=torch.bool))
        out = self.model.model(input_ids=ids + FIRST_CODE if drawn else ids, **inputs)
        return self.model.lm_head(out.last_hidden_state[:, -1])[:, FIRST_CODE:], out.past_key_values

    def picture(self, tokens: Tensor) -> Image.Image:
        from minimal_aia.lab import images

        return Image.fromarray(images.decode(tokens.cpu().numpy()[None], self.adapter.codebook)[0])


def drawer(adapter: Adapter) -> Drawer:
    """The drawer of an adapter's family; AdapterError if the family cannot draw here."""
    kinds = {"janus": JanusDrawer, "emu3": Emu3Drawer, "lab": LabDrawer}
    if adapter.family not in kinds or "generation" not in adapter.tasks:
        raise AdapterError(
            f"{adapter.name}: cannot draw pictures for a benchmark; models of these families can: "
            f"{', '.join(FAMILIES)}"
        )
    return kinds[adapter.family](adapter)


@torch.inference_mode()
def draw_tokens(
    drawer: Drawer,
    texts: Sequence[str],
    seeds: Sequence[int],
    guidance: float | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Tensor:
    """One picture's image tokens for each prompt and its seed; None means the family's default. int [B, N]"""
    guidance = drawer.guidance if guidance is None else guidance
    top_k = drawer.top_k if top_k is None else top_k
    rows = [drawer.prompt(text) for text in texts]
    if guidance != 1:
        rows += [drawer.negative(text) for text in texts]
    device, width = drawer.adapter.device, max(map(len, rows))
    ids = torch.tensor([[*[row[0]] * (width - len(row)), *row] for row in rows], device=device)  # [R, P]
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # padding on the left leaves every row at its own places
    uniform = uniform_numbers(seeds, drawer.n_tokens).to("cpu" if device.type == "mps" else device)
    cache, drawn = None, []
    for position in range(drawer.n_tokens):
        logits, cache = drawer.step(
            ids,
            position > 0,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        logits = logits.float()
        if guidance != 1:
            with_prompt, without = logits.chunk(2)
            logits = without + guidance * (with_prompt - without)
        possible = drawer.allowed(position)
        if possible is not None:
            logits = logits.masked_fill(~possible, -torch.inf)
        drawn.append(pick(logits, uniform[:, position], temperature, top_k))  # [B]
        ids = drawn[-1].repeat(len(rows) // len(texts))[:, None]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return torch.stack(drawn, dim=1)


@torch.inference_mode()
def draw(
    drawer: Drawer,
    texts: Sequence[str],
    seeds: Sequence[int],
    guidance: float | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> list[Image.Image]:
    """One picture for each prompt and its seed. Decoded one by one: pixels do not depend on the batch."""
    tokens = draw_tokens(drawer, texts, seeds, guidance, temperature, top_k)
    return [drawer.picture(row) for row in tokens]
