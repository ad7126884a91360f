"""Look at a recipe's data before a run does: what is bad, how long, how much is padding; a batch in words.

Every sample goes through the model's own processor, as in training, but through no weights.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from minimal_aia.data import Sample
from minimal_aia.models.base import Adapter, Batch
from minimal_aia.pictures import PictureBytes
from minimal_aia.train.data import MixedBatches
from minimal_aia.train.order import Order

# What a reason is about, for the table of counts; the first that fits.
KINDS = {
    "too long": "more than max_length",
    "missing image": "does not exist",
    "damaged image": "unreadable or truncated",
    "image outside the folder": "leaves the folder",
    "too many pixels": "pixels, more than|far more than",
    "malformed line": "malformed JSON|not UTF-8|not a JSON object|stands twice",
    "special token in a text": "special token",
    "other task": "a sample for",
}
BINS, BAR = 10, 40  # of the histogram of lengths
SIMULATED = 400  # micro-batches, at most, to say how much padding there will be
SHOWN = 300  # characters of a span


@dataclass
class Report:
    """What `check_data` found.

    rows: by task a table, one row a sample: id, reason (empty: good), length in tokens, duplicate.
    padding: share of positions that are padding, by task (index) and length_window (columns).
    exact: lengths are tokens of the model; else they are estimates from bytes of text.
    """

    rows: dict[str, pd.DataFrame]
    padding: pd.DataFrame
    exact: bool = True
    complete: bool = True

    @property
    def n_bad(self) -> int:
        return len(self.bad())

    def bad(self) -> pd.DataFrame:
        """id, task, kind, reason of every bad sample, in the order of the data."""
        tables = [table[table["reason"] != ""].assign(task=task) for task, table in self.rows.items()]
        every = pd.concat(tables, ignore_index=True)
        return every.assign(kind=every["reason"].map(kind))[["id", "task", "kind", "reason"]]

    def text(self, show: int = 20) -> str:
        """The report for a terminal, with at most `show` bad samples."""
        lines = []
        bad = self.bad()
        if len(bad):
            lines += ["bad samples", *(f"  {row.id}: {row.reason}" for row in bad[:show].itertuples())]
            lines += [f"  ... and {len(bad) - show} more"] if len(bad) > show else []
            counts = bad.groupby(["kind", "task"]).size().unstack(fill_value=0)
            lines += ["", "bad samples by kind", _show(counts), ""]
        lines += [_show(pd.DataFrame({task: _summary(table) for task, table in self.rows.items()}).T), ""]
        what = "tokens" if self.exact else "about tokens, estimated"
        for task, table in self.rows.items():
            lines += [f"lengths, {task} ({what})", *histogram(table.loc[table["reason"] == "", "length"]), ""]
        lines += ["padding, by length_window", _show(self.padding.map("{:.1%}".format))]
        if not self.complete:
            lines += ["", "only the first samples were looked at (--limit)"]
        return "\n".join(lines)


def check_data(
    data: MixedBatches, quick: bool = False, limit: int | None = None, workers: int = 0, progress: bool = True
) -> Report:
    """Look at every sample once.

    quick: read headers of pictures instead of decoding them, and estimate lengths from texts.
    limit: look at the first so many samples of each task only. workers: processes that share the work.
    """
    rows, complete = {}, True
    for task, source in data.sources.items():
        n = source.count()
        complete &= limit is None or n <= limit
        items = _Items(data, task, quick, n if limit is None else min(n, limit))
        fork = "fork" if workers else None
        loader = DataLoader(items, batch_size=None, num_workers=workers, multiprocessing_context=fork)
        table = pd.DataFrame(
            list(tqdm(loader, desc=f"checking {task}", total=len(items), disable=not progress)),
            columns=["id", "reason", "length", "content"],
        )
        table["duplicate"] = table["content"].duplicated() & (table["content"] != "")
        rows[task] = table.drop(columns="content")
    return Report(rows, expected_padding(data, rows), not quick, complete)


class _Items(Dataset):
    """Item i: (id, what is wrong, length, hash of the content) of sample i."""

    def __init__(self, data: MixedBatches, task: str, quick: bool, n: int) -> None:
        self.data, self.task, self.quick, self.n = data, task, quick, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[str, str, int, str]:
        source = self.data.sources[self.task]
        name = f"{source.name} sample {i}"
        length, content = 0, ""
        try:
            name = source.entry(i)[1]
            sample = self.data.sample(self.task, i)
            content = _content(sample)
            if self.quick:
                length = self.data.rough_length(self.task, i)
            else:
                length = int(self.data.adapter.collate([sample], self.task).attention_mask.sum())
            limit = self.data.config.max_length
            reason = f"{length} tokens, more than max_length {limit}" if limit and length > limit else ""
        except Exception as error:  # all that a run would pass over
            reason = str(error).strip().removeprefix(f"{name}: ") or type(error).__name__
        return name, reason, length, content


def _content(sample: Sample) -> str:
    pictures = [p.data if isinstance(p, PictureBytes) else p for p in sample.images]
    return hashlib.sha256(repr((sample.turns, pictures)).encode()).hexdigest()


def kind(reason: str) -> str:
    return next((name for name, pattern in KINDS.items() if re.search(pattern, reason)), "other")


def _summary(table: pd.DataFrame) -> dict[str, Any]:
    lengths = table.loc[table["reason"] == "", "length"].quantile([0, 0.5, 0.95, 1]).fillna(0).round()
    return {
        "samples": len(table),
        "bad": int((table["reason"] != "").sum()),
        "duplicates": int(table["duplicate"].sum()),
        **dict(zip(("shortest", "median", "95 %", "longest"), lengths.astype(int))),
    }


def histogram(lengths: Sequence[int] | pd.Series) -> list[str]:
    """Lines with a bar for each of ten ranges of lengths."""
    if not len(lengths):
        return ["  (no good sample)"]
    low, high = int(min(lengths)), int(max(lengths))
    edges = np.unique(np.linspace(low, high + 1, BINS + 1).round().astype(int))
    counts, _ = np.histogram(lengths, edges)
    width = len(str(high))
    return [
        f"  {a:>{width}} to {b - 1:>{width}}  {n:>9}  {'█' * round(BAR * n / counts.max())}".rstrip()
        for a, b, n in zip(edges, edges[1:], counts)
    ]


def expected_padding(data: MixedBatches, rows: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The share of padding in the run's first micro-batches, for length windows of 0, 16 and the recipe's."""
    orders = {w: replace(data.order, window=max(1, w)) for w in sorted({0, 16, data.config.length_window})}
    return pd.DataFrame(
        {
            window: {task: _padding(order, data, task, table) for task, table in rows.items()}
            for window, order in orders.items()
        }
    )


