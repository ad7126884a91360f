"""What `import minimal_aia` adds to `import torch`, and how long the command line takes to answer.

    python benchmarks/import_time.py

Fresh processes, cases in turn, the smallest of the repeats: processor time and wall time in seconds.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from machine import cpu_name

CASES = {
    "nothing": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import minimal_aia": ["-c", "import minimal_aia"],
    "import torch, minimal_aia": ["-c", "import torch, minimal_aia"],
    "minimal-aia --help": ["-m", "minimal_aia.cli", "--help"],
}


def run(arguments: list[str]) -> tuple[float, float]:
    """(processor seconds, wall seconds) of one process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "import_time.json")
    args = parser.parse_args()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
    for _ in range(args.repeats):
        for name, arguments in CASES.items():
            times[name].append(run(arguments))
    cases = {
        name: {
            "cpu_s": min(c for c, _ in found),
            "wall_s": min(w for _, w in found),
        }
        for name, found in times.items()
    }
    # It brings no torch. The two lines with torch differ by the same, and by the noise of seconds.
    added = cases["import minimal_aia"]["cpu_s"] - cases["nothing"]["cpu_s"]
    for name, case in cases.items():
        print(f"{name:28}{case['cpu_s']:7.2f} s of processor time {case['wall_s']:7.2f} s")
    print(f"import minimal_aia adds {added:.3f} s to import torch")
    result = {"machine": {"cpu": cpu_name()}, "repeats": args.repeats, "cases": cases, "added_cpu_s": added}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
