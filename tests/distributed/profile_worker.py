"""Started by a launcher: `minimal-aia profile` with the tiny test model; says how many forward passes it
made."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from profile_fakes import FakeAdapter

import minimal_aia
from minimal_aia.cli import main

if __name__ == "__main__":
    stop_after = int(os.environ["STOP_AFTER"]) if "STOP_AFTER" in os.environ else None
    adapter = FakeAdapter(stop_after=stop_after)
    vars(minimal_aia)["load_adapter"] = lambda *args, **options: adapter
    code = main(sys.argv[1:])
    print(f"rank {os.environ.get('RANK', '-')}: {adapter.n_forward} forward passes", flush=True)
    sys.exit(code)