def _padding(order: Order, data: MixedBatches, task: str, table: pd.DataFrame) -> float:
    source, good = data.sources[task], table["reason"] == ""
    if not good.any():
        return float("nan")
    lengths = table["length"].where(good, table.loc[good, "length"].median()).to_numpy()

    def length(place: int) -> int:
        return int(lengths[order.index(task, place, source.block, source.endless) % len(lengths)])

    arranged = lru_cache(maxsize=1)(lambda window: order.arrange(task, window, length))
    tokens = positions = 0
    for number in range(min(len(data), SIMULATED)):
        row = [length(place) for place in order.places(task, number, arranged)]
        tokens += sum(row)
        positions += len(row) * max(row, default=0)
    return 1 - tokens / max(1, positions)


def _show(table: pd.DataFrame) -> str:
    return "\n".join(f"  {line}".rstrip() for line in table.to_string().splitlines())


# --- the first batch in words -------------------------------------------------------------------------------


def preview(adapter: Adapter, batches: Mapping[str, Batch], definition: str = "paper") -> str:
    """Spans and labels of the first sample of each task, decoded. The adapter needs no weights."""
    lines = []
    for task, batch in batches.items():
        query, key = adapter.spans(batch, definition)
        labels, real = adapter.label_mask(batch), batch.attention_mask.bool()
        lines += [
            f"{task}: {len(batch)} samples of {real.sum(1).min()} to {real.sum(1).max()} tokens, "
            f"{1 - real.float().mean():.0%} padding, {int(labels.sum())} labels",
            f"  {batch.ids[0]}",
        ]
        ids = batch.inputs["ids" if "ids" in batch.inputs else "input_ids"][0]
        for name, mask in {"queries": query, "keys": key, "labels": labels, "all": real}.items():
            lines.append(f"    {name:8}{int(mask[0].sum()):6}  {_words(adapter, ids, mask[0])}".rstrip())
    return "\n".join(lines)


def _words(adapter: Any, ids: Tensor, mask: Tensor) -> str:
    """The marked ones of a row's tokens [S] as text: runs divided by |, image tokens counted."""
    from minimal_aia.lab.sequences import FIRST_CODE, WORDS

    lab = adapter.family == "lab"

    def is_image(token: int) -> bool:
        return token >= FIRST_CODE if lab else token == getattr(adapter, "image_token_id", None)

    def decoded(tokens: list[int]) -> str:
        return repr(" ".join(WORDS[t] for t in tokens) if lab else str(adapter.tokenizer.decode(tokens)))

    runs = []
    for marked, run in groupby(zip(ids.tolist(), mask.tolist()), key=lambda pair: pair[1]):
        if marked:
            parts = [(image, list(some)) for image, some in groupby((t for t, _ in run), key=is_image)]
            runs.append(
                " ".join(f"[{len(some)} image tokens]" if image else decoded(some) for image, some in parts)
            )
    text = " | ".join(runs) or "(none)"
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"
