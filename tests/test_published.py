"""The published data against its files, and the re-analysis against numbers computed independently before."""

from __future__ import annotations

import csv

import numpy as np
import pandas as pd
import pytest

import minimal_aia
from minimal_aia.published import (
    FOLDER,
    before_after,
    compare_stages,
    published,
    reference_curve,
    reference_distances,
    task_correlations,
)
from minimal_aia.targets import StageTargets

DEPTHS = {
    "fig1": {"Emu3": 32, "Janus-Pro-7B": 30, "BAGEL": 28, "HunyuanImage-3.0": 32, "Qwen3-VL-8B": 36},
    "fig5": {"Emu3": 32, "Janus-Pro": 30},
}


def test_package_face():
    assert minimal_aia.published is published  # the function, not the module of the same name


@pytest.mark.parametrize("name", ["fig1", "fig4", "fig5"])
def test_curves_are_zero_based_and_whole(name):
    frame = published(name)
    keys = ["model", "task"] + (["series"] if name == "fig5" else [])
    for key, rows in frame.groupby(keys):
        n_layers = rows["n_layers"].iloc[0]
        assert rows["layer"].tolist() == list(range(n_layers)), key
        if key[-1] != "task_specific" and name in DEPTHS:
            assert n_layers == DEPTHS[name][key[0]]
    assert frame["intensity"].between(0, 1).all()
    assert frame["uncertainty"].between(0.0005, 0.001).all()


def test_first_value_is_that_of_the_files_first_layer():
    with (FOLDER / "fig1_native.csv").open(encoding="utf-8") as file:
        row = next(csv.DictReader(file))
    first = published("fig1").iloc[0]
    assert (row["layer"], first["layer"]) == ("1", 0)
    assert (row["model"], row["task"], float(row["intensity"])) == tuple(
        first[["model", "task", "intensity"]]
    )


def test_as_plotted():
    hunyuan = published("fig1", plotted=True).query("model == 'HunyuanImage-3.0'")
    assert hunyuan["layer"].tolist() == list(range(36))
    assert published("fig4", plotted=True).groupby("model").size().eq(64).all()
    with pytest.raises(ValueError, match="fig1, fig4, fig5, not for table2"):
        published("table2", plotted=True)


def test_native_and_plotted_are_the_same_curves():
    """Stretching the 32 native values back to 36 points must give the plotted ones."""
    plotted = published("fig1", plotted=True).query("model == 'HunyuanImage-3.0'")["intensity"]
    np.testing.assert_allclose(reference_curve("generation", 36), plotted, atol=3e-4)


def test_loss_curves():
    frame = published("fig3")
    assert set(frame["series"]) == {"1:1", "10:1", "50:1", "100:1"}
    flat = frame[(frame["step"] >= 1000) & frame["ntp_loss"].notna()]
    assert set(flat.query("task == 'generation'")["uncertainty"]) == {0.0003}
    assert set(flat.query("model == 'Emu3' and series == '100:1'")["uncertainty"]) == {0.003}
    assert frame[frame["step"] < 1000]["uncertainty"].isna().all()


def test_tables():
    assert dict(published("table1").itertuples(index=False))["Emu3"] == 0.13
    table2 = published("table2").set_index("method")
    assert table2.loc["Janus-Pro", "MMBench"] == 65.54
    assert pd.isna(table2.loc["Chameleon", "MMVP"])
    assert published("table3").query("section == 'Lambda'")["MMMU"].tolist() == [37.2, 40.5, 42.1, 41.3]
    stages = published("stages")
    assert stages["last_layer"].isna().sum() == 6
    assert set(stages["model"]) == {"emu3", "janus-pro", "janus-pro-authors-code"}


def test_unknown_name_and_missing_folder(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="'fig2'; choose from fig1, fig4, fig5, fig3, table1"):
        published("fig2")
    with pytest.raises(ValueError, match="neither 'generation' nor 'understanding'"):
        reference_curve("drawing")
    monkeypatch.setitem(published.__globals__, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"fig1_native\.csv: no such file; restore the folder"):
        published("fig1")


# ---- the re-analysis -----------------------------------------------------------------------------------


def test_reference_curves_equal_the_files_made_from_the_figures():
    for n_layers, name in ((30, "targets_janus_30.csv"), (32, "targets_emu3_32.csv")):
        file = pd.read_csv(FOLDER / name)
        for task, column in (
            ("generation", "generation_hunyuan"),
            ("understanding", "understanding_qwen3vl"),
        ):
            np.testing.assert_allclose(reference_curve(task, n_layers), file[column], atol=1.01e-4)


