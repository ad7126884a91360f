"""What every model adapter offers: samples in, padded batch with spans out, one forward pass.

An adapter hides three things that differ from family to family: how a sample becomes tokens, where the
query and key spans lie, and how the teacher-forced pass is composed. Everything else in the library
(profiles, training, evaluation) sees only a `Batch` and the methods below.

Spans (paper, section 3.1):

=============  =====================================  ==========================================
task           queries                                keys
=============  =====================================  ==========================================
generation     the image tokens' own positions        the prompt's text tokens, nothing else
understanding  the answers' text tokens (all turns)   the image placeholder tokens (all images)
=============  =====================================  ==========================================

Templates, role names, begin/end markers and padding belong to no span.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minimal_aia.record import shift_left

if TYPE_CHECKING:
    from minimal_aia.data import Sample
    from minimal_aia.models.draw import Drawer
    from minimal_aia.pictures import Picture, PictureCodes

TASKS = ("generation", "understanding")


class AdapterError(ValueError):
    """A model cannot be loaded or used as asked; the message says what is wrong and what to do."""


@dataclass
class Batch:
    """A padded, teacher-forced batch.

    inputs: what `Adapter.forward` needs (token ids, pixels, ...), tensors only.
    query_mask, key_mask: bool [B, S]; True on the span, never on padding.
    attention_mask: [B, S]; 1 on real tokens, 0 on padding.
    ids: the samples' ids, in row order.
    task: "generation" or "understanding".
    """

    inputs: dict[str, Tensor]
    query_mask: Tensor
    key_mask: Tensor
    attention_mask: Tensor
    ids: list[str]
    task: str = ""
    # One dict a row for things a forward pass cannot take as tensors (a diffusion prompt, a picture's size).
    extra: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of_rows(
        cls,
        rows: Sequence[tuple[list[int], list[int], list[int]]],
        samples: Sequence[Sample],
        task: str,
        extra: Sequence[dict[str, Any]] = (),
    ) -> Batch:
        """Token ids and the two masks of every sample, padded on the right."""
        ids, queries, keys = zip(*rows)
        return cls(
            inputs={"input_ids": pad_rows(ids)},
            query_mask=pad_rows(queries).bool(),
            key_mask=pad_rows(keys).bool(),
            attention_mask=pad_rows([[1] * len(row) for row in ids]),
            ids=[sample.id for sample in samples],
            task=task,
            extra=list(extra),
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """The same batch on `device`; floating-point inputs also become `dtype` when given."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if dtype and tensor.is_floating_point() else None)

        return replace(
            self,
            inputs={name: move(tensor) for name, tensor in self.inputs.items()},
            query_mask=self.query_mask.to(device),
            key_mask=self.key_mask.to(device),
            attention_mask=self.attention_mask.to(device),
        )

    def __len__(self) -> int:
        return len(self.ids)


