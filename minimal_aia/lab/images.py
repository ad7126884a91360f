"""Pictures to tokens and back, and pictures to scenes: the lab's image tokenizer and its detector.

The tokenizer is k-means over 4x4-pixel patches: 36 tokens a picture, one codebook shared by reading and
drawing. It is lossy on purpose (there are more distinct patches than codes), as VQ tokenizers are.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from scipy.cluster.vq import kmeans2

from minimal_aia.lab import scenes

PATCH = 4
GRID = scenes.IMAGE_SIZE // PATCH  # 6x6 tokens
N_IMAGE_TOKENS = GRID * GRID
N_CODES = 160


def to_patches(images: np.ndarray) -> np.ndarray:
    """uint8 `[N, 24, 24, 3]` -> float32 `[N, 36, 48]` in [0, 1], in reading order."""
    n = len(images)
    patches = images.reshape(n, GRID, PATCH, GRID, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(n, N_IMAGE_TOKENS, PATCH * PATCH * 3).astype(np.float32) / 255


def from_patches(patches: np.ndarray) -> np.ndarray:
    """The inverse of `to_patches`: float `[N, 36, 48]` -> uint8 `[N, 24, 24, 3]`."""
    n = len(patches)
    images = patches.reshape(n, GRID, GRID, PATCH, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    return (
        (images.reshape(n, scenes.IMAGE_SIZE, scenes.IMAGE_SIZE, 3).clip(0, 1) * 255).round().astype(np.uint8)
    )


def fit_codebook(seed: int = 0, n_scenes: int = 4000, n_codes: int = N_CODES) -> np.ndarray:
    """K-means centroids of training patches, float32 `[codes, 48]`, most used first."""
    rng = np.random.default_rng(seed)
    images = np.stack([scenes.render(s) for s in scenes.draw_scenes(rng, n_scenes)])
    patches, counts = np.unique(to_patches(images).reshape(-1, PATCH * PATCH * 3), axis=0, return_counts=True)
    # Blank paper is half of all patches: the square root keeps rare quadrants from losing their code to it.
    weights = np.repeat(np.arange(len(patches)), np.ceil(np.sqrt(counts)).astype(int))
    centroids, labels = kmeans2(patches[weights], n_codes, minit="++", iter=50, rng=rng)
    order = np.argsort(-np.bincount(labels, minlength=n_codes), kind="stable")
    return centroids[order].astype(np.float32)


def encode(images: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """uint8 `[N, 24, 24, 3]` -> nearest code of every patch, int64 `[N, 36]`."""
    patches = to_patches(images)
    distance = (codebook**2).sum(
        -1
    ) - 2 * patches @ codebook.T  # the patch's own norm does not change the winner
    return distance.argmin(-1)


def decode(codes: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Codes `[N, 36]` -> uint8 `[N, 24, 24, 3]`."""
    return from_patches(codebook[codes])


@cache
def _templates() -> tuple[np.ndarray, list[tuple[str, str, int, int] | None]]:
    """Every picture a cell can show, `[templates, 8, 8, 3]`, with (color, shape, dy, dx); None is empty."""
    labels: list[tuple[str, str, int, int] | None] = [None]
    cells = [scenes.render(())[:8, :8]]
    for color in scenes.COLORS:
        for shape in scenes.SHAPES:
            for dy in range(3):
                for dx in range(3):
                    labels.append((color, shape, dy, dx))
                    cells.append(scenes.render((scenes.Thing(color, shape, 0, 0, dy, dx),))[:8, :8])
    return np.stack(cells).astype(np.float32), labels


def detect(image: np.ndarray) -> scenes.Scene:
    """What a picture shows: in each cell the nearest of all possible cell pictures. Deterministic.

    `image`: uint8 `[24, 24, 3]`, rendered or drawn by a model. A smeared shape counts as the nearest one.
    """
    templates, labels = _templates()
    flat = templates.reshape(len(templates), -1)
    found = []
    for row in range(3):
        for col in range(3):
            cell = image[8 * row : 8 * row + 8, 8 * col : 8 * col + 8].astype(np.float32).reshape(-1)
            label = labels[int(((flat - cell) ** 2).sum(-1).argmin())]
            if label:
                color, shape, dy, dx = label
                found.append(scenes.Thing(color, shape, row, col, dy, dx))
    return tuple(found)


def same_content(a: scenes.Scene, b: scenes.Scene) -> bool:
    """Same things in the same cells; the jitter inside a cell is not asked for by any prompt."""
    return [(t.name, t.place) for t in a] == [(t.name, t.place) for t in b]


def detector_error(codebook: np.ndarray | None = None, count: int = 1000, seed: int = 1) -> float:
    """Share of held-out scenes that the detector misreads: as rendered, or once tokenized and decoded."""
    found = scenes.draw_scenes(np.random.default_rng(seed), count, held_out=True)
    images = np.stack([scenes.render(s) for s in found])
    if codebook is not None:
        images = decode(encode(images, codebook), codebook)
    return float(np.mean([not same_content(detect(i), s) for i, s in zip(images, found, strict=True)]))
