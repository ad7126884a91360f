"""Two small widgets on the loss: one number under three penalties, and the pull on every layer of a curve.

They compute Eq. 2 on small arrays and draw; no model runs. Plain ipywidgets and a PNG, with a static copy
below for readers of the saved notebook.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from io import BytesIO
from typing import Any

import ipywidgets as W
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from minimal_aia import plots
from minimal_aia.loss import Kind, aia_loss
from minimal_aia.targets import StageTargets
from minimal_aia.widget_static import display_with_copy, one_at_a_time

KINDS: tuple[Kind, ...] = ("huber", "l2", "l1")
LOOKS = {"huber": ("#2b2b2b", "-", 2.4), "l2": ("#4c9f70", "--", 1.6), "l1": ("#b07aa1", ":", 1.8)}


def penalty(
    intensity: float | np.ndarray, target: float, delta: float, kind: Kind
) -> tuple[np.ndarray, np.ndarray]:
    """Eq. 2 of every number on its own: (value, slope), each in the shape of `intensity`."""
    x = torch.tensor(np.atleast_1d(intensity), dtype=torch.float64, requires_grad=True)
    t, d = (torch.full((1,), v, dtype=torch.float64) for v in (target, delta))
    values = torch.stack([aia_loss(one[None], t, d, kind) for one in x])
    (slopes,) = torch.autograd.grad(values.sum(), x)
    shape = np.shape(intensity)
    return values.detach().numpy().reshape(shape), slopes.numpy().reshape(shape)


def pull(
    curve: np.ndarray, targets: StageTargets, task: str, kind: Kind = "huber"
) -> tuple[np.ndarray, np.ndarray]:
    """What each layer [L] adds to Eq. 2, and dL/dI of each layer: (share [L], gradient [L])."""
    intensity = torch.tensor(np.asarray(curve), dtype=torch.float64, requires_grad=True)
    t, d = targets.tensors(task, len(intensity), dtype=torch.float64)
    parts = torch.stack([aia_loss(intensity[l, None], t[l, None], d[l, None], kind) for l in range(len(t))])
    (gradient,) = torch.autograd.grad(parts.mean(), intensity)
    return parts.detach().numpy() / len(t), gradient.numpy()


class _LossWidget(W.VBox):
    """Controls, a picture, a text. Subclasses fill `controls` and write `_draw`."""

    def __init__(self, controls: Mapping[str, Any], size: tuple[float, float], columns: int = 2) -> None:
        self.controls = dict(controls)
        with plots.style():
            self.figure = Figure(figsize=size, dpi=100, layout="constrained")
        FigureCanvasAgg(self.figure)
        self.image = W.Image(format="png", layout={"max_width": "100%"})
        self.text = W.HTML()
        items = list(self.controls.values())
        wrap = {"flex_flow": "row wrap"}  # in a narrow window below each other, not cut off
        rows = [W.HBox(items[i : i + columns], layout=wrap) for i in range(0, len(items), columns)]
        super().__init__([*rows, self.image, self.text])
        for control in items:
            control.observe(lambda _: self.redraw(), "value")
        self.redraw()

    @one_at_a_time
    def redraw(self) -> None:
        self.figure.clear()
        with plots.style():
            self.text.value = self._draw()
        out = BytesIO()
        self.figure.savefig(out, format="png")
        self.image.value = out.getvalue()

    def _draw(self) -> str:
        """Fill `self.figure`; -> the HTML below it."""
        raise NotImplementedError

    def _ipython_display_(self) -> None:
        hint = "Loss widget: run this cell to move the sliders; its picture is below."
        display_with_copy(self, self.image.value, "Loss widget", hint)


class PenaltyWidget(_LossWidget):
    """One intensity I against one target: values and slopes of Huber, L2 and L1. See `explore_penalty`."""

    def __init__(self, intensity: float, target: float, delta: float, aia_weight: float) -> None:
        controls = {
            "I": _slider("I", intensity, 0, 1, 0.01, "the intensity of a layer"),
            "T": _slider("T", target, 0, 1, 0.01, "its target"),
            "δ": _slider("δ", delta, 0.01, 1, 0.01, "Huber turns linear where |I − T| exceeds δ"),
            "λ": _slider("λ", aia_weight, 0, 100, 1, "weight of the AIA loss in Eq. 3"),
        }
        super().__init__(controls, (8.4, 3.2))

    def _draw(self) -> str:
        i, t, d, weight = (self.controls[name].value for name in ("I", "T", "δ", "λ"))
        grid = np.linspace(0, 1, 101)
        left, right = self.figure.subplots(1, 2)
        rows = []
        for kind in KINDS:
            colour, line, width = LOOKS[kind]
            value, slope = penalty(grid, t, d, kind)
            left.plot(grid, weight * value, color=colour, linestyle=line, lw=width, label=kind)
            right.plot(grid, weight * slope, color=colour, linestyle=line, lw=width)
            (v,), (s,) = penalty(np.array([i]), t, d, kind)
            left.plot([i], [weight * v], "o", color=colour)
            right.plot([i], [weight * s], "o", color=colour)
            rows.append((kind, v, s, weight * s))
        for ax, title in ((left, "λ · penalty"), (right, "λ · slope: the pull on I")):
            ax.axvspan(max(t - d, 0), min(t + d, 1), color="0.85", alpha=0.6, lw=0, zorder=0)
            ax.axvline(t, color="0.5", lw=1)
            ax.set(xlabel="intensity I", title=title, xlim=(0, 1))
        (top,) = penalty(np.array([max(t, 1 - t)]), 0.0, d, "huber")[0]  # as far from T as it gets
        left.set_ylim(0, max(weight, 1e-9) * max(1.6 * top, 0.02))  # L1 leaves the picture: the others matter
        limit = max(weight, 1e-9) * max(1.0, d) * 1.1
        right.set_ylim(-limit, limit)
        left.legend(loc="best")
        cells = "".join(
            f"<tr><td>{kind}</td><td>{v:.4f}</td><td>{s:+.3f}</td><td><b>{ws:+.2f}</b></td></tr>"
            for kind, v, s, ws in rows
        )
        return f"<table><tr><th></th><th>penalty</th><th>slope</th><th>λ · slope</th></tr>{cells}</table>"


class PullWidget(_LossWidget):
    """A layer curve, its stages, and how hard the loss pulls at each layer. See `explore_pull`."""

    def __init__(
        self, curves: Mapping[tuple[str, str], np.ndarray], targets: StageTargets, aia_weight: float
    ) -> None:
        if not curves:
            raise ValueError("nothing to explore: give at least one curve")
        self.curves = {key: np.asarray(curve, dtype=float) for key, curve in curves.items()}
        self.given = targets
        names = [(f"{name}, {task}", (name, task)) for name, task in self.curves]
        controls = {
            "curve": W.Dropdown(options=names, description="curve", tooltip="which layer curve"),
            "kind": W.Dropdown(
                options=KINDS, description="penalty", tooltip="Huber is Eq. 2; L2, L1: ablations"
            ),
            "T": _slider("T +", 0.0, -0.4, 0.4, 0.01, "move every target up or down"),
            "δ": W.FloatLogSlider(1.0, min=-2, max=1, step=0.05, description="δ ×", tooltip="scale every δ"),
            "λ": _slider("λ", aia_weight, 0, 100, 1, "weight of the AIA loss in Eq. 3"),
        }
        super().__init__(controls, (8.4, 4.6))

    @property
    def targets(self) -> StageTargets:
        """The stages as the sliders have them, for the depth of the chosen curve."""
        fitted = self.given.for_layers(len(self.curves[self.controls["curve"].value]))
        shift, factor = self.controls["T"].value, self.controls["δ"].value
        tasks = {
            task: tuple(
                replace(s, target=float(np.clip(s.target + shift, 0, 1)), delta=s.delta * factor)
                for s in getattr(fitted, task)
            )
            for task in plots.TASKS
        }
        return StageTargets(**tasks, name=self.given.name)

    def _draw(self) -> str:
        key, kind, weight = (self.controls[name].value for name in ("curve", "kind", "λ"))
        curve, task, targets = self.curves[key], key[1], self.targets
        share, gradient = pull(curve, targets, task, kind)
        top, bottom = self.figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        draw_pull(top, curve, targets, task, gradient)
        top.set_xlabel("")
        x = np.arange(len(curve)) + 1
        bottom.bar(x, weight * share, color=plots.COLOURS[task], alpha=0.7)
        bottom.set(xlabel="layer (from 1)", ylabel="λ · loss of a layer")
        bottom.grid(axis="x", visible=False)
        return (
            f"{kind} loss <b>{share.sum():.5f}</b>, λ · loss <b>{weight * share.sum():.3f}</b>, "
            f"norm of λ · dL/dI <b>{weight * np.linalg.norm(gradient):.3f}</b>"
        )


def draw_pull(ax: Any, curve: np.ndarray, targets: StageTargets, task: str, gradient: np.ndarray) -> None:
    """A curve with its stages, and an arrow a layer along −dL/dI, the longest 0.15 high."""
    x = np.arange(len(curve)) + 1
    ax.plot(x, curve, color=plots.COLOURS[task], linestyle=plots.LINES[task], lw=1.6, label=f"{task} curve")
    plots.draw_stages(ax, targets, [task], "layer")
    longest = np.abs(gradient).max()
    if longest > 0:
        step = -0.15 * gradient / longest
        look = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.0035, "color": "0.25"}
        ax.quiver(x, curve, np.zeros_like(step), step, **look)
    plots.finish(ax, "layer", None)
    highest = max(curve.max() + 0.16, *(s.target + s.delta for s in getattr(targets, task)))
    ax.set_ylim(0, min(1.0, 1.05 * highest))
    ax.legend(loc="upper right")


def explore_penalty(
    intensity: float = 0.1, target: float = 0.4, delta: float = 0.1, aia_weight: float = 40
) -> PenaltyWidget:
    """Sliders for I, T, δ and λ on one number; put it last in a cell."""
    return PenaltyWidget(intensity, target, delta, aia_weight)


def explore_pull(
    curves: Mapping[tuple[str, str], np.ndarray],
    targets: StageTargets | None = None,
    aia_weight: float = 40,
) -> PullWidget:
    """Sliders for T, δ and λ on a layer curve; put it last in a cell.

    Args:
        curves: (name, task) -> intensities [L].
        targets: the stages to start from (default: Table S5), brought to each curve's depth.
    """
    return PullWidget(curves, targets or StageTargets.paper("janus-pro"), aia_weight)


def _slider(name: str, value: float, low: float, high: float, step: float, tip: str) -> W.FloatSlider:
    return W.FloatSlider(
        value,
        min=low,
        max=high,
        step=step,
        description=name,
        tooltip=tip,
        readout_format=".2f" if step < 1 else ".0f",
        layout={"width": "380px"},
        style={"description_width": "40px"},
    )
