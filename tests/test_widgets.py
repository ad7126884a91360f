"""The explorer driven through its controls' traits, as a browser would; no browser and no kernel needed."""

from __future__ import annotations

import base64
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from threading import Barrier, BrokenBarrierError

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from profile_fakes import FakeAdapter

import minimal_aia as aia
from minimal_aia.loss import AIALoss, aia_loss
from minimal_aia.profiles import IntensityProfile
from minimal_aia.targets import Stage, StageTargets
from minimal_aia.widget_figure import LiveFigure
from minimal_aia.widgets import Explorer, explore


def made(model: str, task: str, n_layers: int = 10, n_samples: int = 6, seed: int = 0) -> IntensityProfile:
    rng = np.random.default_rng(seed)
    value = rng.uniform(0.1, 0.6, (n_samples, n_layers, 2))
    index = pd.MultiIndex.from_product(
        [range(n_samples), range(n_layers), range(2)], names=["i", "layer", "head"]
    )
    table = pd.DataFrame({"value": value.reshape(-1)}, index=index).reset_index()
    table["type"] = table["i"].map(lambda i: ["short", "dense"][i % 2])
    table["sample"] = "s:" + table.pop("i").astype(str)
    return IntensityProfile(table.assign(model=model, task=task, n_query=6, n_key=3, uniform=0.3))


def published(n_layers: int = 8) -> pd.DataFrame:
    rows = [
        ("Emu3", task, layer, base + 0.01 * layer)
        for task, base in (("generation", 0.5), ("understanding", 0.1))
        for layer in range(n_layers)
    ]
    return pd.DataFrame(rows, columns=["model", "task", "layer", "intensity"])


TARGETS = StageTargets(
    generation=(Stage(0, 3, 0.4, 0.2), Stage(4, 9, 0.2, 0.05)),
    understanding=(Stage(0, 5, 0.1, 0.05), Stage(6, 7, 0.3, 0.05), Stage(8, 9, 0.2, 0.1)),
    name="mine",
)


@pytest.fixture
def explorer() -> Explorer:
    sources = [
        made("lab/a", "generation"),
        made("lab/a", "understanding", seed=1),
        made("lab/b", "generation", seed=2),
    ]
    return explore([*sources, published()], TARGETS)


def picture(explorer: Explorer) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(explorer.image.value)).convert("RGB")).astype(int)


def expected_loss(profile: IntensityProfile, targets: StageTargets) -> float:
    """From the table by hand, through loss.py."""
    value = profile.table.groupby(["layer", "sample"])["value"].mean().unstack()
    t, delta = targets.tensors(profile.task, dtype=torch.float64)
    return float(aia_loss(torch.tensor(value.to_numpy()), t, delta))


def test_the_loss_shown_is_loss_pys_and_follows_every_slider(explorer):
    profile = made("lab/a", "generation")
    moves = [
        (explorer.stages.heights[0], 0.55, lambda s: (Stage(0, 3, 0.55, 0.2), s[1])),
        (explorer.stages.deltas[1], 0.3, lambda s: (s[0], Stage(4, 9, 0.2, 0.3))),
        (
            explorer.stages.ends[0],
            6,
            lambda s: (Stage(0, 5, s[0].target, s[0].delta), Stage(6, 9, s[1].target, s[1].delta)),
        ),
    ]
    stages = TARGETS.generation
    for slider, value, after in [(None, None, lambda s: s), *moves]:
        if slider is not None:
            slider.value = value
        stages = after(stages)
        targets = StageTargets(generation=stages, understanding=TARGETS.understanding)
        assert explorer.targets.generation == stages
        expected = expected_loss(profile, targets)
        assert explorer.losses["lab/a", "generation"] == pytest.approx(expected, rel=1e-12)
        assert f"lab/a, generation</td><td><b>{expected:.5f}</b>" in explorer.loss.value
    assert explorer.targets.name == "mine (edited)"
    assert explorer.targets.understanding == TARGETS.understanding


