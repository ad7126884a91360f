"""Micro-batches of both tasks, by number: `MixedBatches(...)[g]` is {task: Batch}.

The numbers are those of `config.micro_batch`. An item depends on the configuration, the data and its number
alone: any number of data loader workers gives the same run, and a resumed run asks for the numbers that it
still needs. Sequences are padded to the longest of their micro-batch, never to a fixed length.

Several samples are never packed into one sequence. An intensity is a mean over the queries of one sample; in
a packed sequence those of several would have to be told apart inside every layer, and the block mask rules
out the fastest attention kernels. Sorting by length leaves little padding: of 40 % on long answers, 1 % stays
with `length_window: 16` (tests/train/test_order.py); `check-data` says how much in a recipe's own data.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import Dataset, get_worker_info

from minimal_aia.data import Sample, SampleError
from minimal_aia.models.base import Adapter, Batch
from minimal_aia.pictures import PictureError
from minimal_aia.train.codes import CodeStore
from minimal_aia.train.config import TrainConfig
from minimal_aia.train.open_source import STREAM_BLOCK, open_source
from minimal_aia.train.order import Order
from minimal_aia.train.sources import Source

TRIES = 100  # a place whose sample is bad takes the next good one; after so many bad ones in a row, stop
NAMED = 10  # bad samples that a process names in its log; the rest are counted only
MAX_WORKERS = 256

log = logging.getLogger(__name__)


class MixedBatches(Dataset):
    """The training data of a run.

    Args:
        config: task ratio, batch size, seed, dropout, length limits (see `TrainConfig`).
        sources: one a task of the ratio.
        adapter: makes batches; it needs no weights (`data_adapter`).
        world_size: processes that share the run. Which of them takes which number is not asked here.
        codes: image codes made beforehand; samples that have them do not touch their pictures.
    """

    def __init__(
        self,
        config: TrainConfig,
        sources: Mapping[str, Source],
        adapter: Adapter,
        world_size: int = 1,
        codes: CodeStore | None = None,
    ) -> None:
        self.config, self.adapter, self.codes = config, adapter, codes
        self.sources = {task: sources[task] for task in config.shares()}
        self.order = Order.of(config, world_size)
        if config.prompt_dropout and "generation" in self.sources and not adapter.drops_prompts:
            raise ValueError(f"prompt_dropout: the {adapter.family} family drops no prompts; set 0")
        for task, source in self.sources.items():
            if codes is not None and self._coded(task):
                codes.check_source(task, source)
                source.check = "none"
            window = len(self.order.window_places(task, 0))
            if source.endless and self.order.window > 1 and window > source.block:
                most = f"more than the {source.block} that a stream keeps in memory; lower it"
                raise ValueError(f"length_window {config.length_window}: {window} samples, {most}")
        self._arranged: dict[str, tuple[int, list[int]]] = {}
        self._named: set[str] = set()
        # One counter a worker, in shared memory: the trainer's process reads what its workers count.
        self._skipped = torch.zeros(MAX_WORKERS + 1, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return self.config.max_steps * self.order.per_step

    def __getitem__(self, number: int) -> dict[str, Batch]:
        return {task: self._batch(task, places) for task, places in self._places(number).items()}

    def samples(self, number: int) -> dict[str, list[Sample]]:
        """What a micro-batch is made of, before tokens and pixels."""
        return {
            task: [self._sample(task, place)[0] for place in places]
            for task, places in self._places(number).items()
        }

    @property
    def skipped(self) -> int:
        """Bad samples that this process and its workers have replaced so far."""
        return int(self._skipped.sum())

    def fingerprints(self) -> dict[str, list[Any]]:
        """What tells the samples of each task from others: a resumed run compares its checkpoint's."""
        return {task: [source.fingerprint, source.block] for task, source in self.sources.items()}

    # ---- which samples ---------------------------------------------------------------------------------

    def _places(self, number: int) -> dict[str, Sequence[int]]:
        places = {task: self.order.places(task, number, partial(self._window, task)) for task in self.sources}
        return {task: found for task, found in places.items() if found}

    def _window(self, task: str, window: int) -> list[int]:
        """A window's places, sorted once, not for every micro-batch."""
        if self._arranged.get(task, (None,))[0] != window:
            arranged = self.order.arrange(
                task, window, lambda p: self.rough_length(task, self._index(task, p))
            )
            self._arranged[task] = (window, arranged)
        return self._arranged[task][1]

    def _index(self, task: str, place: int) -> int:
        source = self.sources[task]
        return self.order.index(task, place, source.block, source.endless)

    def rough_length(self, task: str, index: int) -> int:
        """About how many tokens a sample has: four bytes of text each, and pictures where they differ."""
        source = self.sources[task]
        text = source.text_bytes(index) // 4
        if self._coded(task):
            return text + self.codes.length(task, index)  # type: ignore[union-attr]
        if type(self.adapter).picture_length is Adapter.picture_length:
            return text
        try:
            return text + sum(self.adapter.picture_length(picture) for picture in source[index].images)
        except ValueError:  # a bad sample, which is dealt with when its turn comes
            return text

    def sample(self, task: str, index: int) -> Sample:
        """A sample of a source, with its codes if there are any. SampleError if the model cannot use it."""
        sample = self.sources[task][index]
        if self._coded(task):
            sample = replace(sample, images=self.codes.pictures(task, index))  # type: ignore[union-attr]
        try:
            why = self.adapter.why_not(sample, task)
        except PictureError as error:  # some adapters look at the picture
            why = str(error)
        if why is not None:
            raise SampleError(f"{sample.id}: {why}", (f"{sample.id}: {why}",))
        return sample

    def _coded(self, task: str) -> bool:
        return self.codes is not None and task in self.adapter.coded_tasks

    def _sample(self, task: str, place: int, tries: int = 0, reason: str = "") -> tuple[Sample, int]:
        """The sample at a place, or the next good one but `tries`; and how many were passed over."""
        source, index = self.sources[task], self._index(task, place)
        first = index - index % source.block
        for n in range(tries, min(TRIES, source.block)):
            try:
                sample = self.sample(task, first + (index - first + n) % source.block)
            except SampleError as error:
                reason = str(error)
                self._bad(reason)
            else:
                drop = task == "generation" and self.order.drops(place, self.config.prompt_dropout)
                return replace(sample, dropped=drop), n
        raise SampleError(f"{source.name}: too many bad samples in a row; the last: {reason}")

    # ---- batches ---------------------------------------------------------------------------------------

    def _batch(self, task: str, places: Sequence[int]) -> Batch:
        found = [self._sample(task, place) for place in places]
        while True:
            samples = [sample for sample, _ in found]
            try:
                batch, why = self.adapter.collate(samples, task), {}
            except Exception as error:
                batch, why = None, self._culprits(samples, task, error)
            if batch is not None:
                why = self._too_long(batch)
                if not why:
                    return batch
            for row, reason in why.items():
                self._bad(f"{samples[row].id}: {reason}")
                found[row] = self._sample(task, places[row], found[row][1] + 1, reason)

    def _culprits(self, samples: Sequence[Sample], task: str, error: Exception) -> dict[int, str]:
        """Which samples cannot be collated, and why; the error itself if each of them can."""
        why = {}
        for row, sample in enumerate(samples):
            try:
                self.adapter.collate([sample], task)
            except Exception as bad:
                why[row] = str(bad).strip() or type(bad).__name__
        if not why or isinstance(error, MemoryError):
            raise error
        return why

    def _too_long(self, batch: Batch) -> dict[int, str]:
        limit = self.config.max_length
        if limit is None:
            return {}
        lengths = batch.attention_mask.sum(1).tolist()
        return {i: f"{n} tokens, more than max_length {limit}" for i, n in enumerate(lengths) if n > limit}

    def _bad(self, reason: str) -> None:
        if self.config.on_bad_sample == "fatal":
            raise SampleError(f"{reason} (on_bad_sample: skip goes on without it)", (reason,))
        worker = get_worker_info()
        self._skipped[0 if worker is None else worker.id % MAX_WORKERS + 1] += 1
        if reason not in self._named and len(self._named) < NAMED:
            self._named.add(reason)
            log.warning("skipped a bad sample: %s", reason)


def data_adapter(config: TrainConfig, device: str = "meta") -> Adapter:
    """The model's adapter as batches need it: on "meta" without its weights, in any number of workers."""
    from minimal_aia.models import load_adapter

    adapter: Any = load_adapter(config.model, device=device, dtype=getattr(torch, config.dtype))
    adapter.set_pictures(config.image_fit, config.image_area)
    adapter.ends_turns = True
    return adapter


def open_data(config: TrainConfig, world_size: int = 1, adapter: Adapter | None = None) -> MixedBatches:
    """The data that a recipe names. Every error a user can make is raised here, before training starts."""
    specs = {task: getattr(config, f"{task}_data") for task in config.shares()}
    if lab := [task for task, spec in specs.items() if spec == "lab"]:
        raise ValueError(f"{lab[0]}_data lab: endless scenes are for both tasks or none")
    sources = {t: open_source(spec, t, config.image_folder, STREAM_BLOCK) for t, spec in specs.items()}
    adapter = adapter or data_adapter(config)
    codes = CodeStore(config.codes, adapter) if config.codes else None
    return MixedBatches(config, sources, adapter, world_size, codes)
