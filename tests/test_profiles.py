"""profile() against eager attention, its resume, and the tables it returns against numpy by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from profile_fakes import (
    N_HEADS,
    N_IMAGE,
    N_LAYERS,
    FakeAdapter,
    eager_intensity,
    generation,
    tiny_llama,
    understanding,
)

from minimal_aia import stats
from minimal_aia.data import Sample
from minimal_aia.profiles import IntensityProfile, profile, uniform_intensity
from minimal_aia.targets import Stage, StageTargets


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"pixels")
    return path


def measured(table: pd.DataFrame, sample: str) -> np.ndarray:
    return table[table["sample"] == sample]["value"].to_numpy().reshape(N_LAYERS, N_HEADS)


@pytest.mark.parametrize("task", ["generation", "understanding"])
@pytest.mark.parametrize("left_padding", [False, True])
def test_values_equal_eager_attention_of_each_sample_alone(task, left_padding, picture):
    samples = generation() if task == "generation" else understanding(picture)
    table = profile(FakeAdapter(left_padding=left_padding), samples, task, batch_size=4, progress=False).table
    assert len(table) == len(samples) * N_LAYERS * N_HEADS
    for sample in samples:
        expected = eager_intensity(sample, task).numpy()
        # 1e-6 is what fp32 gives; left padding moves the rotary positions, which costs another rounding or
        # two.
        np.testing.assert_allclose(
            measured(table, sample.id), expected, atol=3e-6 if left_padding else 1e-6, rtol=0
        )


def test_batch_size_does_not_change_the_values():
    one, many = (profile(FakeAdapter(), generation(), "generation", n, progress=False).table for n in (1, 10))
    np.testing.assert_allclose(one["value"], many["value"], atol=1e-6, rtol=0)
    pd.testing.assert_frame_equal(one.drop(columns="value"), many.drop(columns="value"))


def test_table_is_tidy_and_in_sample_order(picture):
    samples = understanding(picture, 4)
    table = profile(FakeAdapter(), samples, "understanding", batch_size=3, progress=False).table
    assert list(table.columns) == "model task layer head sample type n_query n_key uniform value".split()
    assert list(dict.fromkeys(table["sample"])) == [s.id for s in samples]
    assert set(table["layer"]) == set(range(N_LAYERS))
    assert set(table["head"]) == set(range(N_HEADS))
    first = table[table["sample"] == "u.jsonl:1"].iloc[0]
    # Two turns with a six-word-answer: "it is a star it is a star" has 8 words, twice.
    assert (first["n_query"], first["n_key"], first["type"]) == (16, N_IMAGE, "choice")


def test_batches_are_of_like_length_and_longest_first():
    adapter = FakeAdapter()
    profile(adapter, generation(9), "generation", batch_size=3, progress=False)
    widths = [width for _, width in adapter.sizes]
    lengths = sorted((adapter.length(s, "generation") for s in generation(9)), reverse=True)
    assert widths == lengths[::3]  # the longest of every three: no batch is padded beyond its own longest


def test_far_fewer_forward_passes_than_one_token_at_a_time():
    """Plotting scripts that decode make one pass an image token and sample; one teacher-forced pass does a
    batch."""
    adapter = FakeAdapter()
    profile(adapter, generation(48), "generation", progress=False)
    assert adapter.n_forward == 3
    assert 48 * N_IMAGE / adapter.n_forward >= 20


def test_decoding_one_token_at_a_time_gives_the_same_intensity():
    """What makes the saving legitimate: a causal row does not see later tokens. Decode with a cache,
    compare."""
    sample = generation(3)[2]
    ids, query, key = FakeAdapter(torch.nn.Identity()).row(sample, "generation")
    model, cache, rows = tiny_llama(0, "eager"), None, []
    for position, token in enumerate(ids):
        with torch.no_grad():
            out = model(
                torch.tensor([[token]]), past_key_values=cache, use_cache=True, output_attentions=True
            )
        cache = out.past_key_values
        if query[position]:
            marked = torch.tensor(key[: position + 1])
            rows.append(torch.stack([a[0, :, 0][:, marked].sum(-1) for a in out.attentions]))  # [L, H]
    stepwise = torch.stack(rows).mean(0).numpy()
    table = profile(FakeAdapter(), [sample], "generation", progress=False).table
    np.testing.assert_allclose(measured(table, sample.id), stepwise, atol=1e-6, rtol=0)
    assert len(rows) == N_IMAGE


def test_model_mode_is_restored_and_dropout_is_off():
    adapter = FakeAdapter()
    adapter.model.train()
    adapter.model.config.attention_dropout = 0.5
    for layer in adapter.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    adapter.model.model.layers[1].eval()
    table = profile(adapter, generation(2), "generation", progress=False).table
    np.testing.assert_allclose(
        measured(table, "g.jsonl:1"), eager_intensity(generation(2)[0], "generation").numpy(), atol=1e-6
    )
    assert adapter.model.training
    assert not adapter.model.model.layers[1].training
    assert adapter.model.model.layers[0].training


# What is left out, and said


def test_samples_are_skipped_counted_and_never_zero(picture):
    samples = [
        *generation(3),
        Sample("g.jsonl:90", "generation", (("an unknown thing",),), (), ""),
        Sample("g.jsonl:91", "generation", (("a red star", ""),), (), "dropped"),  # an empty key span
        *understanding(picture, 1),
    ]
    samples[3] = Sample("g.jsonl:90", "generation", (("an unknown thing", ""),), (), "")
    result = profile(FakeAdapter(), samples, "generation", batch_size=2, progress=False)
    assert result.skipped == {
        "g.jsonl:90": "a word the model does not know",
        "g.jsonl:91": "an empty query or key span",
        "u.jsonl:1": "a understanding sample",
    }
    assert set(result.table["sample"]) == {"g.jsonl:1", "g.jsonl:2", "g.jsonl:3"}
    assert (result.table["value"] > 0).all()


def test_a_batch_of_empty_spans_costs_no_forward_pass():
    dropped = [Sample(f"d:{i}", "generation", (("a red star", ""),), (), "dropped") for i in range(2)]
    adapter = FakeAdapter()
    result = profile(adapter, [*generation(2), *dropped], "generation", batch_size=2, progress=False)
    assert adapter.n_forward == 1
    assert result.n_samples == 2


def test_bad_requests_are_refused_before_any_forward(picture, tmp_path):
    adapter = FakeAdapter()
    adapter.tasks = ("understanding",)
    with pytest.raises(ValueError, match=r"fake/tiny does understanding, not 'generation'"):
        profile(adapter, generation(2), "generation", progress=False)
    with pytest.raises(
        ValueError, match=r"no sample that fake/tiny can use for understanding.*a generation sample"
    ):
        profile(adapter, generation(2), "understanding", progress=False)
    with pytest.raises(ValueError, match=r"two samples are called 'u.jsonl:1'"):
        profile(adapter, understanding(picture, 1) * 2, "understanding", progress=False)
    with pytest.raises(ValueError, match=r"written as \.csv or \.parquet"):
        profile(adapter, understanding(picture, 1), "understanding", out=tmp_path / "x.txt", progress=False)
    with pytest.raises(ValueError, match="batch_size is 0"):
        profile(adapter, understanding(picture, 1), "understanding", batch_size=0, progress=False)
    with pytest.raises(ValueError, match="adapter is a str: give what load_adapter returns"):
        profile("lab/unified", generation(2), "generation", progress=False)
    with pytest.raises(ValueError, match=r"samples is the name 'x\.jsonl': give what read_samples returns"):
        profile(adapter, "x.jsonl", "understanding", progress=False)
    assert adapter.n_forward == 0


# Files and resume


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_save_and_load_keep_every_bit(suffix, tmp_path):
    samples = [Sample("x:1", "generation", (("NA", ""),), (), "NA"), *generation(3)]
    result = profile(FakeAdapter(), samples, "generation", out=tmp_path / f"p{suffix}", progress=False)
    back = IntensityProfile.load(tmp_path / f"p{suffix}")
    pd.testing.assert_frame_equal(back.table, result.table, check_exact=True)
    assert [p.name for p in tmp_path.iterdir()] == [f"p{suffix}"]  # no part file, no half file


@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_run_goes_on_and_gives_the_identical_table(torn, tmp_path):
    whole = profile(FakeAdapter(), generation(10), "generation", 2, progress=False).table
    out = tmp_path / "p.csv"
    with pytest.raises(KeyboardInterrupt):
        profile(FakeAdapter(stop_after=3), generation(10), "generation", 2, out=out, progress=False)
    part = tmp_path / "p.csv.part-0.jsonl"
    assert not out.exists()
    assert len(part.read_text().splitlines()) == 1 + 3
    if torn:  # killed while writing a line
        part.write_bytes(part.read_bytes()[:-40])
    again = FakeAdapter()
    result = profile(again, generation(10), "generation", 2, out=out, progress=False)
    assert again.n_forward == (3 if torn else 2)
    pd.testing.assert_frame_equal(result.table, whole, check_exact=True)
    pd.testing.assert_frame_equal(IntensityProfile.load(out).table, whole, check_exact=True)
    assert not part.exists()


def test_resume_keeps_the_count_of_empty_spans(tmp_path):
    samples = [Sample("d:1", "generation", (("a red star " * 9, ""),), (), "dropped"), *generation(4)]
    samples.sort(key=lambda s: s.id)
    with pytest.raises(KeyboardInterrupt):
        profile(FakeAdapter(stop_after=3), samples, "generation", 1, out=tmp_path / "p.csv", progress=False)
    result = profile(FakeAdapter(), samples, "generation", 1, out=tmp_path / "p.csv", progress=False)
    assert result.skipped == {"d:1": "an empty query or key span"}


def change_weight():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1.001)
    return FakeAdapter(model)


@pytest.mark.parametrize(
    ("adapter", "n", "batch_size"),
    [
        (FakeAdapter(name="fake/other"), 10, 2),
        (change_weight(), 10, 2),
        (FakeAdapter(), 9, 2),
        (FakeAdapter(), 10, 3),
    ],
    ids=["name", "weights", "samples", "batch size"],
)
def test_a_part_file_of_another_run_is_refused(adapter, n, batch_size, tmp_path):
    out = tmp_path / "p.csv"
    with pytest.raises(KeyboardInterrupt):
        profile(FakeAdapter(stop_after=1), generation(10), "generation", 2, out=out, progress=False)
    with pytest.raises(ValueError, match=r"part-0.jsonl: left by an interrupted run with another model"):
        profile(adapter, generation(n), "generation", batch_size, out=out, progress=False)
    assert adapter.n_forward == 0
    assert (tmp_path / "p.csv.part-0.jsonl").exists()


def test_changed_pixels_are_another_run(picture, tmp_path):
    out = tmp_path / "p.csv"
    with pytest.raises(KeyboardInterrupt):
        profile(
            FakeAdapter(stop_after=1), understanding(picture), "understanding", 2, out=out, progress=False
        )
    picture.write_bytes(b"others")
    with pytest.raises(ValueError, match="left by an interrupted run"):
        profile(FakeAdapter(), understanding(picture), "understanding", 2, out=out, progress=False)


def test_a_spoilt_part_file_is_named(tmp_path):
    (tmp_path / "p.csv.part-0.jsonl").write_text("no json\n")
    with pytest.raises(ValueError, match=r"part-0.jsonl: not a part file"):
        profile(FakeAdapter(), generation(2), "generation", out=tmp_path / "p.csv", progress=False)


def test_load_names_the_file_and_the_reason(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.csv: no such profile"):
        IntensityProfile.load(tmp_path / "none.csv")
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"bad.csv: not a profile"):
        IntensityProfile.load(tmp_path / "bad.csv")


# The flat baseline


@pytest.mark.parametrize("task", ["generation", "understanding"])
@pytest.mark.parametrize("left_padding", [False, True])
def test_uniform_is_what_a_model_with_flat_attention_measures(task, left_padding, picture):
    """Independent oracle: zero the query projections, so every score is 0 and softmax is flat over visible
    keys."""
    model = tiny_llama()
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    samples = generation() if task == "generation" else understanding(picture)
    adapter = FakeAdapter(model, left_padding=left_padding)
    table = profile(adapter, samples, task, batch_size=4, progress=False).table
    np.testing.assert_allclose(table["uniform"], table["value"], atol=1e-6, rtol=0)
    assert table["uniform"].nunique() > 1


def test_uniform_by_hand_and_with_other_visibility():
    # tokens: key key query query | padding. Rows 2 and 3 see 3 and 4 tokens, 2 of them keys.
    query = torch.tensor([[0, 0, 1, 1, 0]]).bool()
    key = torch.tensor([[1, 1, 0, 0, 0]]).bool()
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    assert uniform_intensity(query, key, mask).item() == pytest.approx((2 / 3 + 2 / 4) / 2)
    everything = torch.ones(1, 5, 5, dtype=torch.bool)
    assert uniform_intensity(query, key, mask, everything).item() == pytest.approx(2 / 4)
    causal = everything.tril()
    assert torch.equal(uniform_intensity(query, key, mask, causal), uniform_intensity(query, key, mask))
    assert uniform_intensity(query, key & False, mask).isnan().all()
    assert uniform_intensity(query & False, key, mask).isnan().all()


def test_an_adapter_that_is_not_causal_says_what_its_queries_see():
    class Bidirectional(FakeAdapter):
        def visible(self, batch):
            return batch.attention_mask.bool()[:, None, :].expand(-1, batch.attention_mask.shape[1], -1)

    table = profile(Bidirectional(), generation(3), "generation", progress=False).table
    real = table["n_query"] + table["n_key"] + 2  # begin, picture start
    np.testing.assert_allclose(table["uniform"], table["n_key"] / real)


def test_pictures_to_be_drawn_are_not_drawn_to_plan_batches():
    class Drawing(FakeAdapter):
        draw = True

        def length(self, sample, task):
            pytest.fail("asking for the length would draw the picture")

    adapter = Drawing()
    profile(adapter, generation(6), "generation", batch_size=2, progress=False)
    assert adapter.n_forward == 3
    assert [width for _, width in adapter.sizes] == sorted((w for _, w in adapter.sizes), reverse=True)


# The questions a profile answers


def made(matrix: np.ndarray, task="generation", types=None, n_key=None, model="m") -> IntensityProfile:
    """A profile from [N, L], two heads that differ by ±0.01."""
    rows = [
        (
            model,
            task,
            l,
            h,
            f"s:{i}",
            (types or ["a"] * len(matrix))[i],
            6,
            (n_key or [3] * len(matrix))[i],
            0.25,
            v,
        )
        for i, curve in enumerate(matrix)
        for l, mean in enumerate(curve)
        for h, v in enumerate((mean - 0.01, mean + 0.01))
    ]
    names = "model task layer head sample type n_query n_key uniform value".split()
    return IntensityProfile(pd.DataFrame(rows, columns=names))


def test_curve_std_and_groups_equal_numpy():
    rng = np.random.default_rng(0)
    m = rng.uniform(0.2, 0.8, (8, 5))
    types, n_key = ["a", "b"] * 4, [1, 2, 3, 4, 5, 6, 7, 8]
    p = made(m, types=types, n_key=n_key)
    curve = p.curve()
    np.testing.assert_allclose(curve["mean"], m.mean(0))
    np.testing.assert_allclose(curve["std"], m.std(0, ddof=1))
    np.testing.assert_allclose(p.curve("b")["mean"], m[1::2].mean(0))
    np.testing.assert_allclose(p.std("type")["a"], m[::2].std(0, ddof=1))
    by_length = p.std("length", n_bins=2)
    assert list(by_length.columns) == ["7–10 tokens", "11–14 tokens"]
    np.testing.assert_allclose(by_length.iloc[:, 0], m[:4].std(0, ddof=1))
    row = p.by("type").set_index("type").loc["b"]
    assert row["mean"] == pytest.approx(m[1::2].mean())
    assert row["distance_to_all"] == pytest.approx(np.abs(m[1::2].mean(0) - m.mean(0)).mean())
    np.testing.assert_allclose(p.heads()[1] - p.heads()[0], 0.02)
    with pytest.raises(ValueError, match="no sample of type"):
        p.only("c")
    with pytest.raises(ValueError, match="group by"):
        p.std("colour")


def test_explained_finds_a_type_effect_and_not_a_missing_one():
    rng = np.random.default_rng(1)
    types = ["a", "b"] * 20
    noise = 0.5 + rng.normal(0, 0.02, (40, 6))
    effect = noise + 0.05 * (np.arange(40) % 2)[:, None] * np.array(
        [1, -1, 1, -1, 1, -1]
    )  # same mean, other shape
    n_key = list(rng.integers(1, 30, 40))
    found = made(effect, types=types, n_key=n_key).explained(500).set_index("factor")
    assert found.loc["type", "p_value"] < 0.01
    assert found.loc["type", "share"] > 3 * found.loc["type", "expected"]
    assert found.loc["length", "p_value"] > 0.05
    none = made(noise, types=types, n_key=n_key).explained(500).set_index("factor")
    assert none.loc["type", "p_value"] > 0.05


def test_explained_separates_type_from_the_length_it_comes_with():
    rng = np.random.default_rng(2)
    n_key = list(range(1, 41))
    types = ["short" if n <= 20 else "dense" for n in n_key]  # type is nearly length
    m = (
        0.3 + 0.01 * np.array(n_key)[:, None] * np.ones(4) + rng.normal(0, 0.01, (40, 4))
    )  # only length matters
    table = made(m, types=types, n_key=n_key).explained(500).set_index("factor")
    assert table.loc["type", "p_value"] < 0.01  # alone, type looks like the cause
    assert table.loc["type | length", "p_value"] > 0.05
    assert table.loc["length | type", "p_value"] < 0.01


def test_explained_p_values_are_uniform_without_an_effect():
    """The test must not cry wolf: over many null data sets about 1 in 10 p-values lies under 0.1."""
    rng = np.random.default_rng(3)
    factor = np.repeat([0.0, 1.0], 10)[:, None]
    p = [stats.explained(rng.normal(size=(20, 5)), factor, n_perm=99, seed=i)["p_value"] for i in range(200)]
    assert 0.04 < np.mean(np.array(p) <= 0.1) < 0.17


def test_explained_share_is_the_r_squared_of_least_squares():
    rng = np.random.default_rng(4)
    y, x = rng.normal(size=(15, 3)), rng.normal(size=(15, 2))
    design = np.column_stack([np.ones(15), x])
    residual = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    r2 = 1 - (residual**2).sum() / ((y - y.mean(0)) ** 2).sum()
    assert stats.explained(y, x, n_perm=9)["share"] == pytest.approx(r2)
    assert np.isnan(stats.explained(y, np.ones((15, 1)), n_perm=9)["share"])  # a factor that does not vary


def test_correlation_value_and_intervals():
    rng = np.random.default_rng(5)
    depth = np.linspace(0, 1, 12)
    up = np.clip(0.2 + 0.5 * depth + rng.normal(0, 0.02, (30, 12)), 0, 1)
    down = np.clip(0.8 - 0.5 * depth + rng.normal(0, 0.02, (20, 12)), 0, 1)
    table = made(up).correlation(made(down, "understanding"))
    expected = np.corrcoef(up.mean(0), down.mean(0))[0, 1]
    assert list(table["over"]) == ["samples", "layers"]
    np.testing.assert_allclose(table["r"], expected)
    assert (table["low"] <= table["r"]).all()
    assert (table["high"] >= table["r"]).all()
    assert table["high"].max() < -0.8
    pd.testing.assert_frame_equal(table, made(up).correlation(made(down, "understanding")))  # seeded


def test_correlation_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(6)
    a, b = rng.uniform(0, 1, 10), rng.uniform(0, 1, 10)
    truth = np.corrcoef(a, b)[0, 1]
    hits = 0
    for i in range(100):
        t = stats.correlation(a + rng.normal(0, 0.3, (25, 10)), b + rng.normal(0, 0.3, (25, 10)), 300, seed=i)
        hits += t.loc[0, "low"] <= truth <= t.loc[0, "high"]
    assert 80 <= hits <= 100


def test_constant_curves_have_no_correlation():
    t = stats.correlation(np.full(8, 0.3), np.linspace(0, 1, 8))
    assert t["r"].isna().all()
    assert t["low"].isna().all()


def test_short_models_do_not_get_an_interval_of_width_zero():
    t = stats.correlation(np.array([0.1, 0.5, 0.2]), np.array([0.3, 0.1, 0.4]), block=4)
    assert t.loc[0, "low"] < t.loc[0, "high"]


@pytest.mark.parametrize("n_layers", [2, 5, 30, 36])
def test_resampling_keeps_ends_and_straight_lines(n_layers):
    line = np.linspace(0.1, 0.7, 12)
    np.testing.assert_allclose(stats.resample(line, n_layers), np.linspace(0.1, 0.7, n_layers))
    wave = np.sin(np.arange(12))
    both = stats.resample(np.stack([wave, line]), n_layers)
    assert both.shape == (2, n_layers)
    assert both[0, 0] == wave[0]
    assert both[0, -1] == wave[-1]


def test_distance_to_arrays_profiles_frames_and_seeds():
    m = np.tile(np.array([0.2, 0.4, 0.6, 0.8]), (5, 1))
    p = made(m)
    assert p.distance([0.2, 0.4, 0.6, 0.8])["distance"].item() == pytest.approx(0)
    assert p.distance(np.array([0.2, 0.8]))["distance"].item() == pytest.approx(0)  # resampled by depth
    other = made(m + 0.1, model="other")
    row = p.distance(other, seeds=[made(m), made(m + 0.02), made(m - 0.02)]).iloc[0]
    assert (row["target"], row["n_seeds"]) == ("other", 3)
    assert row["distance"] == pytest.approx(0.1)
    assert row["seed_spread"] == pytest.approx((0.02 + 0.02 + 0.04) / 3)
    assert row["uniform"] == pytest.approx(np.abs(0.25 - (m[0] + 0.1)).mean())
    frame = pd.DataFrame(
        {"model": "Emu3", "task": "generation", "layer": [1, 2, 3, 4], "intensity": m[0] + 0.05}
    )
    assert p.distance(frame)["distance"].item() == pytest.approx(0.05)
    with pytest.raises(ValueError, match="need exactly one generation curve, found 0"):
        p.distance(frame.assign(task="understanding"))
    with pytest.raises(ValueError, match="at least 2 curves"):
        p.distance(other, seeds=[p])


def test_distance_to_stage_targets_uses_the_tasks_stages_at_the_models_depth():
    m = np.tile(np.array([0.30, 0.45, 0.40, 0.22]), (5, 1))
    targets = StageTargets(
        generation=(Stage(0, 3, 0.4, 0.06), Stage(4, 7, 0.2, 0.05)),
        understanding=(Stage(0, 7, 0.9, 0.1),),
        name="mine",
    )
    row = made(m).distance(targets).iloc[0]
    assert row["target"] == "mine"
    assert row["distance"] == pytest.approx(np.mean([0.10, 0.05, 0.20, 0.02]))
    assert row["within_delta"] == 2 / 4
    assert row["uniform"] == pytest.approx(np.mean([0.15, 0.15, 0.05, 0.05]))
    other = made(m, "understanding").distance(targets).iloc[0]
    assert other["distance"] == pytest.approx(0.9 - m.mean())


def test_distance_interval_is_the_normal_one_where_all_layers_lie_on_one_side():
    """There the distance is a plain mean over samples and layers, whose standard error is known."""
    m = 0.5 + np.random.default_rng(7).normal(0, 0.05, (30, 6))
    row = made(m).distance(np.full(6, 0.3)).iloc[0]
    error = m.mean(1).std(ddof=1) / np.sqrt(30)
    assert row["distance"] == pytest.approx(m.mean() - 0.3)
    assert row["low"] == pytest.approx(row["distance"] - 1.96 * error, abs=0.4 * error)
    assert row["high"] == pytest.approx(row["distance"] + 1.96 * error, abs=0.4 * error)


def test_a_profile_refuses_what_is_no_profile():
    good = made(np.full((2, 3), 0.5)).table
    for table, message in [
        (good.drop(columns="head"), "lacks column.*head"),
        (good.iloc[:0], "without rows"),
        (pd.concat([good, good.assign(task="understanding")]), "of one task"),
        (good.assign(value=np.nan), "not finite"),
        (good.assign(value=1.5), r"outside \[0, 1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            IntensityProfile(table)
    with pytest.raises(ValueError, match="lacks some layers"):
        _ = IntensityProfile(good.iloc[2:]).matrix


def test_part_files_are_plain_json(tmp_path):
    """No pickle anywhere: a part file is readable by anyone and runs nothing."""
    with pytest.raises(KeyboardInterrupt):
        profile(
            FakeAdapter(stop_after=1), generation(4), "generation", 2, out=tmp_path / "p.csv", progress=False
        )
    header, batch = map(json.loads, (tmp_path / "p.csv.part-0.jsonl").read_text().splitlines())
    assert set(header) == {"fingerprint"}
    assert [len(row["value"]) for row in batch["samples"]] == [N_LAYERS, N_LAYERS]