def test_published_curves_have_the_loss_of_their_mean_at_their_own_depth(explorer):
    explorer.models.value = ("Emu3 (published)",)
    curve = torch.tensor(published().query("task == 'generation'")["intensity"].to_numpy())
    expected = float(AIALoss(TARGETS.for_layers(8))(curve, task="generation"))
    assert explorer.losses["Emu3 (published)", "generation"] == pytest.approx(expected, rel=1e-12)
    assert set(explorer.losses) == {("Emu3 (published)", "generation"), ("Emu3 (published)", "understanding")}


def test_stages_are_drawn_where_the_sliders_say_even_beside_a_deeper_model():
    explorer = explore([made("lab/a", "generation"), published(16)], TARGETS)
    explorer.models.value = explorer.models.options
    boxes = [box for box, _ in explorer._figure.stages]
    assert boxes[0].get_x() + boxes[0].get_width() == explorer.stages.ends[0].value + 0.5
    assert max(box.get_x() + box.get_width() for box in boxes) == 10.5


def test_a_drag_moves_only_the_stages(explorer):
    before = picture(explorer)
    explorer.stages.heights[0].value = 0.35
    changed = (picture(explorer) != before).any(-1)
    assert changed.any()
    columns = np.flatnonzero(changed.any(0))
    (box, _), (other, _) = explorer._figure.stages[:2]
    left, right = (
        box.axes.transData.transform((x, 0))[0] for x in (box.get_x(), box.get_x() + box.get_width())
    )
    assert left - 3 <= columns.min() and columns.max() <= right + 3  # noqa: PT018 - one interval
    assert box.get_y() == pytest.approx(0.15)
    assert other.get_y() == pytest.approx(0.15)


def test_a_drag_gives_the_same_picture_as_drawing_anew(explorer):
    explorer.stages.heights[1].value = 0.33
    explorer.stages.ends[0].value = 5
    dragged = picture(explorer)
    explorer._redraw()
    assert np.abs(picture(explorer) - dragged).mean() < 0.05


def test_stages_that_leave_the_axes_widen_them(explorer):
    assert explorer._figure.figure.axes[0].get_ylim()[1] < 0.9
    explorer.stages.heights[0].value = 0.95
    assert explorer._figure.figure.axes[0].get_ylim() == (0, 1)
    assert explorer.targets.generation[0].target == 0.95


def test_a_stage_end_stops_at_its_neighbours(explorer):
    explorer.stages.task.value = "understanding"
    first, second, last = explorer.stages.ends
    assert last.disabled
    first.value = 9
    assert first.value == 7  # stage 2 keeps layer 8 (from 1)
    second.value = 3
    assert second.value == 8
    assert [(s.first_layer, s.last_layer) for s in explorer.targets.understanding] == [(0, 6), (7, 7), (8, 9)]


def test_models_tasks_and_kinds_choose_the_curves(explorer):
    assert set(explorer.curves["label"]) == {"lab/a", "lab/b"}
    explorer.models.value = ("lab/a", "Emu3 (published)")
    assert set(zip(explorer.curves["label"], explorer.curves["task"], strict=True)) == {
        (m, t) for m in ("lab/a", "Emu3 (published)") for t in ("generation", "understanding")
    }
    explorer.task.value = "understanding"
    assert set(explorer.curves["task"]) == {"understanding"}
    assert explorer.stages.task.value == "understanding"  # the sliders follow
    assert set(explorer.losses) == {("lab/a", "understanding"), ("Emu3 (published)", "understanding")}
    explorer.kind.value = "published"
    assert explorer.models.options == ("Emu3 (published)",)
    assert set(explorer.curves["label"]) == {"Emu3 (published)"}
    explorer.kind.value = "measured"
    assert explorer.models.options == ("lab/a", "lab/b")


