"""All worlds that the tests of a session ask for are made by one process, in one go."""

from __future__ import annotations

from pathlib import Path

import pytest
from worlds import run_script


@pytest.fixture(scope="session")
def made(request, tmp_path_factory) -> Path:
    """A folder with what the worlds in WORLDS of the test files have written, a folder a name."""
    root = tmp_path_factory.mktemp("worlds")
    modules = {getattr(item, "module", None) for item in request.session.items}
    run_script("run_worlds.py", root, *sorted({n for m in modules for n in getattr(m, "WORLDS", ())}))
    return root
