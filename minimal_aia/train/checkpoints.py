"""Checkpoints that are whole or absent, and say so themselves.

A checkpoint is written into `<output_dir>/.saving/checkpoint-N`, sealed with a manifest (size and SHA-256 of
every file) and only then renamed to `<output_dir>/checkpoint-N`. A process killed at any moment leaves either
the old state or the new one. What a file system, a copy or a full disk breaks later, `last_good` finds by the
manifest, and goes back to the checkpoint before.

Every byte is read back once for its hash: about 0.5 to 2 GB/s a thread, in four threads; a 7 B model with
AdamW (84 GB in fp32) takes well under two minutes, against the writing of the same bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
STAGING = ".saving"  # inside output_dir: on the same file system, so that renaming is one indivisible step
_NAME = re.compile(r"checkpoint-(\d+)")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What the writers of safetensors and torch say when a write fails; they do not pass the error's number on.
_DISK_FULL_TEXTS = re.compile(
    "No space left|File too large|quota exceeded|failed writing file|unexpected pos", re.IGNORECASE
)


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps behind a `checkpoint-N` folder."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint}: not a checkpoint folder (expected the name checkpoint-N)")
    return int(match[1])


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The `checkpoint-N` folders of a run, oldest step first; good or broken."""
    folder = Path(output_dir)
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def seal(folder: Path, **facts: Any) -> dict[str, Any]:
    """Write `folder`'s manifest: every file's size and SHA-256, and `facts` (plain JSON values).

    Call it when all files are there. Every file is forced to the disk first, so that a power cut after the
    rename finds no empty files under a good name.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    with ThreadPoolExecutor(4) as pool:  # hashing leaves Python's lock free
        entries = list(pool.map(lambda path: _entry(path, sync=True), files))
    listed = {str(path.relative_to(folder)): entry for path, entry in zip(files, entries, strict=True)}
    manifest = {**facts, "files": listed}
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1))
    for inner in {path.parent for path in files} | {folder}:
        _sync_folder(inner)
    return manifest


def publish(staged: Path, final: Path) -> None:
    """Give a sealed folder its name, in one step; what bore the name (a broken checkpoint) goes."""
    if not (staged / MANIFEST).is_file():
        raise ValueError(f"{staged}: not sealed; write its manifest before it gets its name")
    if final.exists():
        _discard(final)
    staged.rename(final)
    _sync_folder(final.parent)


def problems(folder: str | Path, hashes: bool = True) -> list[str]:
    """What is wrong with a checkpoint by its manifest; empty when it is good. Other files are no problem."""
    folder = Path(folder)
    try:
        files = read_manifest(folder)["files"]
    except (OSError, ValueError) as error:
        return [str(error)]

    def problem(item: tuple[str, dict[str, Any]]) -> str | None:
        name, entry = item
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        if hashes and _entry(path)["sha256"] != entry["sha256"]:
            return f"{name} has other bytes than were written (SHA-256 differs)"
        return None

    with ThreadPoolExecutor(4) as pool:
        return [found for found in pool.map(problem, files.items()) if found]


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """A checkpoint's manifest. ValueError: missing or unreadable, and what that means."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{MANIFEST} is missing (half-written, half-copied, or not written by this trainer)")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        for entry in manifest["files"].values():
            if not (isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)):
                raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{MANIFEST} cannot be read (truncated or changed)") from None
    return manifest


def last_good(output_dir: str | Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint of a run that is as it was written; None if the run has none at all.

    `say` hears one line for each broken one that is passed over: which, why, what is used instead. When there
    are checkpoints and all are broken this is an OSError: a run never starts over without being told to.
    """
    found = checkpoints(output_dir)
    broken: list[str] = []
    for checkpoint in reversed(found):
        wrong = problems(checkpoint)
        if not wrong:
            for line in broken:
                say(f"{line}; using {checkpoint.name} instead")
            return checkpoint
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        broken.append(f"{checkpoint} is broken: {wrong[0]}{more}")
    if broken:
        raise OSError(
            f"no checkpoint in {output_dir} is whole: {'; '.join(broken)}. "
            "Restore one from a copy, or delete these folders to start over"
        )
    return None


def retain(output_dir: str | Path, limit: int | None, sealed: Path | None = None) -> list[Path]:
    """Keep the newest `limit` good checkpoints; remove what is older, broken or not. Returns what went.

    The newest good one always stays. `sealed`: a checkpoint written a moment ago, which is not read again.
    Nothing is removed when `limit` is None or 0, or when no good one is found. A run needs disk for
    `limit` + 1 checkpoints: the old one goes after the new one has its name.
    """
    if not limit or limit < 0:
        return []
    found = checkpoints(output_dir)
    kept: list[Path] = []
    for checkpoint in reversed(found):
        # Only the newest must be certain: it is the one a resume needs.
        surely = not kept and checkpoint != sealed
        if len(kept) < limit and not problems(checkpoint, hashes=surely):
            kept.append(checkpoint)
    if not kept:
        return []
    gone = [path for path in found if path not in kept and step_of(path) < step_of(kept[0])]
    for checkpoint in gone:
        _discard(checkpoint)
    return gone


def clear_staging(output_dir: str | Path) -> None:
    """Remove what a killed run left half-written or half-deleted."""
    shutil.rmtree(Path(output_dir) / STAGING, ignore_errors=True)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, comes from a full disk, a quota or a limit on file sizes."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return True
        if _DISK_FULL_TEXTS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a kill or a power cut leaves the old one or the new one."""
    aside = path.with_name(f".{path.name}")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _entry(path: Path, sync: bool = False) -> dict[str, Any]:
    file: Any
    with path.open("r+b" if sync else "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _discard(checkpoint: Path) -> None:
    """Take the name away first: a kill while files are deleted leaves no half checkpoint."""
    trash = checkpoint.parent / STAGING / f"discarded-{checkpoint.name}"
    shutil.rmtree(trash, ignore_errors=True)
    trash.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
