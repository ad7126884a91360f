"""`explore`: look at layer curves, move stages, see the AIA loss. Reads tables, never runs a model.

Plain ipywidgets and a PNG: JupyterLab and VS Code show it without an extension, and every control can be
reached and moved with the keyboard.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as W
import numpy as np
import pandas as pd
import torch

from minimal_aia.curves import as_curves
from minimal_aia.loss import AIALoss
from minimal_aia.plots import TASKS
from minimal_aia.profile_table import IntensityProfile
from minimal_aia.targets import StageTargets
from minimal_aia.widget_figure import LiveFigure
from minimal_aia.widget_stages import StageEditor
from minimal_aia.widget_static import display_with_copy, one_at_a_time

ALL_TYPES = "all types"
# ipywidgets puts the label of toggle buttons above them; every other label stands to the left.
STYLE = """<style>
.aia-explorer .widget-toggle-buttons {display: flex; margin: 2px}
.aia-explorer .widget-toggle-buttons > .widget-label {flex: none; width: 60px; text-align: right}
.aia-explorer .widget-toggle-buttons > div {margin-left: 8px}
</style>"""


def explore(sources: Any, targets: StageTargets | None = None, *, name: str = "aia_explore") -> Explorer:
    """The layer-curve explorer; put it last in a cell.

    Args:
        sources: IntensityProfiles, published frames, or a list of both.
        targets: the stages to start from; default: Table S5, brought to the first curve's depth.
        name: start of the exported files' names (`<name>.png`, `.csv`, `.yaml`, in the current folder).

    Returns:
        A widget; `.targets` are the stages as they stand, `.losses` the loss of each curve shown.
    """
    return Explorer(sources, targets, name)


class Explorer(W.VBox):
    """See `explore`."""

    def __init__(self, sources: Any, targets: StageTargets | None, name: str) -> None:
        items = list(sources) if isinstance(sources, (list, tuple)) else [sources]
        self._profiles: dict[tuple[str, str], IntensityProfile] = {}
        for item in items:
            if isinstance(item, IntensityProfile):
                if (item.model, item.task) in self._profiles:
                    raise ValueError(
                        f"two profiles of {item.model}, {item.task}: give them different model names"
                    )
                self._profiles[item.model, item.task] = item
        frames = [as_curves(item) for item in items if not isinstance(item, IntensityProfile)]
        self._published = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
        if len(self._published):
            self._published["model"] = self._published["label"] + " (published)"
            self._published["series"] = ""
        measured = dict.fromkeys(model for model, _ in self._profiles)
        published = dict.fromkeys(self._published["model"]) if len(self._published) else {}
        self._kinds = {"measured": [*measured], "published": [*published]}
        labels = [*measured, *published]
        if not labels:
            raise ValueError("nothing to explore: give profiles or published frames")
        self._shown: dict[tuple[str, str], torch.Tensor] = {}  # of the last drawing: a drag looks nothing up
        self._figure = LiveFigure()

        self._make_controls(labels, name)
        depth = self._depth(labels[0])
        start = (targets or StageTargets.paper("janus-pro")).for_layers(depth)
        self.stages = StageEditor(start, self._curve_to_cut, self._stages_changed)
        self.image = W.Image(format="png", layout={"max_width": "100%"})
        self.loss = W.HTML()
        self.status = W.HTML(STYLE)
        wrap = {"flex_flow": "row wrap"}  # a narrow window shows what is wide below, not cut off
        drawn = W.HBox([self.band, self.uniform, self.boxes], layout=wrap)
        lists = W.VBox([self.kind, self.models, self.type])
        top = W.HBox([lists, W.VBox([self.task, self.view, self.axis, drawn])], layout=wrap)
        exports = W.HBox([self.name, self.png, self.csv, self.yaml])
        super().__init__([top, self.image, self.loss, self.stages, exports, self.status])
        self.add_class("aia-explorer")
        for control in (self.models, *self._choices):
            control.observe(lambda _: self._redraw(), "value")
        self.kind.observe(lambda _: self._list_models(), "value")
        self.task.observe(lambda _: self._edit_shown_task(), "value")
        self._redraw()

    # --- what stands on the screen, as values
    # -------------------------------------------------------------------

    @property
    def targets(self) -> StageTargets:
        """The stages as they stand, for as many layers as the first curve given has (drawn so on the layer
        axis; for the loss of a curve of another depth they are rescaled)."""
        return self.stages.targets

    @property
    def tasks(self) -> list[str]:
        return list(TASKS) if self.task.value == "both" else [self.task.value]

    @property
    def curves(self) -> pd.DataFrame:
        """The chosen curves, as `as_curves` gives them."""
        parts = [p.curve(self._type) for p in self._chosen_profiles()]
        if len(self._published):
            chosen = self._published["model"].isin(self.models.value) & self._published["task"].isin(
                self.tasks
            )
            parts.append(self._published[chosen])
        parts = [part for part in parts if len(part)]
        return as_curves(parts) if parts else pd.DataFrame(columns=["label", "model", "task", "n_layers"])

    @property
    def losses(self) -> dict[tuple[str, str], float]:
        """(model, task) -> AIA loss (Eq. 2) against the stages, for every chosen curve that has some.

        Measured: per sample, then the mean, as in training. Published: of the printed curve, which is a mean
        already (a lower bound of the loss over its samples)."""
        found = {}
        for (model, task), intensity in self._shown.items():
            if getattr(self.targets, task):
                loss = AIALoss(self.targets.for_layers(len(intensity)))
                found[model, task] = float(loss(intensity, task=task))
        return found

    # --- controls
    # -----------------------------------------------------------------------------------------------

    def _make_controls(self, labels: Sequence[str], name: str) -> None:
        both = all(self._kinds.values())
        kinds = (
            ["measured and published", "measured", "published"]
            if both
            else [k for k, v in self._kinds.items() if v]
        )
        self.kind = W.Dropdown(options=kinds, description="curves", tooltip="which curves the list offers")
        first = self._kinds["measured"] or labels[:3]
        tip = "Models to show: click, or arrow keys; with Ctrl or Shift several"
        rows = min(8, max(3, len(labels)))
        self.models = W.SelectMultiple(
            options=labels, value=first, description="models", tooltip=tip, rows=rows
        )
        published = set(self._published["task"]) if len(self._published) else set()
        tasks = [t for t in TASKS if t in {task for _, task in self._profiles} | published]
        options = ["both", *tasks] if len(tasks) == 2 else tasks
        self.task = self._toggle("task", options, "which task's curves")
        self.view = self._toggle(
            "view", ["curves", "heads"], "mean over heads, or every head (measured models)"
        )
        self.axis = self._toggle(
            "x axis", [("layer (from 1)", "layer"), ("relative depth", "depth")], "x axis"
        )
        types = sorted({t for p in self._profiles.values() for t in p.samples["type"] if t})
        tip = "only samples of this type (measured models)"
        self.type = W.Dropdown(options=[ALL_TYPES, *types], description="type", tooltip=tip)
        for control in (self.kind, self.models, self.type):
            control.layout.width, control.style.description_width = "310px", "60px"
        self.band = self._tick("band ±1 std over samples", "of measured models")
        self.uniform = self._tick("flat attention", "what flat attention would give")
        self.boxes = self._tick("stages", "boxes T ± δ")
        self._choices = [self.task, self.view, self.axis, self.type, self.band, self.uniform, self.boxes]
        self.name = W.Text(
            name, description="save as", tooltip="start of the file names", layout={"width": "250px"}
        )
        tips = {
            "png": "the picture",
            "csv": "the chosen curves, layers from 0",
            "yaml": "the stages, layers from 0",
        }
        self.png, self.csv, self.yaml = (
            W.Button(description=kind.upper(), tooltip=f"write {tip}", layout={"width": "80px"})
            for kind, tip in tips.items()
        )
        for button in (self.png, self.csv, self.yaml):
            button.on_click(self._export)

    def _toggle(self, description: str, options: list[Any], tip: str) -> W.ToggleButtons:
        style = {"button_width": "115px"}
        return W.ToggleButtons(options=options, description=description, tooltip=tip, style=style)

    def _tick(self, description: str, tip: str) -> W.Checkbox:
        layout = {"width": "auto", "margin": "2px 12px"}
        return W.Checkbox(True, description=description, tooltip=tip, indent=False, layout=layout)

    @one_at_a_time
    def _list_models(self) -> None:
        listed = [m for kind, models in self._kinds.items() if kind in self.kind.value for m in models]
        keep = tuple(m for m in self.models.value if m in listed)
        self.models.options = listed
        self.models.value = keep or tuple(listed[:3])

    def _edit_shown_task(self) -> None:
        if self.task.value in self.stages.task.options:
            self.stages.task.value = self.task.value

    # --- data behind the screen
    # ---------------------------------------------------------------------------------

    @property
    def _type(self) -> str | None:
        return None if self.type.value == ALL_TYPES else self.type.value

    def _chosen_profiles(self) -> list[IntensityProfile]:
        """Chosen measured profiles that have samples of the chosen type."""
        chosen = [p for (m, t), p in self._profiles.items() if m in self.models.value and t in self.tasks]
        return [p for p in chosen if self._type is None or (p.samples["type"] == self._type).any()]

    def _intensities(self) -> dict[tuple[str, str], torch.Tensor]:
        """[L, B] of measured, [L] of published curves that are chosen."""
        found: dict[tuple[str, str], torch.Tensor] = {}
        for p in self._chosen_profiles():
            values = p.matrix.loc[p.ids(self._type)].to_numpy().T
            found[p.model, p.task] = torch.from_numpy(values.copy())
        for model in self.models.value:
            for task in self.tasks if len(self._published) else []:
                mine = self._published[
                    (self._published["model"] == model) & (self._published["task"] == task)
                ]
                if len(mine):
                    found[model, task] = torch.from_numpy(mine["mean"].to_numpy(dtype=float).copy())
        return found

    def _depth(self, model: str) -> int:
        for key, profile in self._profiles.items():
            if key[0] == model:
                return profile.n_layers
        return int(self._published.loc[self._published["model"] == model, "n_layers"].iloc[0])

    def _curve_to_cut(self, task: str) -> np.ndarray | None:
        for (_, found), intensity in self._shown.items():
            if found == task:
                return intensity.reshape(len(intensity), -1).mean(1).numpy()
        return None

    # --- drawing
    # ------------------------------------------------------------------------------------------------

    def _stage_tasks(self) -> list[str]:
        return [task for task in self.tasks if self.boxes.value and getattr(self.targets, task)]

    @one_at_a_time
    def _redraw(self) -> None:
        self._shown = self._intensities()
        for control in (self.axis, self.band, self.uniform, self.boxes):
            control.disabled = self.view.value == "heads"  # which shows none of them
        if self.view.value == "heads":
            self.image.value = self._figure.draw_heads(self._chosen_profiles()[:2], self._type)
        else:
            tasks = self._stage_tasks()
            targets = self.targets if tasks else None
            self.image.value = self._figure.draw_curves(
                self.curves, targets, tasks, self.axis.value, self.band.value, self.uniform.value
            )
        self._show_losses()

    @one_at_a_time
    def _stages_changed(self, dragged: bool) -> None:
        if self.view.value == "heads":
            return self._show_losses()
        png = self._figure.move_stages(self.targets, self._stage_tasks()) if dragged else None
        if png is None and self._stage_tasks():
            return self._redraw()
        if png is not None:
            self.image.value = png
        self._show_losses()

    def _show_losses(self) -> None:
        rows = [
            f"<tr><td style='padding-right:1em'>{escape(model)}, {task}</td><td><b>{loss:.5f}</b></td></tr>"
            for (model, task), loss in self.losses.items()
        ]
        head = f"AIA loss (Eq. 2) against the stages “{escape(self.targets.name)}”"
        self.loss.value = f"{head}<table>{''.join(rows)}</table>" if rows else f"{head}: no curve has stages"

    @one_at_a_time
    def _export(self, button: W.Button) -> None:
        path = Path(f"{self.name.value.strip() or 'aia_explore'}.{button.description.lower()}")
        try:
            if button is self.png:
                self._figure.save(str(path))
            elif button is self.csv:
                self.curves.to_csv(path, index=False)
            else:
                self.targets.save(path)
            said = f"wrote {path.resolve()}"
        except OSError as error:
            said = f"could not write {path}: {error.strerror or error}"
        self.status.value = STYLE + escape(said)

    def _ipython_display_(self) -> None:
        """The widget, then a static copy of the picture: what a saved notebook shows without a kernel."""
        hint = "AIA explorer: run this cell to move the stages; its picture is below."
        display_with_copy(self, self.image.value, "AIA explorer", hint)
