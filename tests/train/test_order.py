"""The order of the data: exact ratio, nothing twice, the same run on any number of processes."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimal_aia.train.config import TASKS, TrainConfig, micro_batch, task_counts
from minimal_aia.train.order import Order

RATIOS = st.one_of(
    st.sampled_from(["1:1", "2:1", "1:3", "1:0", "0:1", "0.7:0.3", "3:7"]),
    st.tuples(st.integers(0, 20), st.integers(1, 20)).map(lambda ab: f"{ab[0]}:{ab[1]}"),
)


def config(ratio="1:1", batch=4, accumulation=1, window=0, seed=0, **more) -> TrainConfig:
    return TrainConfig(
        task_ratio=ratio,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        length_window=window,
        seed=seed,
        **more,
    )


def fake_length(place: int) -> int:
    return place * 7919 % 31


def step_places(c: TrainConfig, world: int, step: int, task: str) -> list[list[int]]:
    """What each micro-batch of an optimizer step holds, in the order of its number."""
    order = Order.of(c, world)
    numbers = sorted(
        micro_batch(c, step, micro, rank, world)
        for micro in range(c.gradient_accumulation_steps)
        for rank in range(world)
    )
    return [list(order.places(task, n, lambda w: order.arrange(task, w, fake_length))) for n in numbers]


@given(RATIOS, st.integers(1, 33), st.integers(0, 10**7))
def test_every_micro_batch_holds_its_exact_share(ratio, batch, number):
    """Counted against fractions: no cut of the run is a whole sample off, and no error adds up."""
    order = Order.of(config(ratio, batch))
    a, b = map(Fraction, ratio.split(":"))
    counts = {task: len(order.stretch(task, number)) for task in TASKS}
    assert sum(counts.values()) == batch
    assert abs(counts["generation"] - batch * a / (a + b)) < 1
    seen = order.stretch("generation", number).stop
    assert 0 <= (number + 1) * batch * a / (a + b) - seen < 1
    assert {t: n for t, n in counts.items() if n} == task_counts(config(ratio, batch), number)


@settings(max_examples=60)
@given(
    RATIOS,
    st.sampled_from([(1, 1, 4), (1, 4, 1), (4, 1, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2)]),
    st.integers(1, 6),
    st.integers(0, 40),
    st.integers(0, 3),
    st.integers(0, 5),
)
def test_a_step_is_the_same_on_any_number_of_processes(ratio, shape, unit, step, window, seed):
    """batch × accumulation × processes = 4 units however they are cut: the same samples in the same order."""
    batch, accumulation, world = shape
    for task in TASKS:
        one = step_places(config(ratio, 4 * unit, 1, window, seed), 1, step, task)[0]
        cut = step_places(config(ratio, batch * unit, accumulation, window, seed), world, step, task)
        assert [place for part in cut for place in part] == one


@settings(max_examples=60)
@given(RATIOS, st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(0, 99))
def test_length_windows_lose_and_repeat_nothing_and_keep_the_ratio(ratio, batch, acc, world, window, seed):
    c = config(ratio, batch, acc, window, seed)
    order = Order.of(c, world)
    for task in TASKS:
        found = [
            list(order.places(task, n, lambda w, t=task: order.arrange(t, w, fake_length)))
            for n in range(2 * window * acc * world)
        ]
        assert [len(part) for part in found] == [len(order.stretch(task, n)) for n in range(len(found))]
        places = [place for part in found for place in part]
        assert sorted(places) == list(range(len(places)))


def test_a_window_sorts_by_length_and_shuffles_its_steps():
    c = config("1:0", batch=8, window=16)
    steps = [step_places(c, 2, step, "generation") for step in range(16)]
    lengths = [[fake_length(p) for part in step for p in part] for step in steps]
    assert all(row == sorted(row) for row in lengths)  # within a step, processes get neighbours
    firsts = [row[0] for row in lengths]
    assert firsts != sorted(firsts)
    bounds = sorted((row[0], row[-1]) for row in lengths)
    assert all(high <= low for (_, high), (low, _) in pairwise(bounds))  # steps do not overlap


@given(st.integers(1, 40), st.integers(0, 5), st.sampled_from(TASKS))
def test_every_epoch_holds_every_sample_once_in_its_own_order(n, seed, task):
    order = Order.of(config(seed=seed))
    epochs = [[order.index(task, e * n + i, n) for i in range(n)] for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n > 8:
        assert epochs[0] != epochs[1] != epochs[2]
    endless = [order.index(task, i, n, endless=True) for i in range(3 * n)]
    assert [sorted(endless[b * n : b * n + n]) for b in range(3)] == [
        list(range(b * n, b * n + n)) for b in range(3)
    ]


def test_the_two_tasks_and_two_seeds_are_shuffled_apart():
    rows = {
        (seed, task): [Order.of(config(seed=seed)).index(task, i, 50) for i in range(50)]
        for seed in (0, 1)
        for task in TASKS
    }
    assert len({tuple(row) for row in rows.values()}) == 4


def test_prompts_are_dropped_by_place_at_the_given_rate():
    order = Order.of(config())
    dropped = [order.drops(place, 0.1) for place in range(4000)]
    assert 320 < sum(dropped) < 480  # 400 expected, standard deviation 19
    assert dropped == [order.drops(place, 0.1) for place in range(4000)]
    assert not any(order.drops(place, 0.0) for place in range(100))
    assert all(order.drops(place, 1.0) for place in range(100))
    by_epoch = [tuple(dropped[i : i + 100]) for i in range(0, 4000, 100)]
    assert len(set(by_epoch)) > 30  # another set of prompts in every epoch


def test_with_one_sample_a_process_tasks_alternate_in_time_not_over_processes():
    c = config("1:1", batch=1, accumulation=2)
    order = Order.of(c, 4)
    for step in range(3):
        for micro in range(2):
            tasks = Counter(
                task
                for rank in range(4)
                for task in TASKS
                if order.stretch(task, micro_batch(c, step, micro, rank, 4))
            )
            assert len(tasks) == 1  # all processes do the same task at the same time


def test_a_window_of_16_steps_makes_packing_needless():
    """Image tokens and answers as long as Janus' understanding data may have; padding in batches of 8."""
    lengths = 620 + np.random.default_rng(0).lognormal(np.log(250), 0.9, 50_000).clip(5, 2400).astype(int)

    def padding(window):
        order = Order.of(config("0:1", batch=8, window=window), 16)
        arranged = lru_cache(lambda w: order.arrange("understanding", w, lambda place: int(lengths[place])))
        rows = [lengths[list(order.places("understanding", n, arranged))] for n in range(512)]
        return 1 - sum(row.sum() for row in rows) / sum(row.max() * len(row) for row in rows)

    assert padding(0) > 0.35
    assert padding(16) < 0.015


def test_numbers_beyond_any_run_are_still_exact():
    order = Order.of(config("2:1", 512))
    assert order.before("generation", 3 * 10**15) == 2 * 10**15
    assert len(order.stretch("generation", 10**13)) in (341, 342)


@pytest.mark.parametrize("ratio", ["1:0", "0:1"])
def test_one_task_alone(ratio):
    order = Order.of(config(ratio, 3))
    mine, other = TASKS if ratio == "1:0" else TASKS[::-1]
    assert list(order.stretch(mine, 2)) == [6, 7, 8]
    assert not order.stretch(other, 2)
