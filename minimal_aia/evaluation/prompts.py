"""Prompt files of the two generation benchmarks, and where their scorers look for each picture.

========  ==============================================  ==============================================
layout    prompts                                         pictures
========  ==============================================  ==============================================
geneval   evaluation_metadata.jsonl: an object a line,    <out>/00000/metadata.jsonl (that line) and
          `prompt` and `tag` (djghosh13/geneval)          <out>/00000/samples/0000.png, 0001.png, ...
dpg       a folder of text files, a prompt each           <out>/<name of the text file>.png, a grid of
          (TencentQQGYLab/ELLA, dpg_bench/prompts)        2 x 2 pictures (or one picture alone)
========  ==============================================  ==============================================

GenEval's scorer reads every folder whose name is a number and every picture in `samples` whose name is one;
DPG-Bench's takes every file in the folder for a picture and cuts a grid by the resolution that it is told.
Nothing else may lie there, so settings are kept beside the folder. ULMEvalKit scores only what it drew itself
(it keeps pictures in a pickle): give it the model in its original layout instead, `minimal-aia convert`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL import Image

Layout = Literal["geneval", "dpg"]


@dataclass(frozen=True)
class Prompt:
    """id: how the scorer knows it ("00012", or the text file's name). line: its line of a GenEval file."""

    id: str
    text: str
    line: str = ""


def read_prompts(path: str | Path) -> tuple[Layout, list[Prompt]]:
    """The layout and the prompts, in order, of a GenEval .jsonl file or a DPG-Bench folder of .txt files.

    ValueError names the first bad line or file; FileNotFoundError if there is no such path.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".txt":
        return "dpg", _texts(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; give GenEval's evaluation_metadata.jsonl, or DPG-Bench's folder of .txt "
            "files"
        )
    lines = read_text(path).rstrip("\n").split("\n")
    return "geneval", [_geneval(line, i, f"{path}:{i + 1}") for i, line in enumerate(lines)]


def _geneval(line: str, number: int, where: str) -> Prompt:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where}: not JSON ({error}); folders are numbered by line, so no line may be blank"
        ) from None
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: not a JSON object")
    for key in ("prompt", "tag"):  # the scorer would stop without a tag, after everything has been drawn
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            raise ValueError(f"{where}: no text {key!r}")
    return Prompt(f"{number:05d}", entry["prompt"], line)


def _texts(path: Path) -> list[Prompt]:
    files = (
        [path] if path.suffix == ".txt" else sorted(path.glob("*.txt"), key=lambda p: (len(p.name), p.name))
    )
    if not files:
        raise ValueError(f"{path}: no .txt file in this folder (DPG-Bench has one a prompt)")
    prompts = []
    for file in files:
        if "." in file.stem:
            raise ValueError(f"{file}: DPG-Bench's scorer cuts names at the first dot; rename it")
        text = read_text(file).strip()
        if not text:
            raise ValueError(f"{file}: the file is empty")
        prompts.append(Prompt(file.stem, text))
    return prompts


def read_text(path: Path) -> str:
    """A text file, whatever ends its lines. ValueError naming the line that is no UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text") from None


def check_images(layout: Layout, images: int) -> None:
    """ValueError if a layout has no room for that many pictures a prompt."""
    if layout == "dpg" and images not in (1, 4):
        raise ValueError(f"DPG-Bench takes 1 or 4 pictures a prompt (a 2 x 2 grid), not {images}")


def missing(layout: Layout, out: Path, prompt: Prompt, images: int) -> list[int]:
    """The numbers of a prompt's pictures that are still to be drawn."""
    if layout == "dpg":
        return [] if (out / f"{prompt.id}.png").is_file() else list(range(images))
    return [i for i in range(images) if not sample_path(out, prompt, i).is_file()]


def sample_path(out: Path, prompt: Prompt, number: int) -> Path:
    return out / prompt.id / "samples" / f"{number:04d}.png"


def prepare(layout: Layout, out: Path, prompt: Prompt) -> None:
    """The folders of a prompt, and GenEval's metadata."""
    if layout == "dpg":
        out.mkdir(parents=True, exist_ok=True)
        return
    (out / prompt.id / "samples").mkdir(parents=True, exist_ok=True)
    metadata = out / prompt.id / "metadata.jsonl"
    if not metadata.is_file():
        write_whole(metadata, lambda file: file.write_text(prompt.line + "\n", encoding="utf-8"), out)


def save(layout: Layout, out: Path, prompt: Prompt, pictures: dict[int, Image.Image]) -> None:
    """Write a prompt's pictures by number; DPG-Bench's all at once."""
    if layout == "dpg":
        whole = grid([pictures[i] for i in sorted(pictures)])
        write_whole(out / f"{prompt.id}.png", lambda file: whole.save(file, format="PNG"), out)
        return
    for number, picture in pictures.items():
        to = sample_path(out, prompt, number)
        write_whole(to, lambda file, p=picture: p.save(file, format="PNG"), out)


def grid(pictures: Sequence[Image.Image]) -> Image.Image:
    """One picture alone, or four as upper left, upper right, lower left, lower right."""
    from PIL import Image

    if len(pictures) == 1:
        return pictures[0]
    width, height = pictures[0].size
    whole = Image.new("RGB", (2 * width, 2 * height))
    for i, picture in enumerate(pictures):
        whole.paste(picture, (i % 2 * width, i // 2 * height))
    return whole


def write_whole(path: Path, write: Any, out: Path) -> None:
    """A file appears under its name only when it is complete. Half a file lies beside `out`, never in it."""
    half = out.parent / f".{out.name}-{path.parent.parent.name}-{path.parent.name}-{path.name}.half"
    try:
        write(half)
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)
