"""The laptop lab's shipped models as adapters: `load_lab("unified")` or `load_adapter("lab/unified")`.

They know the lab's world and nothing else: 24x24 pictures and forty-seven words. Samples outside it are
refused with the reason, so that no number is measured on unknown words.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from minimal_aia.console import nearest
from minimal_aia.models.base import Adapter, AdapterError, Batch, find_layers
from minimal_aia.models.draw import Drawer
from minimal_aia.paths import DATA, how_to_get

if TYPE_CHECKING:
    from PIL import Image

    from minimal_aia.data import Sample
    from minimal_aia.lab.sequences import Sequences
    from minimal_aia.pictures import Picture

CHECKPOINTS = DATA / "checkpoints"


class LabAdapter(Adapter):
    """A lab model: the spans of `minimal_aia.lab.sequences`, in the format that it was trained in."""

    family = "lab"
    definitions = ("paper", "predicting", "code", "code-plots")

    def __init__(self, name: str, model: nn.Module, codebook: np.ndarray, tasks: tuple[str, ...]) -> None:
        super().__init__(name, model)
        self.codebook = codebook
        self.tasks = tasks

    def bad_text(self, text: str) -> str | None:
        from minimal_aia.lab.sequences import unknown_words

        unknown = unknown_words(text)
        return f"a lab model does not know the word {unknown[0]!r}" if unknown else None

    def drawer(self) -> Drawer:
        return LabDrawer(self) if "generation" in self.tasks else super().drawer()

    def why_not(self, sample: Sample, task: str) -> str | None:
        if reason := super().why_not(sample, task):
            return reason
        if len(sample.images) != 1:
            return f"a lab model needs one picture a sample, not {len(sample.images)}"
        if _picture(sample.images[0]) is None:
            return f"{sample.images[0].name} is not a 24x24 picture of the lab"
        return None

    def collate(self, samples: Sequence[Sample], task: str) -> Batch:
        from minimal_aia.lab import images, sequences

        self.check(samples, task)
        pictures = np.stack([p for s in samples if (p := _picture(s.images[0])) is not None])
        rows = [
            sequences.generation_tokens(s.turns[0][0], codes)
            if task == "generation"
            else sequences.understanding_tokens(list(s.turns), codes)
            for s, codes in zip(samples, images.encode(pictures, self.codebook).tolist(), strict=True)
        ]
        return as_batch(sequences.pad(rows, pictures), task, [s.id for s in samples]).to(self.device)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Teacher-forced logits `[N, V]` at the positions that predict labels, and the labels `[N]`."""
        from minimal_aia.lab import models

        return models.label_logits(self.model, _sequences(batch), batch.task)

    def label_mask(self, batch: Batch) -> Tensor:
        return batch.inputs["label_mask"]

    def label_states(self, batch: Batch) -> tuple[Tensor, nn.Module, Tensor]:
        """Logits at once, with a head that changes nothing: the vocabulary is small."""
        logits, labels = self.forward(batch)
        return logits, nn.Identity(), labels

    def spans(self, batch: Batch, definition: str = "paper") -> tuple[Tensor, Tensor]:
        from minimal_aia.lab.spans import spans

        return spans(_sequences(batch), batch.task, definition)

    def save(
        self, folder: str | Path, state_dict: dict[str, Tensor] | None = None, hub_names: bool = True
    ) -> None:
        from safetensors.numpy import save_file

        from minimal_aia.lab import models

        with models.without_bars():
            super().save(folder, state_dict, hub_names)
        models.tokenizer(with_codes=not models.is_janus(self.model)).save_pretrained(folder)
        save_file({"codebook": self.codebook}, Path(folder) / "codebook.safetensors")

    def layers(self) -> list[nn.Module]:
        text = self.model.config.get_text_config()
        return find_layers(self.model, text.num_hidden_layers)


