"""The sliders of the explorer: one row a stage (where it ends, T, δ), from presets or cut from a curve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ipywidgets as W
import numpy as np

from minimal_aia.targets import PRESETS, TASKS, Stage, StageTargets
from minimal_aia.widget_static import one_at_a_time

MAX_ROWS = 8  # a raw curve has a stage a layer: too many sliders for anybody
CUTS = (3, 5)


class StageEditor(W.VBox):
    """Stages of both tasks at one depth. `targets` is what the sliders say; `on_change` is called after a
    change.

    Layers count from 1 on the sliders, as on the plot beside them, and from 0 in `targets` and in files.
    """

    def __init__(
        self, targets: StageTargets, curve: Callable[[str], Any], on_change: Callable[[bool], None]
    ) -> None:
        """curve(task) -> the curve [L] to cut stages from, or None. on_change(dragged): True for a slider,
        False when the stages were replaced as a whole."""
        self.targets = targets
        self._given, self._curve, self._on_change = targets, curve, on_change
        self._quiet = False
        names = [("as given", "given"), *((name, name) for name in PRESETS)]
        names += [(f"chosen curve in {n} stages", f"cut {n}") for n in CUTS]
        tip = "Replace all stages: the paper's tables, the authors' code, or cut from the first chosen curve"
        self.preset = W.Dropdown(options=names, description="stages", tooltip=tip, layout={"width": "320px"})
        self.task = W.ToggleButtons(
            options=[task for task in TASKS if getattr(targets, task)],
            tooltips=["whose stages the sliders move"] * 2,
            description="edit",
            style={"button_width": "120px"},
        )
        self.message = W.HTML()
        self.rows = W.VBox()
        super().__init__([W.HBox([self.preset, self.task]), self.message, self.rows])
        self.preset.observe(self._replace, "value")
        self.task.observe(lambda _: self._build(), "value")
        self._build()

    def set_targets(self, targets: StageTargets) -> None:
        """Show other stages (they replace all)."""
        self.targets = targets
        tasks = [task for task in TASKS if getattr(targets, task)]
        self._quiet = True
        if tuple(self.task.options) != tuple(tasks):
            self.task.options = tasks
        self._quiet = False
        self._build()
        self._on_change(False)

    @one_at_a_time
    def _replace(self, _: Any) -> None:
        self.message.value = ""
        n_layers, choice = self.targets.n_layers, self.preset.value
        if choice == "given":
            self.set_targets(self._given.for_layers(n_layers))
        elif choice.startswith("cut"):
            curves = {task: self._curve(task) for task in TASKS}
            curves = {task: curve for task, curve in curves.items() if curve is not None}
            if not curves:
                self.message.value = "Choose a model first: stages are cut from its curve."
                return
            n = min(int(choice.split()[1]), n_layers)
            self.set_targets(
                StageTargets.from_curve(**curves, n_stages=n, n_layers=n_layers, name="chosen curve")
            )
        else:
            self.set_targets(StageTargets.paper(choice, n_layers))

    @one_at_a_time
    def _build(self) -> None:
        """Sliders for the stages of the task in hand."""
        if self._quiet:
            return
        stages = getattr(self.targets, self.task.value)
        if len(stages) > MAX_ROWS:
            self.rows.children = ()
            self.message.value = f"{len(stages)} stages are too many to move by hand; cut the curve in fewer."
            return
        self.ends = [self._end(i, stage) for i, stage in enumerate(stages)]
        self.heights = [self._share(i, "T", s.target, 0.0) for i, s in enumerate(stages)]
        self.deltas = [self._share(i, "δ", s.delta, 0.01) for i, s in enumerate(stages)]
        for slider in (*self.ends, *self.heights, *self.deltas):
            slider.observe(self._dragged, "value")
        head = W.HTML("<b>stage ends at layer (from 1) · target T · half width δ</b>")
        rows = [W.HBox(row) for row in zip(self.ends, self.heights, self.deltas, strict=True)]
        self.rows.children = (head, *rows)

    def _end(self, i: int, stage: Stage) -> W.IntSlider:
        n = self.targets.n_layers
        last = stage.last_layer + 1 == n
        return W.IntSlider(
            stage.last_layer + 1,
            1,
            n,
            description=f"{i + 1}: ends",
            tooltip="the last stage ends at the last layer"
            if last
            else f"last layer of stage {i + 1}, from 1",
            disabled=last,
            layout={"width": "270px"},
            style={"description_width": "55px"},
        )

    def _share(self, i: int, name: str, value: float, low: float) -> W.FloatSlider:
        # Steps of 0.01; the exact start value stays in the stage until somebody moves its slider.
        tips = {"T": "target intensity", "δ": "Huber bends where |I − T| exceeds δ"}
        return W.FloatSlider(
            value,
            min=min(low, value),
            max=1.0,
            step=0.01,
            description=name,
            tooltip=f"stage {i + 1}: {tips[name]}",
            readout_format=".2f",
            layout={"width": "260px"},
            style={"description_width": "18px"},
        )

    @one_at_a_time
    def _dragged(self, change: Any) -> None:
        if self._quiet:
            return
        if change["owner"] in self.ends:
            self._keep_order(self.ends.index(change["owner"]))
        task = self.task.value
        old = getattr(self.targets, task)
        ends = [slider.value for slider in self.ends]
        starts = [0, *ends[:-1]]
        rows = zip(old, starts, ends, self.heights, self.deltas, strict=True)
        stages = tuple(
            Stage(first, last - 1, self._moved(stage.target, t.value), self._moved(stage.delta, d.value))
            for stage, first, last, t, d in rows
        )
        if stages == old:
            return
        self.targets = replace(self.targets, **{task: stages}, name=self._name())
        self._on_change(True)

    @staticmethod
    def _moved(exact: float, slider: float) -> float:
        """A browser rounds a slider to its steps and sends 0.1 back as 0.0999…: that is not a move."""
        return exact if abs(slider - exact) < 0.0051 else round(slider, 2)

    def _name(self) -> str:
        name = self.targets.name
        return name if name.endswith("(edited)") else f"{name} (edited)".strip()

    def _keep_order(self, i: int) -> None:
        """A stage keeps at least one layer: the moved end stops at its neighbours."""
        low = self.ends[i - 1].value + 1 if i else 1
        high = self.ends[i + 1].value - 1
        self._quiet = True
        self.ends[i].value = int(np.clip(self.ends[i].value, low, high))
        self._quiet = False
