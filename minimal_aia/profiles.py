"""Run a model over samples and keep Eq. 1 of every layer, head and sample: an IntensityProfile.

One teacher-forced forward pass a batch gives what decoding would give one token at a time (a causal row does
not see what comes after it), so 100 samples of 576 image tokens need a handful of passes, not 57 600.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from minimal_aia.profile_table import COLUMNS, IntensityProfile, check_suffix
from minimal_aia.resume import PartFile, fingerprint

if TYPE_CHECKING:
    from minimal_aia.data import Sample
    from minimal_aia.models.base import Adapter, Batch

__all__ = ["IntensityProfile", "profile", "uniform_intensity"]


def uniform_intensity(
    query_mask: Tensor, key_mask: Tensor, attention_mask: Tensor, visible: Tensor | None = None
) -> Tensor:
    """What Eq. 1 gives if attention were flat over the keys each query may see.

    query_mask, key_mask: bool [B, S]; attention_mask: [B, S], 1 = real token; visible: bool [B, S, S], which
    keys a query position sees (default: itself and everything real before it). -> float64 [B], nan where a
    span is empty: mean over the query positions of (marked visible keys / visible keys).
    """
    real = attention_mask.bool()
    if visible is None:  # causal: counts of a row are running sums, no [S, S] matrix needed
        n_visible, n_marked = real.cumsum(1), (key_mask & real).cumsum(1)
    else:
        visible = visible & real[:, None, :]
        n_visible, n_marked = visible.sum(-1), (visible & key_mask[:, None, :]).sum(-1)
    share = n_marked.double() / n_visible.clamp(min=1)  # [B, S]
    mean = (share * query_mask).sum(1) / query_mask.sum(1)  # 0 / 0 = nan for an empty query span
    return mean.masked_fill(~key_mask.any(1), torch.nan)


def profile(
    adapter: Adapter,
    samples: Sequence[Sample],
    task: str,
    batch_size: int = 16,
    out: str | Path | None = None,
    progress: bool = True,
    seed: int = 0,
) -> IntensityProfile:
    """Measure the cross-modal intensity of `adapter`'s model on `samples`.

    Args:
        adapter: from `load_adapter`; its model is put in eval mode for the run.
        samples: from `read_samples`. Those of the other task, those the model cannot take (`adapter.why_not`)
            and those with an empty span are left out, counted in `.skipped`, never averaged as zero.
        task: "generation" (image queries over prompt keys) or "understanding" (answer queries over image
        keys).
        batch_size: samples a forward pass; batches hold samples of like length, the longest come first.
        out: a .csv or .parquet file to write. While it runs, finished batches lie in `<out>.part-*.jsonl`:
            the same call after a kill goes on from there and gives the identical table.
        progress: show a progress bar (on the first process only).
        seed: of models that draw noise (diffusion); each batch gets its own, so resuming changes nothing.

    Under an initialised `torch.distributed` group the batches are split over the processes; every process
    returns the whole profile, the first one writes. Raises ValueError for a task the model does not do, no
    usable sample, or a part file of another run.
    """
    out = None if out is None else check_suffix(out)
    if not hasattr(adapter, "tasks"):
        raise ValueError(f"adapter is a {type(adapter).__name__}: give what load_adapter returns")
    if isinstance(samples, (str, Path)):
        raise ValueError(f"samples is the name {str(samples)!r}: give what read_samples returns for it")
    if task not in adapter.tasks:
        raise ValueError(f"{adapter.name} does {' and '.join(adapter.tasks)}, not {task!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, must be at least 1")
    usable, skipped = _usable(adapter, samples, task)
    plan = _plan(adapter, usable, task, batch_size)
    rank, world = rank_and_world()

    parts, key = PartFile(out, rank), ""
    if out is not None:
        images = [path for sample in usable for path in sample.images if isinstance(path, Path)]
        key = fingerprint(adapter.model, _facts(adapter, plan, task, seed), images)
    done = parts.read(key)
    barrier()  # every process has read before any writes
    parts.start(key)
    mine = {}
    with (
        _eval_mode(adapter.model),
        _bar(progress and rank == 0, plan[rank::world], task, adapter.name) as bar,
    ):
        for number in range(rank, len(plan), world):
            record = done.get(number)
            if record is None:
                with _seeded(adapter.model, seed, number):
                    record = {"batch": number, **_measure(adapter, plan[number], task)}
                parts.append(record)
            mine[number] = record
            bar.update(len(plan[number]))
    records = _gather(mine)

    table, empty = _table(adapter.name, task, usable, records)
    result = IntensityProfile(table, skipped={**skipped, **empty})
    if out is not None:
        if rank == 0:
            result.save(out)
        barrier()  # the table is on disk before any process drops what it was made from
        if rank == 0:
            parts.remove()
        elif parts.path is not None:
            parts.path.unlink(missing_ok=True)  # another machine's disk may hold it
    return result


def _usable(adapter: Adapter, samples: Iterable[Sample], task: str) -> tuple[list[Sample], dict[str, str]]:
    usable: dict[str, Sample] = {}
    skipped: dict[str, str] = {}
    for sample in samples:
        if sample.id in usable or sample.id in skipped:
            raise ValueError(f"two samples are called {sample.id!r}; ids must differ")
        if sample.task != task:
            skipped[sample.id] = f"a {sample.task} sample"
        elif reason := adapter.why_not(sample, task):
            skipped[sample.id] = reason
        else:
            usable[sample.id] = sample
    if not usable:
        why = (
            "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
            or "the list is empty"
        )
        raise ValueError(f"no sample that {adapter.name} can use for {task} ({why})")
    return list(usable.values()), skipped


def _plan(adapter: Adapter, samples: list[Sample], task: str, batch_size: int) -> list[list[Sample]]:
    """Batches of like length, so that little is padded; longest first: too little memory shows at once."""

    def size(sample: Sample) -> int:
        # A missing picture would have to be drawn to be counted; a model draws all in one size anyway.
        drawn = getattr(adapter, "draw", False) and task == "generation" and not sample.images
        return len(sample.turns[0][0]) if drawn else adapter.length(sample, task)

    by_length = sorted(samples, key=lambda s: (not s.images, -size(s), s.id))
    return [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]


def _facts(adapter: Adapter, plan: list[list[Sample]], task: str, seed: int) -> dict[str, Any]:
    """What, beside weights and pixels, decides the numbers."""
    device = next((p.device.type for p in adapter.model.parameters()), "cpu")
    batches = [[(s.id, s.turns, [p.name for p in s.images], s.type) for s in batch] for batch in plan]
    who = {"model": adapter.name, "family": adapter.family, "device": device}
    drawing = {"draw": getattr(adapter, "draw", False), "draw_seed": getattr(adapter, "seed", None)}
    return {**who, **drawing, "task": task, "seed": seed, "plan": batches}


def _measure(adapter: Adapter, samples: list[Sample], task: str) -> dict[str, Any]:
    """One forward pass -> plain lists (they go into a part file): id, counts, uniform, value [L, H]."""
    batch: Batch = adapter.collate(samples, task)
    n_query, n_key = batch.query_mask.sum(1), batch.key_mask.sum(1)
    filled = (n_query > 0) & (n_key > 0)
    if not filled.any():
        return {"samples": [], "empty": list(batch.ids)}
    see = getattr(adapter, "visible", None)  # only models that are not causal define it
    uniform = uniform_intensity(
        batch.query_mask, batch.key_mask, batch.attention_mask, see(batch) if see is not None else None
    )
    try:
        with torch.no_grad(), adapter.capture(batch) as record:
            adapter.forward(batch)
    except torch.OutOfMemoryError as error:
        size = f"{len(batch.ids)} samples of {batch.attention_mask.shape[1]} tokens"
        raise MemoryError(f"out of memory on a batch of {size}; use a smaller batch size") from error
    value = record.per_head.detach().float().cpu()  # [L, B, H]
    rows = []
    for i, name in enumerate(batch.ids):
        if filled[i]:
            if not torch.isfinite(value[:, i]).all():
                raise ValueError(
                    f"{name}: the intensity is not finite; try dtype float32 (or bfloat16, not float16)"
                )
            counts = {"n_query": int(n_query[i]), "n_key": int(n_key[i]), "uniform": float(uniform[i])}
            rows.append({"sample": name, **counts, "value": value[:, i].tolist()})
    return {"samples": rows, "empty": [name for i, name in enumerate(batch.ids) if not filled[i]]}


def _table(
    model: str, task: str, samples: list[Sample], records: dict[int, dict[str, Any]]
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Records of all batches -> the tidy table, in the samples' order, and those with an empty span."""
    rows = {row["sample"]: row for record in records.values() for row in record["samples"]}
    empty = {name: "an empty query or key span" for record in records.values() for name in record["empty"]}
    kept = [s for s in samples if s.id in rows]
    if not kept:
        raise ValueError(f"every sample has an empty query or key span for {task}: nothing to measure")
    value = np.array([rows[s.id]["value"] for s in kept], dtype=np.float32)  # [N, L, H]
    n, n_layers, n_heads = value.shape
    each = n_layers * n_heads

    def per_sample(values: list[Any]) -> np.ndarray:
        return np.repeat(np.array(values), each)

    columns = {
        "model": [model] * (n * each),
        "task": [task] * (n * each),
        "layer": np.tile(np.repeat(np.arange(n_layers), n_heads), n),
        "head": np.tile(np.arange(n_heads), n * n_layers),
        "sample": per_sample([s.id for s in kept]),
        "type": per_sample([s.type for s in kept]),
        "n_query": per_sample([rows[s.id]["n_query"] for s in kept]),
        "n_key": per_sample([rows[s.id]["n_key"] for s in kept]),
        "uniform": per_sample([rows[s.id]["uniform"] for s in kept]),
        "value": value.reshape(-1),
    }
    return pd.DataFrame(columns)[COLUMNS], empty


@contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off (Emu3's default is 0.1), and every module back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _seeded(model: torch.nn.Module, seed: int, batch: int) -> Iterator[None]:
    """Random numbers of their own for each batch; the caller's random state is put back."""
    gpus = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed * 1_000_003 + batch)
        yield


def _bar(show: bool, batches: list[list[Sample]], task: str, name: str) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=sum(map(len, batches)), desc=f"{name} {task}", unit="sample", disable=not show)


def rank_and_world() -> tuple[int, int]:
    """Of this process. RuntimeError if torchrun started several that have not found each other."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but torch.distributed is not initialised: each "
            "process would profile all samples; call accelerate.PartialState() first (the command line does)"
        )
    return 0, 1


def barrier() -> None:
    """Wait for all processes, if there are several."""
    if rank_and_world()[1] > 1:
        torch.distributed.barrier()


def _gather(mine: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The records of all processes, on every process."""
    world = rank_and_world()[1]
    if world == 1:
        return mine
    everyone: list[Any] = [None] * world
    torch.distributed.all_gather_object(everyone, mine)
    return {number: record for records in everyone for number, record in records.items()}
