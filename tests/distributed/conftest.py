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
    names = {name for module in modules for name in getattr(module, "WORLDS", ())}
    run_script("distributed/run_worlds.py", root, *sorted(names))
    return root
