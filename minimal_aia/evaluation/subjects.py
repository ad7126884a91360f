"""What the benchmark asks of anything that it scores: drawings and answers. Lab models as such subjects."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import yaml

from minimal_aia.lab import images, models
from minimal_aia.lab.sequences import BOI, BOS, EOI, EOS, FIRST_CODE, WORDS, pad, word_ids

MAX_ANSWER = 24  # tokens; the longest true answer describes three things in twenty words
BATCH = 256


class Subject(Protocol):
    """Anything that can be scored. Pictures are uint8 `[N, 24, 24, 3]`."""

    name: str
    seed: int
    tasks: tuple[str, ...]

    def draw(self, prompts: list[str], seed: int) -> np.ndarray:
        """One picture a prompt; the same seed gives the same pictures."""

    def answer(
        self, pictures: np.ndarray, questions: list[str], prompts: list[str] | None = None
    ) -> list[str]:
        """One answer a picture and question. With `prompts`, the picture is one that the subject has just
        drawn for that prompt, and prompt, picture, question and answer are one sequence."""


class LabModel:
    """A lab model as a subject: draws by sampling at temperature 1, answers greedily."""

    def __init__(
        self, name: str, seed: int, tasks: tuple[str, ...], model: Any, codebook: np.ndarray
    ) -> None:
        self.name, self.seed, self.tasks = name, seed, tasks
        self.model, self.codebook = model, codebook

    def draw(self, prompts: list[str], seed: int) -> np.ndarray:
        return images.decode(models.draw(self.model, prompts, seed), self.codebook)

    def answer(
        self, pictures: np.ndarray, questions: list[str], prompts: list[str] | None = None
    ) -> list[str]:
        codes = images.encode(pictures, self.codebook).tolist()
        # A Janus-like model has two embeddings of a picture, a mixture of transformers two experts for it.
        # The drawing of the running sequence is there as it was drawn; every other picture is read.
        task = "understanding" if prompts is None else "generation"
        starts = [[BOS, *word_ids(p)] for p in prompts] if prompts else [[BOS]] * len(questions)
        tokens = [
            [*start, BOI, *(FIRST_CODE + c for c in code), EOI, *word_ids(question)]
            for start, code, question in zip(starts, codes, questions, strict=True)
        ]
        answers = [""] * len(tokens)
        for length in sorted({len(t) for t in tokens}):
            rows = [i for i, t in enumerate(tokens) if len(t) == length]
            for first in range(0, len(rows), BATCH):
                part = rows[first : first + BATCH]
                found = self._greedy([tokens[i] for i in part], pictures[part], task)
                for i, words in zip(part, found, strict=True):
                    answers[i] = words
        return answers

    @torch.no_grad()
    def _greedy(self, tokens: list[list[int]], pictures: np.ndarray, task: str) -> list[str]:
        """The words up to <eos> that follow rows of one length."""
        model = self.model
        device = next(model.parameters()).device
        batch = pad([(row, "-" * len(row)) for row in tokens], pictures).to(device)
        embeds = models.embed(model, batch, task)  # [B, S, D]
        decoder = model.model.language_model if models.is_janus(model) else model.model
        drawn = (batch.ids >= FIRST_CODE) & (task == "generation")
        cache, said = None, []
        ended = torch.zeros(len(tokens), dtype=torch.bool, device=device)
        for _ in range(MAX_ANSWER):
            out = decoder(
                inputs_embeds=embeds, past_key_values=cache, use_cache=True, **models.routed(model, drawn)
            )
            cache = out.past_key_values
            token = model.lm_head(out.last_hidden_state[:, -1]).argmax(-1)  # [B]
            said.append(token)
            ended |= token == EOS
            if ended.all():
                break
            embeds = model.get_input_embeddings()(token)[:, None]
            drawn = torch.zeros_like(token, dtype=torch.bool)[:, None]
        return [_words(row) for row in torch.stack(said, dim=1).tolist()]


def _words(ids: list[int]) -> str:
    words = [WORDS[i] if i < FIRST_CODE else f"<code_{i - FIRST_CODE}>" for i in ids]
    return " ".join(words[: words.index("<eos>")] if "<eos>" in words else words)


def lab_subject(place: str | Path, device: str = "cpu") -> LabModel:
    """A lab model by name ("lab/unified") or the folder of a run. ValueError or OSError if there is none."""
    from minimal_aia.models.lab import load_lab

    adapter = load_lab(str(place), device=device)
    short = str(place).removeprefix("lab/")
    name, seed, base = (short, 0, short) if short in models.NAMES else origin(Path(place))
    tasks = models.TASKS.get(base, ("generation", "understanding"))
    return LabModel(name, seed, tasks, adapter.model.eval(), adapter.codebook)


def origin(folder: Path) -> tuple[str, int, str]:
    """Name, seed, and the kind of lab model that it is or started as.

    As the training wrote them down, else from a folder name like unified-seed3.
    """
    if (folder / "training.json").is_file():  # written by lab.train
        facts = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        return facts["name"], facts["seed"], facts["name"]
    name, seed = re.fullmatch(r"(.+?)(?:-seed(\d+))?", folder.resolve().name).groups()  # type: ignore[union-attr]
    if (folder / "recipe.yaml").is_file():  # written by `minimal-aia train`
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        base = Path(str(recipe["model"])).name.split("-seed")[0]
        return name, int(recipe["seed"]), base
    return name, int(seed or 0), name