def test_the_type_filter_changes_curve_and_loss(explorer):
    profile = made("lab/a", "generation")
    explorer.type.value = "dense"
    mine = explorer.curves.query("label == 'lab/a' and task == 'generation'")
    np.testing.assert_allclose(mine["mean"], profile.curve("dense")["mean"])
    expected = expected_loss(profile.only("dense"), TARGETS)
    assert explorer.losses["lab/a", "generation"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("control", "value"),
    [
        ("band", False),
        ("uniform", False),
        ("boxes", False),
        ("axis", "depth"),
        ("view", "heads"),
        ("task", "generation"),
    ],
)
def test_every_choice_changes_the_picture(control, value, explorer):
    before = picture(explorer)
    getattr(explorer, control).value = value
    after = picture(explorer)
    assert before.shape == after.shape
    assert (before != after).any()


def test_what_the_heads_view_does_not_show_cannot_be_chosen_there(explorer):
    controls = (explorer.axis, explorer.band, explorer.uniform, explorer.boxes)
    explorer.view.value = "heads"
    assert all(control.disabled for control in controls)
    explorer.view.value = "curves"
    assert not any(control.disabled for control in controls)


def test_heads_show_the_chosen_profile_and_type(explorer):
    explorer.view.value = "heads"
    explorer.type.value = "short"
    explorer.task.value = "generation"
    mesh = explorer._figure.figure.axes[0].collections[0]
    heads = made("lab/a", "generation").heads("short").to_numpy().T
    np.testing.assert_allclose(np.asarray(mesh.get_array()).reshape(heads.shape), heads)
    explorer.stages.heights[0].value = 0.5  # the loss stays live
    targets = StageTargets(generation=(Stage(0, 3, 0.5, 0.2), TARGETS.generation[1]))
    expected = expected_loss(made("lab/a", "generation").only("short"), targets)
    assert explorer.losses["lab/a", "generation"] == pytest.approx(expected, rel=1e-12)


def test_presets_and_cuts_replace_the_stages(explorer):
    explorer.stages.preset.value = "emu3"
    assert explorer.targets == StageTargets.paper("emu3", 10)
    assert len(explorer.stages.ends) == len(explorer.targets.generation)
    explorer.stages.preset.value = "cut 3"
    curves = {
        t: made("lab/a", t, seed=i).matrix.mean() for i, t in enumerate(("generation", "understanding"))
    }
    expected = StageTargets.from_curve(**curves, n_stages=3)
    for task in ("generation", "understanding"):
        found, wanted = getattr(explorer.targets, task), getattr(expected, task)
        assert [(s.first_layer, s.last_layer) for s in found] == [
            (s.first_layer, s.last_layer) for s in wanted
        ]
        torch.testing.assert_close(explorer.targets.tensors(task), expected.tensors(task))
    cut = explorer.targets.generation
    explorer.stages.heights[0].value = 0.9
    assert explorer.targets.generation[1:] == cut[1:]  # exact, not rounded to the slider's step
    explorer.stages.preset.value = "given"
    assert explorer.targets == TARGETS


def test_a_raw_curve_has_too_many_stages_for_sliders_but_a_loss():
    profile = made("lab/a", "generation", n_layers=12)
    targets = StageTargets.from_profile(profile, n_stages=None)
    explorer = explore(profile, targets)
    assert "12 stages are too many" in explorer.stages.message.value
    assert explorer.losses["lab/a", "generation"] == pytest.approx(expected_loss(profile, targets))
    explorer.stages.preset.value = "cut 3"
    assert len(explorer.stages.rows.children) == 1 + 3


