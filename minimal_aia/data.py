"""Samples: read and validate the JSON-lines files that say which images and texts a model sees.

One JSON object a line, in the layout of LLaVA and of the AIA paper's released code::

    {"image": "images/dog.png", "type": "open", "source": "photo",
     "conversations": [{"from": "human", "value": "<image>\\nWhat animal is this?"},
                       {"from": "gpt", "value": "A dog."}]}

Where ``<image>`` stands decides the task: as the whole gpt value the sample is "generation" (text to image),
in the first human value it is "understanding" (image to text). Image paths are relative to the file and may
not leave its folder. Bad lines are all reported together, because fixing a data set one error at a time is
how afternoons disappear.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

from PIL import Image

IMAGE = "<image>"
GENERATION, UNDERSTANDING = "generation", "understanding"
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # a short list: some of Pillow's other readers start programs
MAX_PIXELS = 50_000_000  # a decoded image above this is taken for a decompression bomb


@dataclass(frozen=True)
class Sample:
    """One conversation with its images.

    Attributes:
        id: ``file name:line``, e.g. ``"generation.jsonl:12"``, for error messages and result tables.
        task: ``"generation"`` or ``"understanding"``.
        turns: pairs (human text, gpt text) without the ``<image>`` marker, outer white space stripped.
            Generation has one pair ``(prompt, "")``; understanding one or more ``(question, answer)``.
        images: absolute paths. Understanding: one or more, they come before the first question.
            Generation: the target image, or nothing when the sample is only a prompt.
        type: free label such as ``"caption"`` or ``"short"`` (empty when the file gives none).
        source: free label such as ``"lab"`` or ``"photo"`` (empty when the file gives none).
    """

    id: str
    task: str
    turns: tuple[tuple[str, str], ...]
    images: tuple[Path, ...]
    type: str = ""
    source: str = ""


class SampleError(ValueError):
    """A sample file has bad lines; ``problems`` lists them as ``"file:line: reason"``."""

    def __init__(self, message: str, problems: tuple[str, ...] = ()):
        super().__init__(message)
        self.problems = problems


class Samples(list[Sample]):
    """A list of samples that remembers what was left out.

    Attributes:
        problems: one ``"file:line: reason"`` a skipped line.
        n_skipped: how many lines were skipped.
    """

    def __init__(self, samples: list[Sample], problems: tuple[str, ...] = ()):
        super().__init__(samples)
        self.problems = problems

    @property
    def n_skipped(self) -> int:
        return len(self.problems)


def read_samples(
    path: str | Path, on_error: Literal["raise", "skip"] = "raise", decode_images: bool = True
) -> Samples:
    """Read a ``.jsonl`` file (or a ``.json`` list of the same objects) into samples.

    Args:
        path: the file; UTF-8, Unix or Windows newlines, blank lines ignored.
        on_error: ``"raise"`` raises one :class:`SampleError` with every bad line; ``"skip"`` leaves bad
            lines out and counts them in ``n_skipped``.
        decode_images: decode every image once, which finds truncated ones. With ``False`` only the header
            is read: quick, for data sets too large to decode twice.

    Returns:
        The samples in file order.

    Raises:
        FileNotFoundError: there is no such file.
        SampleError: bad lines, or a file without a single sample.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is {on_error!r}; choose 'raise' or 'skip'")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such sample file (one JSON object a line, see data_samples/)")
    folder = path.resolve().parent
    samples: list[Sample] = []
    problems: list[str] = []
    seen: dict[tuple, str] = {}
    checked: dict[
        str, Path | str
    ] = {}  # image path as written -> the resolved path, or what is wrong with it
    for line, entry in _entries(path):
        where = f"{path.name}:{line}"
        try:
            sample = _sample(where, _parse(entry), folder, checked, decode_images)
            key = (sample.task, sample.turns, sample.images)
            if key in seen:
                raise _Bad(f"duplicate of {seen[key]}")
        except _Bad as bad:
            problems.append(f"{where}: {bad}")
        else:
            seen[key] = where
            samples.append(sample)
    if problems and on_error == "raise":
        lines = "\n  ".join(problems)
        raise SampleError(
            f"{path}: {len(problems)} bad of {len(problems) + len(samples)} samples"
            f" (fix them, or read with on_error='skip'):\n  {lines}",
            tuple(problems),
        )
    if not samples and not problems:
        raise SampleError(f"{path}: no samples in the file (expected one JSON object a line)")
    return Samples(samples, tuple(problems))


class _Bad(Exception):
    """What is wrong with one line; never leaves this module."""


def _entries(path: Path) -> list[tuple[int, Any]]:
    """(line or item number, bytes to parse or an already parsed object)."""
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # a BOM, as some editors write
    if path.suffix == ".json":
        try:
            items = _parse(raw)
            if not isinstance(items, list):
                raise _Bad("a .json file holds a list of samples; name it .jsonl if it has one object a line")
        except _Bad as bad:
            raise SampleError(f"{path}: {bad}", (f"{path.name}: {bad}",)) from None
        return list(enumerate(items, 1))
    # Only "\n" ends a line: splitlines() would also cut at U+2028 and others, which may stand inside a text.
    return [(i, line) for i, line in enumerate(raw.split(b"\n"), 1) if line.strip()]