class LabDrawer(Drawer):
    """24 x 24 pixels. Lab models never saw an empty prompt in training: no guidance."""

    guidance = 1.0

    def __init__(self, adapter: LabAdapter) -> None:
        from minimal_aia.lab import images, models

        super().__init__(adapter)
        self.n_tokens = images.N_IMAGE_TOKENS
        self.janus = models.is_janus(self.model)

    def prompt(self, text: str) -> list[int]:
        from minimal_aia.lab.sequences import BOI, BOS, word_ids

        return [BOS, *word_ids(text), BOI]

    def step(self, ids: Tensor, drawn: bool, **inputs: Any) -> tuple[Tensor, Any]:
        from minimal_aia.lab.models import routed
        from minimal_aia.lab.sequences import FIRST_CODE
        from minimal_aia.models.janus import JanusDrawer

        if self.janus:
            return JanusDrawer.step(self, ids, drawn, **inputs)  # type: ignore[arg-type]
        inputs |= routed(self.model, torch.full_like(ids, drawn, dtype=torch.bool))
        out = self.model.model(input_ids=ids + FIRST_CODE if drawn else ids, **inputs)
        return self.model.lm_head(out.last_hidden_state[:, -1])[:, FIRST_CODE:], out.past_key_values

    def picture(self, tokens: Tensor) -> Image.Image:
        from PIL import Image

        from minimal_aia.lab import images

        return Image.fromarray(images.decode(tokens.cpu().numpy()[None], self.adapter.codebook)[0])


def as_batch(rows: Sequences, task: str, ids: list[str]) -> Batch:
    """A batch of the lab's own kind as adapters and trainer know it."""
    inputs = {"ids": rows.ids, "label_mask": rows.label_mask, "pixels": rows.pixels}
    return Batch(inputs, rows.query_mask, rows.key_mask, rows.attention_mask.long(), ids, task)


def _sequences(batch: Batch) -> Sequences:
    from minimal_aia.lab.sequences import Sequences

    return Sequences(
        attention_mask=batch.attention_mask.bool(),
        query_mask=batch.query_mask,
        key_mask=batch.key_mask,
        **batch.inputs,
    )


@lru_cache(maxsize=1024)
def _picture(picture: Picture) -> np.ndarray | None:
    """uint8 `[24, 24, 3]`, or None if it is no lab picture."""
    from minimal_aia.lab.scenes import IMAGE_SIZE
    from minimal_aia.pictures import open_picture

    image = open_picture(picture)
    return np.asarray(image) if image.size == (IMAGE_SIZE, IMAGE_SIZE) else None


def load_lab(name: str, device: Any = None, dtype: torch.dtype | None = None) -> LabAdapter:
    """A shipped lab model by name, or any folder that `python -m minimal_aia.lab.train` wrote.

    name: "unified", "janus", "mot", "generation", "understanding" (with or without "lab/"), or a folder.
    device, dtype: as for `load_adapter`, but the CPU is the default.
    """
    from minimal_aia.lab import models

    short = str(name).removeprefix("lab/")
    folder = CHECKPOINTS / short if short in models.NAMES else Path(name)
    if short not in models.NAMES and not folder.is_dir():
        close = nearest(str(name), (f"lab/{known}" for known in models.NAMES))
        raise AdapterError(
            f"there is no lab model {name!r}: one of {', '.join(models.NAMES)}, or a training folder{close}"
        )
    if not (folder / "config.json").is_file():
        raise AdapterError(
            f"{folder}: no lab model there; "
            + (how_to_get() if short in models.NAMES else "`python -m minimal_aia.lab.train` makes one")
        )
    model: Any
    model, codebook = models.load(folder)
    model.to(device=device, dtype=dtype)
    kind = short if short in models.NAMES else folder.name.split("-seed")[0]
    tasks = models.TASKS.get(kind, ("generation", "understanding"))
    return LabAdapter(f"lab/{short}" if short in models.NAMES else folder.name, model, codebook, tasks)
