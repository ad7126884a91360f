"""How long every notebook takes from its first cell to its last, kernel start included.

    python benchmarks/notebook_times.py

One after another, each in a fresh kernel of one thread, as `make course` runs them: wall seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from machine import cpu_name
from tqdm import tqdm

from minimal_aia.course import ROOT, notebooks, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "notebook_times.json")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    seconds, begin = {}, time.perf_counter()
    for path in tqdm(notebooks(), unit="notebook"):
        _, outcome = run(path)
        name = str(path.relative_to(ROOT))
        if outcome.error:
            raise SystemExit(f"{name}: {outcome.error}")
        seconds[name] = round(outcome.seconds, 1)
        tqdm.write(f"{name:<38}{seconds[name]:7.1f} s")
    whole = round(time.perf_counter() - begin, 1)
    tqdm.write(f"{'all':<38}{whole:7.1f} s")
    result = {"machine": {"cpu": cpu_name(), "cores": os.cpu_count()}, "seconds": seconds, "all": whole}
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
