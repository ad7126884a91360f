"""The picture of the explorer: drawn once, then only its stages move.

A drag must answer at once. So curves, axes and legend are kept as pixels, the stages' artists are moved in
place and painted over them, and the result is compressed lightly. No pyplot: nothing to leak, nothing to
show.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from minimal_aia import plots


class LiveFigure:
    """One matplotlib figure and the pixels of what does not move."""

    def __init__(self, size: tuple[float, float] = (8.4, 4.4), dpi: int = 100) -> None:
        with plots.style():
            self.figure = Figure(figsize=size, dpi=dpi, layout="constrained")
        self.canvas = FigureCanvasAgg(self.figure)
        self.stages: list[Any] = []
        self.background: Any = None
        self.axis = "layer"

    def draw_curves(
        self, curves: pd.DataFrame, targets: Any, tasks: Sequence[str], axis: str, band: bool, uniform: bool
    ) -> bytes:
        """Everything anew. curves: an `as_curves` frame; targets: StageTargets of the depth to draw, or
        None."""
        self.figure.clear()
        self.axis, self.stages = axis, []
        with plots.style():
            ax = self.figure.add_subplot()
            if len(curves):
                plots.plot_curves(
                    plots.mine_as_source(curves), axis=axis, band=band, uniform=uniform, ax=ax, legend=False
                )
            else:
                plots.finish(ax, axis, "nothing chosen")
            if targets is not None:
                self.stages = plots.draw_stages(ax, targets, tasks, axis)
                top = max(s.target + s.delta for task in tasks for s in getattr(targets, task))
                ax.set_ylim(0, min(1, max(ax.get_ylim()[1], 1.05 * top)))
            plots.place_legend(ax)
        return self._paint()

    def draw_heads(self, profiles: Sequence[Any], type: str | None) -> bytes:
        """A heat map for each profile, of its samples of one type."""
        self.figure.clear()
        self.stages = []
        with plots.style():
            for i, profile in enumerate(profiles, 1):
                plots.plot_heads(profile, type, ax=self.figure.add_subplot(1, len(profiles), i))
            if not profiles:
                ax = self.figure.add_subplot()
                ax.set_axis_off()
                ax.text(0.5, 0.5, "heads are known of measured models only", ha="center", va="center")
        return self._paint()

    def move_stages(self, targets: Any, tasks: Sequence[str]) -> bytes | None:
        """The same picture with the stages where they are now; None if these are not the stages drawn."""
        stages = [stage for task in tasks for stage in getattr(targets, task)]
        if not self.stages or len(stages) != len(self.stages):
            return None
        for (box, line), stage in zip(self.stages, stages, strict=True):
            plots.place_stage(box, line, stage, targets.n_layers, self.axis)
        ax = self.figure.axes[0]
        if max(min(s.target + s.delta, 1) for s in stages) > ax.get_ylim()[1] + 1e-9:
            ax.set_ylim(0, 1)  # a stage has left the axes; all of them, so that it happens once a drag
            return self._paint()
        return self._finish()

    def _paint(self) -> bytes:
        for artist in self._moving():
            artist.set_animated(True)  # left out of the background
        self.canvas.draw()
        self.background = self.canvas.copy_from_bbox(self.figure.bbox)
        return self._finish()

    def _moving(self) -> list[Any]:
        return [artist for pair in self.stages for artist in pair]

    def _finish(self) -> bytes:
        self.canvas.restore_region(self.background)
        for artist in self._moving():
            self.figure.axes[0].draw_artist(artist)
        return self._png()

    def _png(self) -> bytes:
        pixels = Image.frombuffer("RGBA", self.canvas.get_width_height(), self.canvas.buffer_rgba())
        out = BytesIO()
        pixels.convert("RGB").save(
            out, "PNG", compress_level=1
        )  # speed before size: it stays on this machine
        return out.getvalue()

    def save(self, path: str) -> None:
        """Write the current picture with 150 dots an inch, stages included."""
        for artist in self._moving():
            artist.set_animated(False)
        try:
            self.figure.savefig(path, dpi=150)
        finally:
            self._paint()