def test_exports_are_what_is_shown(explorer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    explorer.stages.heights[0].value = 0.45
    before = picture(explorer)
    for button in (explorer.png, explorer.csv, explorer.yaml):
        button.click()
        name = f"aia_explore.{button.description.lower()}"
        assert name in explorer.status.value
        assert (tmp_path / name).is_file()
    assert StageTargets.load(tmp_path / "aia_explore.yaml") == explorer.targets
    back = pd.read_csv(tmp_path / "aia_explore.csv")
    np.testing.assert_allclose(back["mean"], explorer.curves["mean"])
    assert back["layer"].min() == 0
    with Image.open(tmp_path / "aia_explore.png") as image:
        assert image.width > before.shape[1]  # 150 dots an inch
    explorer.stages.heights[0].value = 0.46  # and dragging goes on
    explorer.stages.heights[0].value = 0.45
    assert np.abs(picture(explorer) - before).mean() < 0.5


@pytest.mark.skipif(
    os.geteuid() == 0 and not Path("/proc").is_dir(), reason="nowhere a file cannot be written"
)
def test_an_export_that_fails_says_so(explorer):
    explorer.name.value = "/proc/no/such/folder/x"
    explorer.yaml.click()
    assert "could not write" in explorer.status.value


def test_displaying_adds_a_static_picture(explorer, monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda data, raw: shown.append(data))
    explorer._ipython_display_()
    assert set(shown[0]) == {"application/vnd.jupyter.widget-view+json", "text/plain"}
    assert shown[0]["application/vnd.jupyter.widget-view+json"]["model_id"] == explorer.model_id
    png = base64.b64decode(shown[1]["image/png"])
    assert Image.open(BytesIO(png)).format == "PNG"
    assert 'class="aia-static"' in shown[2]["text/html"]  # what it hides, tests/browser sees


def test_what_a_browser_sends_back_on_its_own_is_no_move(explorer):
    """A slider rounds to its steps: 0.1 comes back as 0.0999…, targets cut from curves with two decimals."""
    exact = replace(TARGETS, generation=(Stage(0, 3, 0.4537, 0.1), *TARGETS.generation[1:]))
    explorer.stages.set_targets(exact)
    explorer.stages.heights[0].value = 0.45
    explorer.stages.deltas[0].value = 0.09999999999999999
    assert explorer.targets is exact
    explorer.stages.heights[0].value = 0.46
    assert explorer.targets.generation[0] == Stage(0, 3, 0.46, 0.1)
    explorer.stages.heights[0].value = 0.45
    assert explorer.targets.generation[0].target == 0.45
    explorer.stages.heights[0].value = 0.35000000000000003
    assert explorer.targets.generation[0].target == 0.35


def test_every_control_has_a_label_or_a_tooltip(explorer):
    import ipywidgets as W

    def walk(widget):
        yield widget
        for child in getattr(widget, "children", ()):
            yield from walk(child)

    controls = [
        w
        for w in walk(explorer)
        if isinstance(w, (W.ValueWidget, W.Button)) and not isinstance(w, (W.HTML, W.Image))
    ]
    assert len(controls) > 15
    for control in controls:
        assert control.description
        assert control.tooltip or getattr(control, "tooltips", None)


def test_it_never_runs_a_model(monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *a, **k: pytest.fail("a module was called"))
    monkeypatch.setattr(AIALoss, "__call__", AIALoss.forward)  # the loss itself is a module
    monkeypatch.setattr(FakeAdapter, "forward", lambda *a: pytest.fail("a model ran"))
    explorer = aia.explore([made("lab/a", "generation"), published()], TARGETS)
    explorer.stages.heights[0].value = 0.5
    explorer.view.value = "heads"


def test_wrong_sources_are_refused():
    with pytest.raises(ValueError, match="nothing to explore"):
        explore([])
    with pytest.raises(ValueError, match="two profiles of lab/a, generation"):
        explore([made("lab/a", "generation"), made("lab/a", "generation")])
    with pytest.raises(TypeError, match="got int"):
        explore(3)


def test_published_curves_alone_start_from_table_s5():
    explorer = explore(published(30))
    assert explorer.targets == StageTargets.paper("janus-pro")
    assert explorer.kind.options == ("published",)
    explorer.view.value = "heads"  # says that heads are unknown instead of failing
    assert explorer.image.value


def test_callbacks_from_two_threads_draw_one_after_the_other(monkeypatch, explorer):
    """JupyterLab sends the messages of different controls to different threads of the kernel."""
    draw, meeting, met = LiveFigure._finish, Barrier(2), []

    def waiting(self):
        with suppress(BrokenBarrierError):
            met.append(meeting.wait(1))
        return draw(self)

    monkeypatch.setattr(LiveFigure, "_finish", waiting)
    moves = [(explorer.axis, "depth"), (explorer.band, False)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda move: setattr(move[0], "value", move[1]), moves))  # raises what they raise
    assert not met
