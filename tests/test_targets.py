"""Stages: the printed tables, cutting curves, rescaling, files, and errors that name the stage."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minimal_aia.segments import cut
from minimal_aia.targets import PRESETS, TASKS, Stage, StageTargets

TABLES = Path(__file__).parent.parent / "data_samples" / "published" / "tables_s4_s5_stages.csv"
DEPTH = {"emu3": 32, "janus-pro": 30, "authors-code": 30}

targets_strategy = st.builds(
    lambda lengths, values, tasks, name: StageTargets(
        **{
            task: tuple(
                Stage(sum(lengths[:i]), sum(lengths[: i + 1]) - 1, *values[i]) for i in range(len(lengths))
            )
            for task in tasks
        },
        name=name,
    ),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    values=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 10, exclude_min=True)), min_size=6, max_size=6),
    tasks=st.sampled_from([TASKS, TASKS[:1], TASKS[1:]]),
    name=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8),
)
curves = st.lists(st.floats(0, 1), min_size=1, max_size=9)


# ---- presets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("task", TASKS)
def test_presets_equal_the_printed_tables(name, task):
    """Layer by layer, against the CSV of Tables S4, S5 and the code's conditions."""
    model = {"authors-code": "janus-pro-authors-code"}.get(name, name)
    with TABLES.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row["model"], row["task"]) == (model, task)]
    target, delta = StageTargets.paper(name).tensors(task, n_layers=DEPTH[name])
    for layer in range(DEPTH[name]):
        (row,) = [r for r in rows if int(r["first_layer"]) <= layer <= int(r["last_layer"] or 999)]
        assert target[layer].item() == pytest.approx(float(row["target"]))
        assert delta[layer].item() == pytest.approx(float(row["delta"]))


def test_where_paper_and_code_differ():
    """One layer only: the code's understanding band ends at 20 where Table S5 starts the next."""
    for task, layers in (("generation", []), ("understanding", [20])):
        paper = StageTargets.paper("janus-pro").tensors(task)
        code = StageTargets.paper("authors-code").tensors(task)
        assert (paper[0] != code[0]).nonzero().flatten().tolist() == layers
        assert torch.equal(paper[1], code[1])


def test_the_last_band_of_table_s5_cannot_occur():
    targets = StageTargets.paper("janus-pro")
    assert targets.n_layers == 30
    assert [str(s) for s in targets.understanding] == ["0-9", "10-19", "20-24", "25-29"]
    assert str(StageTargets.paper("emu3").understanding[-1]) == "31-31"


def test_unknown_preset():
    with pytest.raises(ValueError, match="'bagel'; choose from emu3, janus-pro, authors-code"):
        StageTargets.paper("bagel")


# ---- cutting curves ------------------------------------------------------------------------------------


def squares(curve, bands):
    return sum(((curve[i : j + 1] - curve[i : j + 1].mean()) ** 2).sum() for i, j in bands)


@given(curve=curves, data=st.data())
def test_cut_is_as_good_as_trying_every_cut(curve, data):
    curve = np.array(curve)
    n_stages = data.draw(st.integers(1, len(curve)))
    best = np.inf
    for inner in itertools.combinations(range(1, len(curve)), n_stages - 1):
        edges = [0, *inner, len(curve)]
        best = min(best, squares(curve, [(a, b - 1) for a, b in itertools.pairwise(edges)]))
    bands = cut(curve, n_stages)
    assert len(bands) == n_stages
    assert squares(curve, bands) == pytest.approx(best, abs=1e-12)


def test_cut_finds_true_steps():
    truth = [0.4] * 10 + [0.15] * 7 + [0.3] * 4 + [0.05] * 3
    noise = np.random.default_rng(0).normal(0, 0.01, len(truth))
    assert cut(np.array(truth) + noise, 4) == [(0, 9), (10, 16), (17, 20), (21, 23)]


def test_from_curve_with_stages():
    curve = [0.4, 0.5, 0.6, 0.10, 0.10, 0.12]
    (first, second) = StageTargets.from_curve(generation=curve, n_stages=2, delta=0.03).generation
    assert (str(first), str(second)) == ("0-2", "3-5")
    assert first.target == pytest.approx(0.5)
    assert second.target == pytest.approx(0.32 / 3)
    assert first.delta == pytest.approx((0.02 / 3) ** 0.5)  # the spread .4 .5 .6 around .5
    assert second.delta == 0.03  # its spread, .009, is less than the least δ


