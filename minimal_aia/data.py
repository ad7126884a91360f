"""Samples: read and validate the JSON-lines files that say which images and texts a model sees.

One JSON object a line, in the layout of LLaVA and of the AIA paper's released code:

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minimal_aia.pictures import Check, Picture, PictureBytes, PictureError, check_picture, find_picture

IMAGE = "<image>"
# of gzip, zip, zstd, bz2 and xz
COMPRESSED = (
    b"\x1f\x8b",
    b"PK\x03\x04",
    b"\x28\xb5\x2f\xfd",
    b"BZh",
    b"\xfd7zXZ",
)
GENERATION, UNDERSTANDING = "generation", "understanding"


@dataclass(frozen=True)
class Sample:
    """One conversation with its images.

    Attributes:
        id: ``file name:line``, e.g. ``"generation.jsonl:12"``, for error messages and result tables.
        task: ``"generation"`` or ``"understanding"``.
        turns: pairs (human text, gpt text) without the ``<image>`` marker, outer white space stripped.
            Generation has one pair ``(prompt, "")``; understanding one or more ``(question, answer)``.
        images: absolute paths; from other sources than sample files also bytes or codes (see `pictures`).
            Understanding: one or more, they come before the first question. Generation: the target image,
            or nothing when the sample is only a prompt.
        type: free label such as ``"caption"`` or ``"short"`` (empty when the file gives none).
        source: free label such as ``"lab"`` or ``"photo"`` (empty when the file gives none).
        dropped: the model does not see the prompt (training for classifier-free guidance): no key token.
    """

    id: str
    task: str
    turns: tuple[tuple[str, str], ...]
    images: tuple[Picture, ...]
    type: str = ""
    source: str = ""
    dropped: bool = False


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
        on_error: ``"raise"`` raises one `SampleError` with every bad line; ``"skip"`` leaves bad
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
    checked: dict[str, Path | str] = {}  # image path as written -> resolved, or what is wrong with it
    for line, entry in _entries(path):
        where = f"{path.name}:{line}"
        try:
            check: Check = "decode" if decode_images else "header"
            sample = _sample(where, _parse(entry), folder, checked, check)
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
            f" (fix them, or skip them: on_error='skip', in the shell --skip-bad):\n  {lines}",
            tuple(problems),
        )
    if not samples and not problems:
        raise SampleError(f"{path}: no samples in the file (expected one JSON object a line)")
    return Samples(samples, tuple(problems))


def parse_sample(entry: Any, where: str, folder: Path, check: Check = "header") -> Sample:
    """One sample from a line of a sample file (bytes), or from its parsed object.

    In an object, images may also be `PictureBytes`. folder: resolved; image paths are relative to it.
    check: "none" does not even ask whether an image file exists. SampleError, naming `where`, if it is bad.
    """
    try:
        return _sample(where, _parse(entry), folder, {}, check)
    except _Bad as bad:
        raise SampleError(f"{where}: {bad}", (f"{where}: {bad}",)) from None


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
    if reason := _no_lines(raw):
        raise SampleError(f"{path}: {reason}", (f"{path.name}: {reason}",))
    # Only "\n" ends a line: splitlines() would also cut at U+2028 and others, which may stand inside a text.
    return [(i, line) for i, line in enumerate(raw.split(b"\n"), 1) if line.strip()]


def _no_lines(raw: bytes) -> str:
    """Why the file as a whole is none of JSON lines, which saves an error for each of its lines; or ""."""
    if raw.startswith(COMPRESSED):
        return "is compressed; unpack it first"
    if b"\0" in raw[:16]:
        return "is no text in UTF-8 (a picture, UTF-16?); a sample file has one JSON object a line"
    if raw.lstrip().startswith(b"["):
        try:
            if isinstance(_parse(raw), list):
                return "holds one JSON list, not an object a line; name it .json"
        except _Bad:  # bad lines, one of which happens to be the first
            pass
    return ""


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


def _sample(where: str, entry: Any, folder: Path, checked: dict[str, Path | str], check: Check) -> Sample:
    if not isinstance(entry, dict):
        raise _Bad("not a JSON object")
    turns = _turns(entry.get("conversations"))
    names = entry.get("image", [])
    names = [names] if isinstance(names, str | PictureBytes) else names
    if not isinstance(names, list) or not all(isinstance(n, str | PictureBytes) for n in names):
        raise _Bad("'image' is neither a path nor a list of paths")
    labels = [entry.get("type", ""), entry.get("source", "")]
    if not all(isinstance(x, str) for x in labels):
        raise _Bad("'type' and 'source' must be strings")

    if any(IMAGE in gpt for _, gpt in turns):
        task, turns = GENERATION, _generation_turns(turns, len(names))
    else:
        task, turns = UNDERSTANDING, _understanding_turns(turns, len(names))
    found = [_picture(name, folder, checked, check) for name in names]
    if bad_images := [text for text in found if isinstance(text, str)]:
        raise _Bad("; ".join(bad_images))
    images = tuple(picture for picture in found if not isinstance(picture, str))
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


def _picture(
    name: str | PictureBytes, folder: Path, checked: dict[str, Path | str], check: Check
) -> Path | PictureBytes | str:
    """The picture, or what is wrong with it. A file is looked at once however often it is named."""
    if isinstance(name, str) and name in checked:
        return checked[name]
    found: Path | PictureBytes | str
    try:
        found = find_picture(name, folder, check != "none") if isinstance(name, str) else name
        check_picture(found, check, name if isinstance(name, str) else "")
    except PictureError as error:
        found = str(error)
    if isinstance(name, str) and not isinstance(found, PictureBytes):
        checked[name] = found
    return found
