"""How well a lab model answers and draws, on scenes it never saw. All shares come with their item count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch

from minimal_aia.capture import capture
from minimal_aia.lab import images, models, scenes
from minimal_aia.lab.sequences import Sequences, draw_batch, pad, understanding_tokens
from minimal_aia.profiles import uniform_intensity

EVALUATION_SEED = 10_000  # far from every training seed


@torch.no_grad()
def held_out_loss(model: Any, codebook: np.ndarray, task: str, batches: int = 8, size: int = 64) -> float:
    """Next-token loss (nats a label token) over `batches * size` held-out sequences, in training format."""
    device = next(model.parameters()).device
    losses, weights = [], []
    for i in range(batches):
        rng = np.random.default_rng((EVALUATION_SEED, i))
        batch = draw_batch(task, size, rng, codebook, held_out=True).to(device)
        losses.append(models.next_token_loss(model, batch, task).item())
        weights.append(int(batch.label_mask.sum()))
    return float(np.average(losses, weights=weights))


@torch.no_grad()
def answers_right(model: Any, batch: Sequences) -> np.ndarray:
    """Would greedy decoding give exactly the answer and then stop? bool `[B]`, one question a sequence.

    Greedy decoding reproduces the reference if and only if every label is the most likely token given the
    true tokens before it, so one teacher-forced pass decides it without decoding.
    """
    logits, labels = models.label_logits(model, batch, "understanding")
    right = (logits.argmax(-1) == labels).cpu()
    rows = batch.label_mask[:, 1:].nonzero()[:, 0].cpu()
    wrong = torch.zeros(len(batch.ids)).index_add_(0, rows, (~right).float())
    return (wrong == 0).numpy()


def held_out_items(kind: str, count: int, seed: int) -> tuple[list[scenes.Scene], list[scenes.Question]]:
    """The held-out scenes and questions of one kind that every model is asked. More of them begin alike."""
    rng = np.random.default_rng((seed, scenes.QUESTION_KINDS.index(kind)))
    found: list[scenes.Scene] = []
    questions: list[scenes.Question] = []
    while len(found) < count:
        scene = scenes.draw_scenes(rng, 1, held_out=True)[0]
        question = scenes.draw_question(scene, kind, rng)
        if question:
            found.append(scene)
            questions.append(question)
    return found, questions


def guessing_level(kind: str, count: int = 100, seed: int = EVALUATION_SEED) -> float:
    """Exact match of a model that sees everything but ignores which thing is asked about.

    kind: "color" or "position"; it answers with that property of any thing in the picture, each as likely.
    """
    shares = []
    for scene, question in zip(*held_out_items(kind, count, seed), strict=True):
        answers = [t.color if kind == "color" else t.place for t in scene]
        shares.append(answers.count(question.answer) / len(answers))
    return float(np.mean(shares))


def answer_table(
    model: Any, codebook: np.ndarray, per_kind: int = 100, seed: int = EVALUATION_SEED
) -> pd.DataFrame:
    """Exact match by question kind: columns `kind`, `right`, `items`. One question a held-out scene."""
    device = next(model.parameters()).device
    rows = []
    for kind in scenes.QUESTION_KINDS:
        found, questions = held_out_items(kind, per_kind, seed)
        pictures = np.stack([scenes.render(s) for s in found])
        codes = images.encode(pictures, codebook).tolist()
        tokens = [
            understanding_tokens([(q.text, q.answer)], c) for q, c in zip(questions, codes, strict=True)
        ]
        right = answers_right(model, pad(tokens, pictures).to(device))
        rows.append({"kind": kind, "right": float(right.mean()), "items": per_kind})
    return pd.DataFrame(rows)


def held_out_prompts(
    category: str, count: int, seed: int = EVALUATION_SEED
) -> tuple[list[scenes.Scene], list[scenes.Prompt]]:
    """The prompts of one category that every model draws, and the held-out scene each was made for."""
    rng = np.random.default_rng((seed, 100 + scenes.CATEGORIES.index(category)))
    found: list[scenes.Scene] = []
    wanted: list[scenes.Prompt] = []
    while len(wanted) < count:
        scene = scenes.draw_scenes(rng, 1, True)[0]
        options = [p for p in scenes.prompts(scene) if p.category == category]
        if options:
            found.append(scene)
            wanted.append(options[rng.integers(len(options))])
    return found, wanted


def drawing_table(
    model: Any, codebook: np.ndarray, per_category: int = 100, seed: int = EVALUATION_SEED
) -> pd.DataFrame:
    """Share of prompts drawn right by category: columns `category`, `right`, `items`. One sample a prompt."""
    rows = []
    for number, category in enumerate(scenes.CATEGORIES):
        _, wanted = held_out_prompts(category, per_category, seed)
        codes = models.draw(model, [p.text for p in wanted], seed=seed + number)
        pictures = images.decode(codes, codebook)
        right = [p.satisfied_by(images.detect(picture)) for p, picture in zip(wanted, pictures, strict=True)]
        rows.append({"category": category, "right": float(np.mean(right)), "items": per_category})
    return pd.DataFrame(rows)


@torch.no_grad()
def curves(model: Any, codebook: np.ndarray, task: str, samples: int = 256) -> pd.DataFrame:
    """Layer curve on held-out sequences in the training format.

    Columns `layer` (0-based), `mean`, `std` (over samples), `uniform` (flat-attention baseline), `samples`.
    """
    device = next(model.parameters()).device
    rng = np.random.default_rng((EVALUATION_SEED, 200))
    batch = draw_batch(task, samples, rng, codebook, held_out=True).to(device)
    with capture(model, batch.query_mask, batch.key_mask, attention_mask=batch.attention_mask) as record:
        models.label_logits(model, batch, task)
    value = record.intensity.float().cpu()  # [L, B]
    uniform = uniform_intensity(batch.query_mask, batch.key_mask, batch.attention_mask).mean()
    return pd.DataFrame(
        {
            "layer": range(len(value)),
            "mean": value.mean(1),
            "std": value.std(1),
            "uniform": float(uniform),
            "samples": samples,
        }
    )
