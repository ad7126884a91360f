"""Attention Interaction Alignment (arXiv 2511.22663): one quantity, measured, aimed at and trained.

>>> import minimal_aia as aia
>>> targets = aia.StageTargets.paper("janus-pro")

Names are loaded on first use: importing the package imports neither transformers nor matplotlib nor pandas,
so that `minimal-aia --help` is quick and the tensor part needs nothing but torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors see; kept equal to _WHERE by tests/test_packaging.py
    from .capture import capture
    from .data import Sample, read_samples
    from .intensity import attention_with_intensity, intensity_from_attention
    from .loss import AIALoss, aia_loss, total_loss
    from .models import load_adapter
    from .plots import plot_curves
    from .profiles import IntensityProfile, profile
    from .published import published
    from .targets import Stage, StageTargets
    from .widgets import explore

__version__ = "0.1.0"

# public name -> the module that holds it
_WHERE = {
    "intensity_from_attention": "intensity",
    "attention_with_intensity": "intensity",
    "capture": "capture",
    "Stage": "targets",
    "StageTargets": "targets",
    "aia_loss": "loss",
    "AIALoss": "loss",
    "total_loss": "loss",
    "Sample": "data",
    "read_samples": "data",
    "profile": "profiles",
    "IntensityProfile": "profiles",
    "published": "published",
    "plot_curves": "plots",
    "explore": "widgets",
    "load_adapter": "models",
}

__all__ = [  # noqa: RUF022 - in the order of the pipeline, not of the alphabet
    "intensity_from_attention",
    "attention_with_intensity",
    "capture",
    "Stage",
    "StageTargets",
    "aia_loss",
    "AIALoss",
    "total_loss",
    "Sample",
    "read_samples",
    "profile",
    "IntensityProfile",
    "published",
    "plot_curves",
    "explore",
    "load_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `aia.capture` the function when someone imports the module `minimal_aia.capture`.

    Python binds a freshly imported submodule to its name in the package, which would put the modules
    capture and published in the place of the functions of the same name.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
