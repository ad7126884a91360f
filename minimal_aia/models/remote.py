"""What the adapters of models with their authors' own code share: finding that code, and when to refuse."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minimal_aia.models.base import AdapterError


@contextmanager
def authors_code(name: str, code: str | Path | None, module: str, repository: str) -> Iterator[Any]:
    """The authors' `module`, imported from a checkout of their repository; only after the user's consent.

    code: the checkout's folder; None if the module is already importable. Its folder is on sys.path inside
    the context only. AdapterError, naming the repository, if the module is not there.
    """
    if code is not None:
        folder = Path(code).expanduser()
        if not folder.is_dir():
            raise AdapterError(f"{name}: code={str(code)!r} is no folder; give a checkout of {repository}")
        sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module(module)
    except ImportError as error:
        raise AdapterError(
            f"{name} needs its authors' code ({error}): check out {repository}, install what it asks for and "
            "pass code=<that folder>"
        ) from error
    finally:
        if code is not None:
            sys.path.remove(str(folder))
