"""Checkpoints are written and loaded once a run; pictures and samples that all families share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from checkpoints import MAKERS

from minimal_aia.data import Sample
from minimal_aia.models import load_adapter

torch.set_num_threads(1)
OPTIONS = {"simplear": {"n_codes": 12}}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """`checkpoint("janus")`: the folder of a tiny model of that family, written at the first call."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = MAKERS[family](tmp_path_factory.mktemp(family.replace(".", "-")) / "tiny")
        return made[family]

    return folder


@pytest.fixture(scope="session")
def adapter(checkpoint):
    """`adapter("janus")`: that checkpoint, loaded by `load_adapter` through the library's
    `from_pretrained`."""
    loaded = {}

    def load(family: str):
        if family not in loaded:
            loaded[family] = load_adapter(checkpoint(family), device="cpu", **OPTIONS.get(family, {}))
        return loaded[family]

    return load


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> list[Path]:
    """Three noisy pictures of different shapes."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    paths = []
    for i, (width, height) in enumerate([(40, 30), (24, 24), (16, 48)]):
        paths.append(folder / f"{i}.png")
        pixels = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(paths[-1])
    return paths


@pytest.fixture(scope="session")
def samples(pictures) -> dict[str, list[Sample]]:
    """Two samples a task: unlike lengths, several turns, several images, words that also occur in
    templates."""
    a, b, c = pictures
    chat = (("what colour is the circle?", "The circle is red."), ("user: how many squares?", "assistant"))
    return {
        "generation": [
            Sample("g:1", "generation", (("user: a red circle, assistant", ""),), (a,)),
            Sample(
                "g:2", "generation", (("the sign says \u2603 hello world\nand two blue squares", ""),), (b,)
            ),
        ],
        "understanding": [
            Sample("u:1", "understanding", chat, (a,)),
            Sample("u:2", "understanding", (("describe", "a house near the sea \u2603."),), (b, c)),
        ],
    }
