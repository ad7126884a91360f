"""Where the course's data is: samples, lab models and published curves are not in the wheel.

In a clone they lie beside the package. Whoever installs the wheel takes data_samples/ from a clone or the
source distribution and says where it is: MINIMAL_AIA_DATA=/path/to/data_samples.
"""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "MINIMAL_AIA_DATA"
ROOT = Path(__file__).resolve().parents[1]  # of a clone: data_samples/, notebooks/ and recipes/ lie there


def data_folder() -> Path:
    """The folder data_samples: that of the environment variable MINIMAL_AIA_DATA, or the clone's.

    It need not exist: importing a module must not fail for data that it may not need.
    """
    chosen = os.environ.get(VARIABLE, "").strip()
    return Path(chosen).expanduser().absolute() if chosen else ROOT / "data_samples"


def how_to_get() -> str:
    """What to do when something of data_samples is missing, as the end of an error message."""
    if os.environ.get(VARIABLE, "").strip():
        return f"{VARIABLE}={os.environ[VARIABLE]} is no complete data_samples folder of the repository"
    if (ROOT / "pyproject.toml").is_file():
        return "restore the folder from the repository: git checkout -- data_samples"
    return f"it is not in the wheel: clone the repository and set {VARIABLE}=/path/to/clone/data_samples"


DATA = data_folder()  # read once, when the process starts
