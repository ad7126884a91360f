"""Makes worlds of 1, 2 and 4 processes (gloo, CPU): `run_worlds.py FOLDER NAME...`.

One process imports everything and forks the processes of every world, as `torchrun` would start them but
without paying seconds of imports for each. It trains nothing itself. RUNS of the three files of worlds say
what each name does; its worlds write into FOLDER/NAME.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import plain_worlds
import torch
import train_worlds
import waiting_worlds
from accelerate.state import AcceleratorState

from minimal_aia.train import sft, trainer
from minimal_aia.train.config import TrainConfig

RUNS = train_worlds.RUNS | plain_worlds.RUNS | waiting_worlds.RUNS


def main(root: Path, names: list[str]) -> None:
    # What is imported lazily is then there for every world.
    sft.build(TrainConfig(**train_worlds.SMALL, output_dir=str(root / "warm-up")))
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer.PROBE_SAMPLES = 3  # for the layer curves
    for name in names:
        (root / name).mkdir()
        start = time.monotonic()
        codes = RUNS[name](root / name)
        print(name, f"{time.monotonic() - start:.1f} s", codes, flush=True)
        (root / name / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
