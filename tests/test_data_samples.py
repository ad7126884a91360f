"""The shipped samples: counts, sizes, truth where a program can check it, licences, and making them again."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minimal_aia.data import read_samples
from minimal_aia.lab import images, scenes
from minimal_aia.lab.sequences import unknown_words

FOLDER = Path(__file__).resolve().parents[1] / "data_samples"
SAMPLES = {task: read_samples(FOLDER / f"{task}.jsonl") for task in ("generation", "understanding")}
README = (FOLDER / "README.md").read_text(encoding="utf-8")


def test_counts_are_those_of_the_readme():
    types = {
        "generation": ("text", "short", "dense"),
        "understanding": ("caption", "choice", "yes_no", "open"),
    }
    found = {task: Counter((s.source, s.type) for s in samples) for task, samples in SAMPLES.items()}
    for task, samples in SAMPLES.items():
        assert len(samples) == 100
        assert {s.task for s in samples} == {task}
        assert {s.type for s in samples} == set(types[task])
        assert all(s.images for s in samples)
    for source in ("lab", "photo", "text"):
        row = next(line for line in README.splitlines() if line.startswith(f"| {source} |"))
        numbers = [int(cell or 0) for cell in row.replace(" ", "").split("|")[2:-1]]
        assert numbers == [found[task][source, kind] for task in types for kind in types[task]]


def test_enough_lab_samples_for_the_lab_models():
    assert sum(s.source == "lab" for s in SAMPLES["generation"]) >= 55
    assert sum(s.source == "lab" for s in SAMPLES["understanding"]) >= 60


def test_lab_samples_are_true_and_held_out():
    """Read back by the lab's detector, which shares no code with the way the pictures are drawn."""
    for task, samples in SAMPLES.items():
        for sample in samples:
            if sample.source != "lab":
                continue
            picture = np.array(Image.open(sample.images[0]))
            assert picture.shape == (24, 24, 3)
            scene = images.detect(picture)
            assert scenes.is_held_out(scene), sample.id
            (text, answer) = sample.turns[0]
            assert not unknown_words(f"{text} {answer}"), sample.id
            if task == "generation":
                (prompt,) = [p for p in scenes.prompts(scene) if p.text == text]
                assert prompt.type == sample.type
                assert prompt.satisfied_by(scene)
            else:
                assert answer == true_answer(text, scene), sample.id


def true_answer(question: str, scene: scenes.Scene) -> str:
    """Answers the lab's questions by reading them, independently of the code that writes them."""
    words = question.replace(" ?", "").split()
    colors, shapes = [t.color for t in scene], [t.shape for t in scene]

    def thing(color, shape):
        (found,) = [t for t in scene if (t.color, t.shape) == (color, shape)]
        return found

    match words:
        case ["describe", "the", "image"]:
            places = [
                f"a {t.color} {t.shape} at {t.place}" for t in sorted(scene, key=lambda t: (t.row, t.col))
            ]
            return " and ".join(places)
        case ["is", "there", "a", color, shape]:
            return "yes" if (color, shape) in zip(colors, shapes) else "no"
        case ["is", "the", shape, first, "or", second]:
            (color,) = {t.color for t in scene if t.shape == shape}
            assert color in (first, second)
            return color
        case ["what", "color", "is", "the", shape]:
            (color,) = {t.color for t in scene if t.shape == shape}
            return color
        case ["what", "shape", "is", color]:
            (shape,) = {t.shape for t in scene if t.color == color}
            return shape
        case ["how", "many", "shapes", "are", "there"]:
            return "zero one two three".split()[len(scene)]
        case ["how", "many", color, "shapes", "are", "there"]:
            return "zero one two three".split()[colors.count(color)]
        case ["how", "many", plural, "are", "there"]:
            singular = plural.removesuffix("es") if plural == "crosses" else plural.removesuffix("s")
            return "zero one two three".split()[shapes.count(singular)]
        case ["where", "is", "the", color, shape]:
            return thing(color, shape).place
        case ["is", "the", color_a, shape_a, *relation, "the", color_b, shape_b]:
            a, b = thing(color_a, shape_a), thing(color_b, shape_b)
            true = {
                "left of": a.col < b.col,
                "right of": a.col > b.col,
                "above": a.row < b.row,
                "below": a.row > b.row,
            }
            return "yes" if true[" ".join(relation)] else "no"
    raise AssertionError(f"a question of unknown form: {question}")


