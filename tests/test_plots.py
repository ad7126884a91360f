"""What the figures draw, read back from their artists: values, colours, axes, stages. Not their looks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.collections import QuadMesh
from matplotlib.patches import Rectangle

sys.path.insert(0, str(Path(__file__).parent))
from profile_fakes import FakeAdapter, generation, understanding

from minimal_aia import plots
from minimal_aia.curves import as_curves
from minimal_aia.profiles import profile
from minimal_aia.targets import StageTargets


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def profiles(tmp_path_factory):
    picture = tmp_path_factory.mktemp("pictures") / "p.png"
    picture.write_bytes(b"pixels")
    return (
        profile(FakeAdapter(), generation(6), "generation", progress=False),
        profile(FakeAdapter(), understanding(picture, 6), "understanding", progress=False),
    )


@pytest.fixture
def frame():
    """Two models of different depth, layers counted from 1, as the published files are."""
    rows = [
        (model, task, layer, base + 0.01 * layer)
        for model, n in (("deep", 6), ("flat", 4))
        for task, base in (("generation", 0.5), ("understanding", 0.1))
        for layer in range(1, n + 1)
    ]
    return pd.DataFrame(rows, columns=["model", "task", "layer", "intensity"])


def lines(ax):
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}


def test_curves_are_the_profiles_means_on_a_layer_axis_from_1(profiles):
    ax = plots.plot_curves(*profiles)
    for p in profiles:
        line = lines(ax)[f"fake/tiny, {p.task}"]
        np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
        np.testing.assert_allclose(line.get_ydata(), p.matrix.mean())
        assert line.get_color() == plots.COLOURS[p.task]
        flat = lines(ax)[f"flat attention, {p.task}"]
        assert set(flat.get_ydata()) == {p.samples["uniform"].mean()}
        assert flat.get_linestyle() == ":"
    assert "from 1" in ax.get_xlabel()
    assert len(ax.collections) == 2  # the bands
    low, high = (f(ax.collections[0].get_paths()[0].vertices[:, 1]) for f in (min, max))
    curve = profiles[0].curve()
    assert high == pytest.approx(min((curve["mean"] + curve["std"]).max(), 1))
    assert low == pytest.approx((curve["mean"] - curve["std"]).min())


def test_tasks_differ_in_colour_line_and_marker():
    for look in (plots.COLOURS, plots.LINES, plots.MARKERS):
        assert look["generation"] != look["understanding"]
    red, green, blue = matplotlib.colors.to_rgb(plots.COLOURS["generation"])
    assert blue > max(red, green)
    red, green, blue = matplotlib.colors.to_rgb(plots.COLOURS["understanding"])
    assert red > max(blue, green)


def test_published_frames_overlay_by_depth_and_have_no_band(profiles, frame):
    ax = plots.plot_curves(profiles[0], frame)
    found = lines(ax)
    assert {"deep, generation", "flat, understanding", "fake/tiny, generation"} <= set(found)
    assert ax.get_xlabel() == "relative depth"
    for label, n in (("deep, generation", 6), ("flat, generation", 4)):
        np.testing.assert_allclose(found[label].get_xdata(), np.linspace(0, 1, n))
    np.testing.assert_allclose(found["flat, generation"].get_ydata(), 0.5 + 0.01 * np.arange(1, 5))
    assert len(ax.collections) == 1
    blues = [
        line.get_color()
        for label, line in found.items()
        if label.endswith("generation") and "flat att" not in label
    ]
    assert len(set(blues)) == 3  # three models of one task can be told apart


def test_options_switch_parts_off(profiles):
    ax = plots.plot_curves(*profiles, band=False, uniform=False, legend=False, axis="depth", title="T")
    assert not ax.collections
    assert len(ax.lines) == 2
    assert ax.get_legend() is None
    assert ax.get_title() == "T"
    assert max(ax.lines[0].get_xdata()) == 1
    with pytest.raises(ValueError, match="axis is 'layers'"):
        plots.plot_curves(profiles[0], axis="layers")


def test_no_legend_covers_curves_and_no_tick_is_a_layer_that_is_not_there(profiles, frame):
    axes = [plots.plot_curves(*profiles), *plots.plot_panels(frame).flat]
    for ax in axes:
        ax.figure.canvas.draw()
        legend = ax.get_legend() or ax.figure.legends[0]
        assert not legend.get_window_extent().overlaps(ax.get_window_extent())
        n_layers = max(len(line.get_xdata()) for line in ax.lines)
        assert ax.get_xlim() == (0.5, n_layers + 0.5)


def test_models_of_one_task_differ_in_their_markers(profiles):
    ax = plots.plot_curves(*(profiles[0].curve().assign(model=name) for name in "abc"), uniform=False)
    assert len({line.get_fillstyle() for line in ax.lines}) == 3


def test_stage_boxes_span_their_layers_and_t_plus_minus_delta():
    targets = StageTargets.paper("janus-pro")
    ax = plots.plot_stages(targets)
    boxes = [p for p in ax.patches if isinstance(p, Rectangle)]
    expected = [s for task in plots.TASKS for s in getattr(targets, task)]
    assert len(boxes) == len(expected) == 8
    for box, stage in zip(boxes, expected, strict=True):
        assert (
            box.get_x() == stage.first_layer + 0.5
        )  # layer 0 is drawn at 1, its stage begins half a layer before
        assert box.get_x() + box.get_width() == stage.last_layer + 1.5
        assert box.get_y() == pytest.approx(stage.target - stage.delta)
        assert box.get_height() == pytest.approx(2 * stage.delta)


def test_stages_are_rescaled_to_the_curves_depth(profiles):
    ax = plots.plot_curves(*profiles, targets=StageTargets.paper("janus-pro"))
    edges = [box.get_x() + box.get_width() for box in ax.patches]
    assert max(edges) == 3.5


def test_panels_hold_one_model_each_and_share_a_scale_that_shows_all(frame):
    grid = plots.plot_panels(frame, columns=2)
    assert [ax.get_title() for ax in grid.flat] == ["deep", "flat"]
    assert [len(ax.lines) for ax in grid.flat] == [2, 2]
    top = frame["intensity"].max()
    assert all(ax.get_ylim()[1] >= top for ax in grid.flat)


def test_before_after_has_a_panel_a_task(profiles, frame):
    after = [p.curve().assign(mean=lambda t: t["mean"] * 0.5) for p in profiles]
    reference = frame[frame["model"] == "deep"]
    axes = plots.plot_before_after(list(profiles), after, reference, StageTargets.paper("emu3"))
    assert [ax.get_title() for ax in axes] == list(plots.TASKS)
    for ax, p in zip(axes, profiles, strict=True):
        found = lines(ax)
        assert set(found) == {"deep (reference)", "before", "after"}
        np.testing.assert_allclose(found["after"].get_ydata(), 0.5 * found["before"].get_ydata())
        np.testing.assert_allclose(found["before"].get_ydata(), p.matrix.mean())
        assert found["before"].get_linestyle() != found["after"].get_linestyle()
    with pytest.raises(ValueError, match="`after` has 0 understanding curves"):
        plots.plot_before_after(list(profiles), after[:1])


def test_heads_heat_map_shows_every_head_of_every_layer(profiles):
    ax = plots.plot_heads(profiles[0])
    mesh = next(c for c in ax.collections if isinstance(c, QuadMesh))
    np.testing.assert_allclose(np.asarray(mesh.get_array()).reshape(4, 3), profiles[0].heads().to_numpy().T)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "2", "3"]


def test_std_by_type(profiles):
    ax = plots.plot_std(profiles[0], by="type")
    table = profiles[0].std("type")
    for name in table:
        np.testing.assert_allclose(lines(ax)[f"fake/tiny, generation, {name}"].get_ydata(), table[name])


def test_as_curves_accepts_what_users_have_and_names_what_it_cannot(profiles, frame):
    both = as_curves([profiles[0], frame, profiles[1].curve()])
    assert list(dict.fromkeys(both["label"])) == ["fake/tiny", "deep", "flat"]
    assert both.groupby(["label", "task"])["layer"].min().eq(0).all()
    zero_based = frame.assign(layer=frame["layer"] - 1)
    pd.testing.assert_frame_equal(as_curves(zero_based), as_curves(frame))
    shuffled = frame.sample(frac=1, random_state=0)
    one = as_curves(shuffled).query("label == 'deep' and task == 'generation'")
    np.testing.assert_allclose(one["mean"], 0.5 + 0.01 * np.arange(1, 7))
    series = frame.assign(series=["with_aia"] * len(frame))
    assert "deep with_aia" in set(as_curves(series)["label"])
    for bad, error, message in [
        (frame.drop(columns="task"), ValueError, "lacks column.*task"),
        (pd.concat([frame, frame]), ValueError, "two values for layer"),
        (3.0, TypeError, "got float"),
        ([], ValueError, "empty list"),
        ([profiles[0], profiles[0].curve()], ValueError, "two generation curves are called 'fake/tiny'"),
    ]:
        with pytest.raises(error, match=message):
            as_curves(bad)


def test_nothing_is_shown(profiles, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda *a, **k: pytest.fail("plt.show was called"))
    plots.plot_curves(*profiles)
    plots.plot_heads(profiles[0])


def test_importing_the_package_imports_neither_matplotlib_nor_pandas():
    code = "import sys, minimal_aia; print({'matplotlib', 'pandas', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_style_gives_back_its_settings_and_no_others():
    """Jupyter turns `interactive` on when the first figure is made: if undone, no later figure shows."""
    try:
        with plt.rc_context({"font.size": 3, "axes.grid": False}):
            with plots.style():
                assert (plt.rcParams["font.size"], plt.rcParams["axes.grid"]) == (10, True)
                plt.ion()
            assert (plt.rcParams["font.size"], plt.rcParams["axes.grid"]) == (3, False)
            assert plt.isinteractive()
    finally:
        plt.ioff()