class Adapter:
    """Base class of all adapters: a name, a model, and how samples pass through it.

    Subclasses set `family` and `tasks` and write `collate`, `forward` and `layers`.
    """

    family: str = ""
    tasks: tuple[str, ...] = ()
    definitions: tuple[str, ...] = ("paper", "predicting")  # of `spans`
    ends_turns = False  # training needs the end of the last answer too, which chat templates leave out
    drops_prompts = False  # whether `collate` knows samples whose prompt is dropped
    coded_tasks: tuple[str, ...] = ()  # tasks whose pictures may come as codes (`encode_pictures`)

    def __init__(self, name: str, model: nn.Module) -> None:
        self.name = name
        self.model: Any = model
        self._lengths: dict[tuple[Sample, str], int] = {}
        self._drawn: dict[Sample, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where batches go: to the weights; to the CPU when the adapter was loaded without any ("meta")."""
        device = next(self.model.parameters()).device
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' floating-point type (of the first floating one: 4-bit weights are integers)."""
        floating = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        return next(floating, torch.float32)

    def why_not(self, sample: Sample, task: str) -> str | None:
        """The reason this model cannot use `sample` for `task`; None if it can."""
        if task not in self.tasks:
            return f"{self.family} does not do {task} (only {', '.join(self.tasks)})"
        if task == "understanding" and not sample.images:
            return "no image to ask about"
        if task == "understanding" and not any(answer.strip() for _, answer in sample.turns):
            return "no answer text, so there would be no query token"
        if task == "generation" and not sample.turns[0][0].strip() and not sample.dropped:
            return "empty prompt, so there would be no key token"
        return self.bad_text("\n".join(part for turn in sample.turns for part in turn))

    def bad_text(self, text: str) -> str | None:
        """The reason this model cannot read `text`; None if it can."""
        return None

    def drawer(self) -> Drawer:
        """What the loop of `minimal_aia.models.draw` has to know to draw pictures with this model."""
        raise AdapterError(
            f"{self.name}: cannot draw pictures for a benchmark; models of these families can: "
            "janus, emu3, lab"
        )

    def drawn(self, sample: Sample, drawer: Drawer, seed: int) -> Tensor:
        """The image tokens that the model draws, once, for a sample without a picture. int [N]"""
        from minimal_aia.models.draw import draw_tokens, image_seed

        if sample not in self._drawn:
            seeds = [image_seed(seed, sample.id)]
            self._drawn[sample] = draw_tokens(drawer, [sample.turns[0][0]], seeds)[0].clone()
        return self._drawn[sample]

    def length(self, sample: Sample, task: str) -> int:
        """Tokens of the sample once batched, to group samples of like length. Remembered."""
        key = (sample, task)
        if key not in self._lengths:
            self._lengths[key] = int(self.collate([sample], task).attention_mask.sum())
        return self._lengths[key]

    def picture_length(self, picture: Picture) -> int:
        """How many tokens a picture takes, in families where that differs from picture to picture."""
        return 0

    def encode_pictures(self, samples: Sequence[Sample]) -> list[list[PictureCodes]]:
        """The pictures of samples as image codes: what `collate` and `forward` would make of them."""
        raise AdapterError(f"{self.name}: the {self.family} family has no image codes")

    def set_pictures(self, fit: str = "pad", area: int = 0) -> None:
        """How pictures are brought to size, where the family leaves a choice.

        fit: of target pictures in models that know one shape only (Janus): "crop" or "pad". area: pixels, in
        models that keep a picture's shape (Emu3); 0 leaves the processor's bounds.
        """

    def collate(self, samples: Sequence[Sample], task: str) -> Batch:
        """A padded `Batch` on the model's device, spans marked. AdapterError if a sample cannot be used."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Any:
        """One teacher-forced forward pass of the language model over `batch`."""
        raise NotImplementedError

    def layers(self) -> list[nn.Module]:
        """The decoder layers, in order; row l of an intensity tensor belongs to `layers()[l]`."""
        raise NotImplementedError

    def label_mask(self, batch: Batch) -> Tensor:
        """bool [B, S]: the tokens that the next-token loss asks for.

        Generation: all image tokens. Understanding: the answers and, where a sample has them, ends of turns.
        """
        return batch.query_mask

    def label_states(self, batch: Batch) -> tuple[Tensor, nn.Module, Tensor]:
        """What the next-token loss needs, without logits: one pass of the language model over `batch`.

        Returns the hidden states [N, D] of the N positions that predict a label, the head that makes logits
        [N, V] of them, and the labels [N], row by row.
        """
        raise AdapterError(f"{self.name}: training the {self.family} family is not supported")

    def spans(self, batch: Batch, definition: str = "paper") -> tuple[Tensor, Tensor]:
        """(query_mask, key_mask), bool [B, S]: "paper", or "predicting", with queries one to the left."""
        if definition not in self.definitions:
            raise AdapterError(
                f"{self.name}: no spans {definition!r}; choose from {', '.join(self.definitions)}"
            )
        query = batch.query_mask if definition == "paper" else shift_left(batch.query_mask)
        return query, batch.key_mask

    def save(
        self, folder: str | Path, state_dict: dict[str, Tensor] | None = None, hub_names: bool = True
    ) -> None:
        """Write a folder that `load_adapter` reads: weights (safetensors), configuration, processor.

        hub_names: weights under the names that files on the hub have, where the library's class has others
        (Emu3); with False as in the model's own state dictionary. `from_pretrained` reads both.
        """
        self.model.save_pretrained(folder, state_dict=state_dict, save_original_format=hub_names)

    def capture(self, batch: Batch) -> AbstractContextManager[Any]:
        """`with adapter.capture(batch) as record: adapter.forward(batch)`; `record.per_head` is [L, B, H].

        The default is `minimal_aia.capture.capture` on the whole model. Models whose attention does not pass
        through transformers (diffusers, remote code) return their own record with the same fields.
        """
        from minimal_aia.capture import capture

        return capture(self.model, batch.query_mask, batch.key_mask, attention_mask=batch.attention_mask)

    def check(self, samples: Sequence[Sample], task: str) -> None:
        """One AdapterError that lists every sample this model cannot use; `collate` calls it first."""
        if task not in TASKS:
            raise AdapterError(f"unknown task {task!r}; choose one of {', '.join(TASKS)}")
        reasons = [f"{s.id}: {reason}" for s in samples if (reason := self.why_not(s, task))]
        if reasons:
            raise AdapterError(f"{self.name} cannot use these samples for {task}:\n  " + "\n  ".join(reasons))


def pad_rows(rows: Sequence[Sequence[int]], value: int = 0) -> Tensor:
    """Stack lists of numbers as [B, S], filled with `value` on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def causal_but_within(image: Tensor, batch: Batch) -> Tensor:
    """Which keys each query sees: causal, and the tokens of an image [B, S] each other. bool [B, S, S]"""
    causal = torch.ones(2 * image.shape[1:], dtype=torch.bool, device=image.device).tril()
    return (causal | (image[:, :, None] & image[:, None, :])) & batch.attention_mask.bool()[:, None, :]


def find_layers(model: nn.Module, n_layers: int | None = None) -> list[nn.Module]:
    """The decoder layers of a language model: the longest ModuleList of blocks with a `self_attn`.

    n_layers: the expected count (from the config); a different one is an AdapterError.
    """
    lists = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(hasattr(m, "self_attn") for m in module)
    ]
    if not lists:
        raise AdapterError(f"{type(model).__name__} has no list of decoder layers with a `self_attn`")
    layers = max(lists, key=len)
    if n_layers is not None and len(layers) != n_layers:
        raise AdapterError(f"{type(model).__name__}: the config says {n_layers} layers, found {len(layers)}")
    return layers