@given(curve=curves)
def test_raw_curve_keeps_every_layer(curve):
    target, delta = StageTargets.from_curve(understanding=curve).tensors("understanding", dtype=torch.float64)
    assert target.tolist() == curve
    assert delta.tolist() == [0.05] * len(curve)


def test_curves_of_different_depth_need_a_layer_count():
    short, long = [0.0, 1.0], [0.0, 0.5, 1.0]
    with pytest.raises(ValueError, match=r"differ in layers .*: say n_layers"):
        StageTargets.from_curve(short, long)
    targets = StageTargets.from_curve(short, long, n_layers=5)
    for task in TASKS:
        assert targets.tensors(task)[0].tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_from_profile():
    """Mean over heads, then samples; an empty sample and the unequal number of heads must not tilt it."""
    rows = []
    for layer, per_sample in enumerate([(0.2, 0.6, np.nan), (0.1, 0.3, np.nan)]):
        for sample, value in enumerate(per_sample):
            for head, shift in enumerate((-0.05, 0.05)):
                rows.append(("generation", "a", layer, head, f"s.jsonl:{sample}", value + shift))
    table = pd.DataFrame(rows, columns=["task", "model", "layer", "head", "sample", "value"])
    other = table.assign(task="understanding", model="b", value=0.5)
    targets = StageTargets.from_profile(SimpleNamespace(table=table), other, n_stages=None)
    assert targets.tensors("generation")[0].tolist() == pytest.approx([0.4, 0.2])
    assert targets.tensors("understanding")[0].tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"several curves for generation \(a, c\)"):
        StageTargets.from_profile(table, table.assign(model="c"))
    with pytest.raises(ValueError, match="no column value"):
        StageTargets.from_profile(table.drop(columns="value"))
    with pytest.raises(ValueError, match=r"layers \[1\] are not 0, 1"):
        StageTargets.from_profile(table[table.layer == 1])


# ---- rescaling -----------------------------------------------------------------------------------------


@given(targets=targets_strategy, n=st.integers(1, 70))
def test_rescaling_keeps_relative_depth(targets, n):
    scaled = targets.for_layers(n)
    assert scaled.n_layers == n
    for task in TASKS:
        if getattr(targets, task):
            old, new = targets.tensors(task)[0], scaled.tensors(task)[0]
            midpoints = (torch.arange(n, dtype=torch.float64) + 0.5) / n * len(old)
            # an exact fraction can fall on a border, where rounding in this reference decides: both are fine
            left, right = ((midpoints + e).floor().long().clamp(0, len(old) - 1) for e in (-1e-9, 1e-9))
            assert ((new == old[left]) | (new == old[right])).all()
    assert targets.for_layers(targets.n_layers) == targets


def test_rescaling_the_paper_by_hand():
    targets = StageTargets.paper("janus-pro", n_layers=8)
    assert targets.tensors("generation")[0].tolist() == pytest.approx([0.4] * 7 + [0.2])
    assert targets.tensors("understanding")[0].tolist() == pytest.approx([0.1] * 3 + [0.15] * 2 + [0.3] * 3)
    with pytest.raises(ValueError, match="n_layers is 0"):
        targets.for_layers(0)


def test_layer_count_mismatch_names_the_stage_and_the_remedy():
    with pytest.raises(
        ValueError, match=r"32 layers, but the last generation stage is 25-29 .*for_layers\(32\)"
    ):
        StageTargets.paper("janus-pro").tensors("generation", n_layers=32)


# ---- validation ----------------------------------------------------------------------------------------