def test_stages_recomputed_equal_the_file():
    file = pd.read_csv(FOLDER / "stages.csv")
    ours = compare_stages().rename(
        columns={
            "target": "T_paper",
            "delta": "delta_paper",
            "mean_minus_target": "mean_minus_T",
        }
    )
    assert list(ours.columns) == list(file.columns)
    keys = ["table", "n_layers", "indexing", "stage", "task"]
    merged = file.merge(ours, on=keys, suffixes=("", "_ours"), validate="one_to_one", how="outer")
    assert len(merged) == len(file) == len(ours)
    for column in set(file.columns) - set(keys):  # the file is rounded to four digits
        atol = 0 if column.startswith("n") else 1.01e-4
        np.testing.assert_allclose(
            merged[f"{column}_ours"], merged[column], atol=atol, rtol=0, err_msg=column
        )


def test_deep_understanding_targets_do_not_follow_their_curve():
    """The finding: under every reading no layer from 20 to 29 lies within δ, while generation's do."""
    deep = compare_stages().query("stage in ('20-24', '25-29', '25-30')")
    counts = deep.groupby(["task", "table", "indexing"])[["n_within_delta", "n"]].sum()
    assert counts.loc["understanding", "n_within_delta"].eq(0).all()
    assert counts.loc["generation", "n_within_delta"].gt(0).all()
    means = compare_stages().query("table == 'S5' and indexing == 'l=0..L-1'")
    assert means.query("task == 'generation'")["mean"].round(2).tolist() == [0.47, 0.39, 0.31, 0.17]
    assert means.query("task == 'understanding'")["mean"].round(2).tolist() == [0.03, 0.16, 0.17, 0.10]


def test_stages_cut_from_the_reference_differ_from_the_printed_ones():
    cut = StageTargets.from_curve(
        *(reference_curve(task) for task in ("generation", "understanding")), n_stages=4, n_layers=30
    )
    ours, _ = cut.tensors("understanding")
    paper, _ = StageTargets.paper("janus-pro").tensors("understanding")
    assert (paper - ours)[25:].min() > 0.15


CORRELATIONS = {  # r, low, high, found earlier with other code and another seed
    "Emu3": (-0.32, -0.59, 0.07),
    "Janus-Pro-7B": (-0.46, -0.91, 0.36),
    "BAGEL": (-0.72, -0.81, -0.51),
}


def test_correlations():
    table = task_correlations(n_boot=5000).set_index("model")
    for model, (r, low, high) in CORRELATIONS.items():
        assert table.loc[model, "r"] == pytest.approx(r, abs=0.0051)
        assert table.loc[model, "low"] == pytest.approx(low, abs=0.03)
        assert table.loc[model, "high"] == pytest.approx(high, abs=0.06)
    assert table.loc["task-specific", "r"] == pytest.approx(-0.19, abs=0.0051)
    excludes_zero = (table["high"] < 0) | (table["low"] > 0)
    assert excludes_zero[excludes_zero].index.tolist() == ["BAGEL"]


def test_correlation_against_numpy():
    frame = (
        published("fig1").query("model == 'Emu3'").pivot(index="layer", columns="task", values="intensity")
    )
    r = np.corrcoef(frame["generation"], frame["understanding"])[0, 1]
    assert task_correlations(n_boot=10).loc[0, "r"] == pytest.approx(r)


def test_distances_to_the_task_specific_curves():
    table = reference_distances().pivot(index="model", columns="task", values="distance")
    expected = {"Emu3": (0.308, 0.145), "Janus-Pro-7B": (0.308, 0.047), "BAGEL": (0.227, 0.075)}
    for model, values in expected.items():
        assert tuple(table.loc[model]) == pytest.approx(values, abs=0.0006)


def test_before_and_after():
    table = before_after().set_index(["model", "task"])
    expected = {
        ("Emu3", "generation"): (0.308, 0.345),
        ("Emu3", "understanding"): (0.145, 0.081),
        ("Janus-Pro", "generation"): (0.308, 0.156),
        ("Janus-Pro", "understanding"): (0.047, 0.055),
    }
    for key, values in expected.items():
        assert tuple(table.loc[key, ["before", "after"]]) == pytest.approx(values, abs=0.0006)
    assert (table["change"] > 0).tolist() == [True, False, False, True]
    # Fig. 1 and Fig. 5 show the same curves without AIA: two digitisations of one thing must agree
    before = published("fig5").query("series == 'without_aia' and model == 'Emu3'")
    again = published("fig1").query("model == 'Emu3'")
    both = before.merge(again, on=["task", "layer"], suffixes=("", "_fig1"))
    assert len(both) == 64
    assert (both["intensity"] - both["intensity_fig1"]).abs().max() < 0.002