def _parse(entry: Any) -> Any:
    if not isinstance(entry, bytes):
        return entry
    try:
        return json.loads(entry.decode("utf-8"), object_pairs_hook=_no_repeated_keys)
    except UnicodeDecodeError as error:
        raise _Bad(f"not UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise _Bad(f"malformed JSON, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # digits without end, brackets without end
        raise _Bad(f"malformed JSON: {error}") from None


def _no_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise _Bad("a key stands twice in one object")
    return dict(pairs)


def _sample(where: str, entry: Any, folder: Path, checked: dict[str, Path | str], decode: bool) -> Sample:
    if not isinstance(entry, dict):
        raise _Bad("not a JSON object")
    turns = _turns(entry.get("conversations"))
    names = entry.get("image", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise _Bad("'image' is neither a path nor a list of paths")
    labels = [entry.get("type", ""), entry.get("source", "")]
    if not all(isinstance(x, str) for x in labels):
        raise _Bad("'type' and 'source' must be strings")

    if any(IMAGE in gpt for _, gpt in turns):
        task, turns = GENERATION, _generation_turns(turns, len(names))
    else:
        task, turns = UNDERSTANDING, _understanding_turns(turns, len(names))
    for name in names:
        if name not in checked:
            try:
                checked[name] = _check_image(name, folder, decode)
            except _Bad as bad:
                checked[name] = str(bad)
    bad_images = [found for name in names if isinstance(found := checked[name], str)]
    if bad_images:
        raise _Bad("; ".join(bad_images))
    images = tuple(Path(checked[name]) for name in names)
    return Sample(where, task, tuple(turns), images, labels[0], labels[1])


def _turns(conversation: Any) -> list[tuple[str, str]]:
    """Human and gpt must take turns, human first, gpt last."""
    if not isinstance(conversation, list) or not conversation:
        raise _Bad("'conversations' is missing, empty or not a list")
    texts = []
    for i, turn in enumerate(conversation):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise _Bad(f"turn {i + 1} is not an object with 'from' and a text 'value'")
        role = ("human", "gpt")[i % 2]
        if turn.get("from") != role:
            raise _Bad(f"turn {i + 1} is from {turn.get('from')!r}, expected {role!r}")
        text = turn["value"].strip()
        if not text:
            raise _Bad(f"turn {i + 1} ({role}) is empty")
        if any("\ud800" <= c <= "\udfff" for c in text):  # "\ud800" alone: legal JSON, but no text
            raise _Bad(f"turn {i + 1} ({role}) holds half a surrogate pair")
        texts.append(text)
    if len(texts) % 2:
        raise _Bad("the last turn is from 'human': the gpt answer is missing")
    return list(zip(texts[::2], texts[1::2], strict=True))


def _generation_turns(turns: list[tuple[str, str]], n_images: int) -> list[tuple[str, str]]:
    if len(turns) != 1 or turns[0][1] != IMAGE:
        raise _Bad(f"generation is one prompt whose gpt value is exactly {IMAGE!r}")
    if IMAGE in turns[0][0]:
        raise _Bad(f"{IMAGE!r} stands in both the human and the gpt value (image editing is not supported)")
    if n_images > 1:
        raise _Bad(f"generation has one target image (or none), found {n_images}")
    return [(turns[0][0], "")]


def _understanding_turns(turns: list[tuple[str, str]], n_images: int) -> list[tuple[str, str]]:
    """Strip the markers, which all stand before or all after the first question."""
    if any(IMAGE in human for human, _ in turns[1:]):
        raise _Bad(f"{IMAGE!r} in a later question; all images belong to the first")
    question = turns[0][0]
    n_markers = question.count(IMAGE)
    if n_markers == 0:
        raise _Bad(f"no {IMAGE!r} in the first human value (understanding) nor as the gpt value (generation)")
    if n_markers != n_images:
        raise _Bad(f"{n_markers} {IMAGE!r} in the text, but {n_images} paths in 'image'")
    at_start = question.startswith(IMAGE)
    while question.startswith(IMAGE) or (not at_start and question.endswith(IMAGE)):
        question = (question.removeprefix(IMAGE) if at_start else question.removesuffix(IMAGE)).strip()
    if IMAGE in question:
        raise _Bad(f"{IMAGE!r} in the middle of the question; put all of them first")
    if not question:
        raise _Bad("turn 1 (human) is empty but for the image")
    return [(question, turns[0][1]), *turns[1:]]


def _check_image(name: str, folder: Path, decode: bool) -> Path:
    """The image's absolute path, if it lies inside ``folder`` and Pillow can read it."""
    windows = PureWindowsPath(name)  # also understands "C:\\x" and "..\\x", which a Linux reader would not
    if not name.strip() or "\0" in name:
        raise _Bad("an image path is empty")
    if windows.root or windows.drive or ".." in windows.parts:
        raise _Bad(f"image {name!r} leaves the folder of the file (use a relative path without '..')")
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder):
            raise _Bad(f"image {name!r} leaves the folder of the file through a link")
        if not path.is_file():
            raise _Bad(f"image {name!r} does not exist")
    except (OSError, RuntimeError, UnicodeEncodeError) as error:  # link loops, endless names, half surrogates
        raise _Bad(f"image {name!r} cannot be opened: {error}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we set the limit ourselves
            with Image.open(path, formats=FORMATS) as image:
                n_pixels = image.width * image.height
                if n_pixels > MAX_PIXELS:
                    raise _Bad(f"image {name!r} has {n_pixels} pixels, more than {MAX_PIXELS}")
                if decode:
                    image.load()
    except Image.DecompressionBombError:
        raise _Bad(f"image {name!r} has far more than {MAX_PIXELS} pixels") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error ... on damaged files
        if isinstance(error, _Bad):
            raise
        raise _Bad(f"image {name!r} is unreadable or truncated ({error})") from None
    return path
