"""Small data sets for the tests of the data pipeline: noisy pictures and the same samples in every layout."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from minimal_aia.data import IMAGE, Sample
from minimal_aia.models.base import Batch
from minimal_aia.pictures import PictureBytes

WORDS = "a red circle and two blue squares on white wall the sign says hello".split()
SIZES = [(40, 30), (24, 24), (16, 48), (33, 20)]  # width, height


def write_pictures(folder: Path, n: int = 4) -> list[str]:
    """n noisy PNG files of different shapes; their paths relative to `folder`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    names = []
    for i in range(n):
        width, height = SIZES[i % len(SIZES)]
        pixels = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
        names.append(f"images/{i}.png")
        Image.fromarray(pixels).save(folder / names[-1])
    return names


def entries(task: str, n: int, pictures: list[str], seed: int = 0) -> list[dict[str, Any]]:
    """n different samples in the authors' layout; understanding: one to three turns, one or two pictures."""
    draw = random.Random(f"{task} {seed}")
    made = []
    for i in range(n):
        image: Any = pictures[i % len(pictures)]
        text = f"{i} " + " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))
        if task == "generation":
            turns = [(text, IMAGE)]
        else:
            image = [image, pictures[(i + 1) % len(pictures)]] if i % 3 == 2 else image
            marks = f"{IMAGE}\n" * (len(image) if isinstance(image, list) else 1)
            answers = [" ".join(draw.choices(WORDS, k=draw.randint(1, 6))) for _ in range(i % 3 + 1)]
            turns = [(f"{marks}{text}?" if k == 0 else f"and {k}?", a) for k, a in enumerate(answers)]
        said = [{"from": who, "value": v} for turn in turns for who, v in zip(("human", "gpt"), turn)]
        made.append({"image": image, "conversations": said, "type": f"type {i % 2}", "source": "made up"})
    return made


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def content(sample: Sample) -> tuple[Any, ...]:
    """All of a sample but its id, its pictures as bytes: equal for the same sample from any source."""
    pictures = tuple(p.data if isinstance(p, PictureBytes) else p.read_bytes() for p in sample.images)
    return sample.task, sample.turns, pictures, sample.type, sample.source


def padding(batches: Mapping[str, Batch]) -> tuple[int, int]:
    """(tokens, positions) of batches: their difference is padding."""
    masks = [batch.attention_mask for batch in batches.values()]
    return sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