@pytest.mark.parametrize("source", ["lab", "photo", "text"])
def test_yes_and_no_are_balanced(source):
    answers = [
        s.turns[0][1].lower().strip(".")
        for s in SAMPLES["understanding"]
        if (s.source, s.type) == (source, "yes_no")
    ]
    assert set(answers) == {"yes", "no"}
    assert abs(answers.count("yes") - answers.count("no")) <= 1


def test_every_other_image_has_a_row_in_the_readme():
    """File, title or words, author, licence, source: no empty cell, no row without a file."""
    on_disk = {p.relative_to(FOLDER).as_posix() for p in (FOLDER / "images").rglob("*") if p.is_file()}
    used = {
        image.relative_to(FOLDER).as_posix()
        for samples in SAMPLES.values()
        for s in samples
        for image in s.images
    }
    assert on_disk == used
    rows = re.findall(r"^\| (images/(?:photo|text)/\S+) \|(.*)\|$", README, flags=re.MULTILINE)
    assert len(rows) == len({name for name, _ in rows})
    assert {name for name, _ in rows} == {name for name in on_disk if "/lab/" not in name}
    for name, rest in rows:
        cells = [cell.strip() for cell in rest.split(" | ")]
        assert all(cells), name
        if "/photo/" in name:
            assert len(cells) == 4
            assert cells[2] in ("CC0", "public domain")


def test_every_file_has_a_licence_in_the_readme():
    """One row of the table, by file name or by folder, and no row without a file."""
    (table,) = re.findall(r"^## Licences\n(.*?)^## ", README, flags=re.MULTILINE | re.DOTALL)
    rows = [row.strip("|").split(" | ") for row in table.splitlines() if row.startswith("| ")][1:]
    assert all(len(row) == 3 and all(cell.strip() for cell in row) for row in rows)
    paths = [path.strip() for row in rows for path in row[0].split(",")]
    files = [p.relative_to(FOLDER).as_posix() for p in FOLDER.rglob("*") if p.is_file()]
    for file in files:
        if "__pycache__" not in file:
            found = [path for path in paths if file == path or (path.endswith("/") and file.startswith(path))]
            assert len(found) == 1, f"{file}: rows {found}"
    for path in paths:
        assert any(file.startswith(path) for file in files), f"{path} does not exist"


def test_images_are_small():
    files = [p for p in (FOLDER / "images").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 5_000_000
    for path in files:
        with Image.open(path) as image:
            assert image.mode == "RGB"
            assert max(image.size) <= 384


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    if importlib.util.find_spec("skimage") is None:
        pytest.skip("scikit-image holds the photographs; pip install scikit-image")
    folder = tmp_path_factory.mktemp("samples")
    command = [sys.executable, FOLDER / "make_samples.py", "--out", folder]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("task", ["generation", "understanding"])
def test_made_again_the_lines_are_the_same_bytes(made, task):
    assert (made / f"{task}.jsonl").read_bytes() == (FOLDER / f"{task}.jsonl").read_bytes()


def test_made_again_the_images_are_the_same(made):
    """Lab pictures to the pixel; JPEG and font rendering may differ a little between library versions."""
    again = sorted(p.relative_to(made) for p in (made / "images").rglob("*") if p.is_file())
    assert again == sorted(p.relative_to(FOLDER) for p in (FOLDER / "images").rglob("*") if p.is_file())
    for name in again:
        new, old = (np.array(Image.open(folder / name), dtype=float) for folder in (made, FOLDER))
        assert new.shape == old.shape
        assert np.abs(new - old).mean() <= (0 if "lab" in name.parts else 3), name
