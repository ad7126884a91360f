"""Part files: what a long measuring run has finished, so that a killed run goes on where it stopped.

Beside `out` lies one JSON-lines file a process, `<out>.part-<rank>.jsonl`: a header line with the run's
fingerprint, then one line a finished batch. A line cut off by the kill is dropped and its batch measured
again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def fingerprint(model: torch.nn.Module, facts: Mapping[str, Any], images: Sequence[Path] = ()) -> str:
    """Hash of a model's weights, of `facts` (plain JSON values) and of the bytes of `images`.

    Of each tensor a few dozen numbers spread over it are hashed: enough to tell a fine-tuned model from its
    base without reading 14 GB twice. Tensors without storage (offloaded to "meta") count by name and shape
    only.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in model.state_dict(keep_vars=False).items():
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.device.type != "meta" and tensor.numel():
            flat = tensor.detach().flatten()
            picked = flat[:: max(1, len(flat) // 64)].cpu()
            digest.update(picked.contiguous().view(torch.uint8).numpy().tobytes())
    for path in sorted(set(images)):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


class PartFile:
    """The part files of one output file. `out=None` keeps nothing."""

    def __init__(self, out: Path | None, rank: int = 0) -> None:
        self.out = out
        self.path = None if out is None else out.with_name(f"{out.name}.part-{rank}.jsonl")

    def all_paths(self) -> list[Path]:
        return [] if self.out is None else sorted(self.out.parent.glob(f"{self.out.name}.part-*.jsonl"))

    def read(self, key: str) -> dict[int, dict[str, Any]]:
        """Finished batches by their number, from every process's file. A file of another run is an error."""
        done = {}
        for path in self.all_paths():
            for i, record in enumerate(_complete_lines(path)):
                if i == 0 and record.get("fingerprint") != key:
                    raise ValueError(
                        f"{path}: left by an interrupted run with another model, other samples or another "
                        "batch size; repeat that run to finish it, or delete this file to start over"
                    )
                if i > 0:
                    done[record["batch"]] = record
        return done

    def start(self, key: str) -> None:
        """Make this process's file ready for `append`: header first, no half line at the end."""
        if self.path is None:
            return
        if self.path.exists():
            whole = self.path.read_bytes()
            self.path.write_bytes(whole[: whole.rfind(b"\n") + 1])
        if not self.path.exists() or self.path.stat().st_size == 0:
            self.append({"fingerprint": key})

    def append(self, record: Mapping[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def remove(self) -> None:
        for path in self.all_paths():
            path.unlink(missing_ok=True)


def _complete_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            yield json.loads(line)
        except ValueError:
            raise ValueError(
                f"{path}: not a part file (a line is no JSON); delete it to start over"
            ) from None
