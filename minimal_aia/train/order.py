"""The order of the data: which places of each task's stream of samples a micro-batch takes.

Pure arithmetic on numbers, so that any micro-batch of a run is found at once, by any process, after any
number of restarts. A task's samples form an endless stream, shuffled anew in every epoch by the seed. The
first n samples of the run hold ⌊n · share⌋ for generation, for every n: no cut into steps, micro-batches or
processes is more than one sample from the ratio. An optimizer step takes the next stretch of both streams;
how many processes share it does not change what it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from minimal_aia.train.config import TASKS, TrainConfig

SHUFFLE, BUCKETS, DROPOUT = range(3)  # what a random stream is for


@dataclass(frozen=True)
class Order:
    """The order of one run.

    share: of generation among the samples. batch: samples of a micro-batch. per_step: micro-batches of an
    optimizer step, over all processes. window: optimizer steps whose samples are sorted by length; 1: none.
    """

    share: Fraction
    batch: int
    per_step: int
    window: int = 1
    seed: int = 0

    @classmethod
    def of(cls, config: TrainConfig, world_size: int = 1) -> Order:
        return cls(
            config.generation_share(),
            config.per_device_train_batch_size,
            config.gradient_accumulation_steps * world_size,
            max(1, config.length_window),
            config.seed,
        )

    def before(self, task: str, n: int) -> int:
        """How many of the run's first n samples are for the task."""
        generation = n * self.share.numerator // self.share.denominator
        return generation if task == "generation" else n - generation

    def stretch(self, task: str, number: int) -> range:
        """Places in the task's stream that micro-batch `number` takes, before sorting by length."""
        return range(self.before(task, number * self.batch), self.before(task, (number + 1) * self.batch))

    def places(self, task: str, number: int, arranged: Callable[[int], Sequence[int]]) -> Sequence[int]:
        """The same once every window is sorted by length, so that samples of like length meet.

        arranged: a window's number -> its places as `arrange` puts them; not called when there is no window.
        """
        stretch = self.stretch(task, number)
        if self.window == 1:
            return stretch
        window = number // (self.per_step * self.window)
        first = self.window_places(task, window).start
        return arranged(window)[stretch.start - first : stretch.stop - first]

    def window_places(self, task: str, window: int) -> range:
        samples = self.batch * self.per_step * self.window
        return range(self.before(task, window * samples), self.before(task, (window + 1) * samples))

    def arrange(self, task: str, window: int, length: Callable[[int], int]) -> list[int]:
        """A window's places sorted by the samples' length, cut into steps, the steps in random order."""
        places = self.window_places(task, window)
        first = window * self.window
        counts = [len(self._step_places(task, first + step)) for step in range(self.window)]
        by_length = sorted(places, key=length)  # stable: equal lengths keep their order
        steps: list[list[int]] = [[] for _ in counts]
        taken = 0
        for step in random(self.seed, BUCKETS, task, window).permutation(self.window):
            steps[step] = by_length[taken : taken + counts[step]]
            taken += counts[step]
        return [place for step in steps for place in step]

    def _step_places(self, task: str, step: int) -> range:
        first = step * self.per_step
        return range(self.stretch(task, first).start, self.stretch(task, first + self.per_step - 1).stop)

    def index(self, task: str, place: int, block: int, endless: bool = False) -> int:
        """The sample that stands at a place of the stream, when `block` samples are shuffled together.

        endless: blocks follow one another in a stream; else every block is one more pass over all samples.
        """
        number, i = divmod(place, block)
        return int(_permutation(self.seed, task, number, block)[i]) + (number * block if endless else 0)

    def drops(self, place: int, share: float) -> bool:
        """Whether the generation prompt at a place is dropped: by sample and epoch, that is, by place."""
        return share > 0 and random(self.seed, DROPOUT, "generation", place).random() < share


def random(seed: int, purpose: int, task: str, number: int) -> np.random.Generator:
    return np.random.default_rng((seed, purpose, TASKS.index(task), number))


@lru_cache(maxsize=8)
def _permutation(seed: int, task: str, number: int, n: int) -> np.ndarray:
    return random(seed, SHUFFLE, task, number).permutation(n)