FAULTS = [
    (lambda: Stage(3, 2, 0.1, 0.1), r"stage 3-2: needs 0 <= first_layer"),
    (lambda: Stage(-1, 2, 0.1, 0.1), r"stage -1-2: needs 0 <="),
    (lambda: Stage(0, 2.5, 0.1, 0.1), r"stage 0-2.5: last_layer must be a whole number"),
    (lambda: Stage(True, 2, 0.1, 0.1), r"first_layer must be a whole number"),
    (lambda: Stage(0, 2, 1.1, 0.1), r"stage 0-2: target 1.1 lies outside"),
    (lambda: Stage(0, 2, -0.1, 0.1), r"stage 0-2: target -0.1 lies outside"),
    (lambda: Stage(0, 2, float("nan"), 0.1), r"stage 0-2: target must be finite"),
    (lambda: Stage(0, 2, "a", 0.1), r"stage 0-2: target must be a number, not 'a'"),
    (lambda: Stage(0, 2, 0.1, 0), r"stage 0-2: delta 0.0 must be above 0"),
    (lambda: Stage(0, 2, 0.1, float("inf")), r"stage 0-2: delta must be finite"),
    (lambda: StageTargets(), r"no stages"),
    (lambda: StageTargets([Stage(1, 2, 0.1, 0.1)]), r"generation stage 1 \(layers 1-2\): gap, .* layer 0"),
    (
        lambda: StageTargets((), [Stage(0, 2, 0.1, 0.1), Stage(4, 5, 0.1, 0.1)]),
        r"understanding stage 2 \(layers 4-5\): gap, should start at layer 3",
    ),
    (
        lambda: StageTargets([Stage(0, 2, 0.1, 0.1), Stage(2, 5, 0.1, 0.1)]),
        r"generation stage 2 \(layers 2-5\): overlap, should start at layer 3",
    ),
    (
        lambda: StageTargets([Stage(0, 2, 0.1, 0.1)], [Stage(0, 3, 0.1, 0.1)]),
        r"last generation stage is 0-2, the last understanding stage 0-3",
    ),
    (lambda: StageTargets([(0, 2, 0.1, 0.1)]), r"generation stage 1: expected a Stage"),
    (
        lambda: StageTargets.constant(3, generation=0.1).stages("understanding"),
        r"no stages for understanding",
    ),
    (lambda: StageTargets.constant(3, generation=0.1).tensors("drawing"), r"'drawing' is neither"),
    (lambda: StageTargets.constant(3), r"no stages"),
    (
        lambda: StageTargets.from_curve([0.1, 1.2, float("nan")]),
        r"generation curve leaves .* layers \[1, 2\]",
    ),
    (lambda: StageTargets.from_curve([[0.1]]), r"one value a layer"),
    (lambda: StageTargets.from_curve([0.1, 0.2], n_stages=3), r"generation: cannot cut 2 layers into 3"),
    (lambda: StageTargets.from_curve([0.1, 0.2], n_stages=0), r"cannot cut 2 layers into 0"),
    (lambda: StageTargets.from_curve([0.1], n_layers=3), r"cannot resample the generation curve"),
    (lambda: StageTargets.from_dict([1]), r"a mapping with the keys"),
    (lambda: StageTargets.from_dict({"stages": []}), r"a mapping with the keys"),
    (
        lambda: StageTargets.from_dict({"generation": {}, "understanding": 3}),
        r"understanding: expected a list",
    ),
    (
        lambda: StageTargets.from_dict({"generation": [{"target": 1}]}),
        r"generation stage 1: expected the keys",
    ),
    (lambda: StageTargets.from_yaml("a: [1"), r"not YAML"),
]


@pytest.mark.parametrize(("make", "message"), FAULTS)
def test_faults_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- files ---------------------------------------------------------------------------------------------


@given(targets=targets_strategy)
def test_dict_and_yaml_round_trip(targets):
    assert StageTargets.from_dict(targets.to_dict()) == targets
    assert StageTargets.from_yaml(targets.to_yaml()) == targets


def test_numpy_numbers_round_trip_too(tmp_path):
    stage = Stage(np.int64(0), np.int32(3), np.float32(0.25), np.float64(0.1))
    targets = StageTargets([stage], name="λ")
    targets.save(tmp_path / "stages.yaml")
    assert StageTargets.load(tmp_path / "stages.yaml") == targets
    (tmp_path / "stages.yaml").write_text("generation: [{first_layer: 0}]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"stages\.yaml: generation stage 1"):
        StageTargets.load(tmp_path / "stages.yaml")
