"""What all widgets share: a picture below each, for when its kernel is gone; and one change at a time."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from minimal_aia.plots import DRAWING

P = ParamSpec("P")
R = TypeVar("R")

# For JupyterLab. While the widget lives, its copy is hidden. Without its kernel, an "Error displaying widget"
# would stand above the copy. This output itself is nothing to look at.
STYLE = """<style class="aia-static">
.jp-OutputArea-child:has(.aia-widget) + .jp-OutputArea-child:has(img),
.jp-OutputArea-child:has(> .jp-OutputArea-output.jupyter-widgets):has(+ * + * .aia-static),
.jp-OutputArea-child:has(.aia-static) {display: none}
</style>"""


def one_at_a_time(method: Callable[P, R]) -> Callable[P, R]:
    """For what changes or draws a widget: a call from another thread waits, then sees the latest values."""

    @wraps(method)
    def waiting(*args: P.args, **kwargs: P.kwargs) -> R:
        with DRAWING:
            return method(*args, **kwargs)

    return waiting


def display_with_copy(widget: Any, png: bytes, name: str, hint: str) -> None:
    """Show an ipywidget in a notebook, with `png` as its static copy.

    name: what the copy is called; hint: the text where neither widgets nor pictures are shown.
    """
    from IPython.display import display

    widget.add_class("aia-widget")
    view = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
    display({"application/vnd.jupyter.widget-view+json": view, "text/plain": hint}, raw=True)
    picture = b64encode(png).decode()  # as nbformat wants it: raw bytes make an invalid notebook
    display({"image/png": picture, "text/plain": f"{name}, static copy"}, raw=True)
    display({"text/html": STYLE, "text/plain": ""}, raw=True)
