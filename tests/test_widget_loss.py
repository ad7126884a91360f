"""The loss widgets driven through their sliders; their numbers against the formula."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from threading import Barrier, BrokenBarrierError

import numpy as np
import pytest
import torch
from PIL import Image

from minimal_aia.loss import AIALoss
from minimal_aia.targets import Stage, StageTargets
from minimal_aia.widget_loss import PenaltyWidget, explore_penalty, explore_pull, penalty, pull

TARGETS = StageTargets(
    generation=(Stage(0, 1, 0.4, 0.2), Stage(2, 3, 0.2, 0.05)),
    understanding=(Stage(0, 3, 0.1, 0.05),),
    name="mine",
)
CURVES = {
    ("a", "generation"): np.array([0.9, 0.5, 0.21, 0.0]),
    ("b", "understanding"): np.array([0.1, 0.12, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]),
}


def picture(widget) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(widget.image.value)).convert("RGB"))


def test_penalty_is_the_formula():
    value, slope = penalty(np.array([0.1, 0.35, 0.9]), 0.4, 0.1, "huber")
    assert value == pytest.approx([0.1 * 0.3 - 0.005, 0.05**2 / 2, 0.1 * 0.5 - 0.005])
    assert slope == pytest.approx([-0.1, -0.05, 0.1])
    assert penalty(0.1, 0.4, 0.1, "l2") == (pytest.approx(0.045), pytest.approx(-0.3))
    assert penalty(0.1, 0.4, 0.1, "l1") == (pytest.approx(0.3), pytest.approx(-1.0))


@pytest.mark.parametrize("kind", ["huber", "l1", "l2"])
def test_pull_takes_the_loss_apart(kind):
    curve = torch.tensor(CURVES["a", "generation"], requires_grad=True)
    loss = AIALoss(TARGETS, kind)(curve, task="generation")
    (expected,) = torch.autograd.grad(loss, curve)
    share, gradient = pull(CURVES["a", "generation"], TARGETS, "generation", kind)
    assert share.shape == gradient.shape == (4,)
    assert share.sum() == pytest.approx(loss.item(), rel=1e-6)
    assert gradient == pytest.approx(expected.numpy(), rel=1e-6)


def test_every_slider_of_the_number_moves_the_picture_and_the_text():
    widget = explore_penalty(0.1, 0.4, 0.1, 40)
    assert "<td>huber</td><td>0.0250</td><td>-0.100</td><td><b>-4.00</b>" in widget.text.value
    for name, value in {"I": 0.5, "T": 0.2, "δ": 0.5, "λ": 5}.items():
        before, said = picture(widget), widget.text.value
        widget.controls[name].value = value
        assert (picture(widget) != before).any(), name
        assert widget.text.value != said, name
    assert "<td>huber</td><td>0.0450</td><td>+0.300</td><td><b>+1.50</b>" in widget.text.value
    widget.controls["λ"].value = 0  # an empty scale must not stop it
    assert "+0.00" in widget.text.value


def test_the_curve_widget_shows_the_loss_of_the_moved_stages():
    widget = explore_pull(CURVES, TARGETS, aia_weight=40)
    widget.controls["T"].value = 0.1
    widget.controls["δ"].value = 10**-0.5
    first = widget.targets.generation[0]
    assert (first.first_layer, first.last_layer, first.target) == (0, 1, 0.5)
    assert first.delta == pytest.approx(0.2 * 10**-0.5)
    loss = AIALoss(widget.targets)(torch.tensor(CURVES["a", "generation"]), task="generation").item()
    assert f"huber loss <b>{loss:.5f}</b>, λ · loss <b>{40 * loss:.3f}</b>" in widget.text.value
    before = picture(widget)
    widget.controls["curve"].value = ("b", "understanding")
    assert widget.targets.n_layers == 8, "stages are brought to the curve's depth"
    assert (picture(widget) != before).any()
    widget.controls["T"].value = -0.4
    assert widget.targets.understanding[0].target == 0, "a target stays a share"
    widget.controls["kind"].value = "l1"
    assert f"l1 loss <b>{CURVES['b', 'understanding'].mean():.5f}" in widget.text.value


def test_a_curve_on_its_targets_has_no_arrows_and_no_error():
    curves = {("a", "understanding"): np.full(4, 0.1)}
    assert "huber loss <b>0.00000</b>" in explore_pull(curves, TARGETS).text.value


def test_no_curve_is_an_error():
    with pytest.raises(ValueError, match="at least one curve"):
        explore_pull({})


def test_a_static_copy_stands_below_the_widget(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    widget = explore_penalty()
    widget._ipython_display_()
    assert shown[0]["application/vnd.jupyter.widget-view+json"]["model_id"] == widget.model_id
    assert base64.b64decode(shown[1]["image/png"]) == widget.image.value
    assert picture(widget).std() > 5  # a drawing, not an empty page


def test_callbacks_from_two_threads_draw_one_after_the_other(monkeypatch):
    """JupyterLab sends the messages of different controls to different threads of the kernel."""
    draw, meeting, met = PenaltyWidget._draw, Barrier(2), []

    def waiting(self):
        with suppress(BrokenBarrierError):
            met.append(meeting.wait(1))
        return draw(self)

    monkeypatch.setattr(PenaltyWidget, "_draw", waiting)
    widget = explore_penalty(0.1, 0.4, 0.1, 40)
    moves = [(widget.controls["I"], 0.5), (widget.controls["δ"], 0.3)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda move: setattr(move[0], "value", move[1]), moves))  # raises what they raise
    assert not met
    assert widget.image.value == explore_penalty(0.5, 0.4, 0.3, 40).image.value


def test_the_layer_stands_in_the_picture_of_the_penalty():
    widget = explore_penalty(0.1, 0.4, 0.1, 40)
    assert 40 * penalty(0.1, 0.4, 0.1, "huber")[0] < widget.figure.axes[0].get_ylim()[1]
    assert 40 * penalty(0.1, 0.4, 0.1, "l2")[0] < widget.figure.axes[0].get_ylim()[1]
