"""Scenes to token sequences with spans: the one format that all lab models are trained and profiled in.

    generation      <bos> prompt <boi> 36 codes <eoi>             queries: codes      keys: prompt words
    understanding   <bos> <boi> 36 codes <eoi> q a <eos> q a …     queries: answers    keys: codes

Models with a vision encoder of their own see the same layout: their embedding of the picture stands where
the codes stand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minimal_aia.lab import images, scenes

SPECIAL = ("<pad>", "<bos>", "<eos>", "<boi>", "<eoi>", "<image>", "<unk>")
WORDS = (*SPECIAL, *scenes.vocabulary())
WORD_ID = {word: i for i, word in enumerate(WORDS)}
PAD, BOS, EOS, BOI, EOI, IMAGE, UNK = range(len(SPECIAL))
FIRST_CODE = len(WORDS)  # image code c is token FIRST_CODE + c
VOCABULARY = FIRST_CODE + images.N_CODES
QUESTIONS_PER_PICTURE = 4


@dataclass
class Sequences:
    """A padded batch. All masks bool `[B, S]`; padding is on the right."""

    ids: Tensor  # [B, S] int64
    attention_mask: Tensor  # real tokens
    query_mask: Tensor
    key_mask: Tensor
    label_mask: Tensor  # tokens that the next-token loss asks for
    pixels: Tensor  # [B, 3, 24, 24] float in [-1, 1]

    def to(self, device: torch.device | str) -> Sequences:
        return Sequences(**{name: value.to(device) for name, value in vars(self).items()})

    def rows(self, start: int, stop: int) -> Sequences:
        """Some of the sequences, without the padding that only the others need."""
        length = int(self.attention_mask[start:stop].sum(-1).max())
        return Sequences(
            **{
                name: value[start:stop] if name == "pixels" else value[start:stop, :length]
                for name, value in vars(self).items()
            }
        )


def word_ids(text: str) -> list[int]:
    return [WORD_ID.get(word, UNK) for word in text.split()]


def unknown_words(text: str) -> list[str]:
    """The words that no lab model knows, in order."""
    return [word for word in text.split() if word not in WORD_ID]


def generation_tokens(prompt: str, codes: list[int]) -> tuple[list[int], str]:
    """Token ids and, one letter a token, its role: k key, q query (and label), - neither."""
    words = word_ids(prompt)
    ids = [BOS, *words, BOI, *(FIRST_CODE + c for c in codes), EOI]
    return ids, "-" + "k" * len(words) + "-" + "q" * len(codes) + "-"


def understanding_tokens(turns: list[tuple[str, str]], codes: list[int]) -> tuple[list[int], str]:
    """As above; `e` is the end of an answer: a label, but no query."""
    ids = [BOS, BOI, *(FIRST_CODE + c for c in codes), EOI]
    roles = "--" + "k" * len(codes) + "-"
    for question, answer in turns:
        q, a = word_ids(question), word_ids(answer)
        ids += [*q, *a, EOS]
        roles += "-" * len(q) + "q" * len(a) + "e"
    return ids, roles


def pad(rows: list[tuple[list[int], str]], pictures: np.ndarray, length: int | None = None) -> Sequences:
    """Stack rows of (ids, roles) and uint8 pictures `[B, 24, 24, 3]`."""
    length = length or max(len(ids) for ids, _ in rows)
    ids = np.full((len(rows), length), PAD)
    roles = np.full((len(rows), length), " ")
    for i, (row, role) in enumerate(rows):
        ids[i, : len(row)] = row
        roles[i, : len(row)] = list(role)
    query = roles == "q"
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    return Sequences(
        ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(roles != " "),
        query_mask=torch.from_numpy(query),
        key_mask=torch.from_numpy(roles == "k"),
        label_mask=torch.from_numpy(query | (roles == "e")),
        pixels=pixels,
    )


def draw_batch(
    task: str,
    count: int,
    rng: np.random.Generator,
    codebook: np.ndarray,
    held_out: bool = False,
    turns: int = QUESTIONS_PER_PICTURE,
    length: int | None = None,
) -> Sequences:
    """A batch of fresh scenes for one task."""
    found = scenes.draw_scenes(rng, count, held_out)
    pictures = np.stack([scenes.render(s) for s in found])
    codes = images.encode(pictures, codebook).tolist()
    if task == "generation":
        rows = [
            generation_tokens(scenes.draw_prompt(s, rng).text, c) for s, c in zip(found, codes, strict=True)
        ]
    elif task == "understanding":
        rows = [
            understanding_tokens([(q.text, q.answer) for q in scenes.draw_questions(s, turns, rng)], c)
            for s, c in zip(found, codes, strict=True)
        ]
    else:
        raise ValueError(f'unknown task {task!r}: "generation" or "understanding"')
    return pad(rows, pictures, length)
