"""`profile` beside the usual plotting script, which decodes one token at a time: forward passes and seconds.

    python benchmarks/profile_speed.py

profile   teacher-forced, batches by length, intensity reduced inside the attention call
decode    one sample at a time, the prompt first, then one image token a pass with the key-value cache, eager
          attention, attention rows kept by `output_attentions`. Fed the same tokens, so both measure the same
          thing, and the largest difference of their intensities is printed.

Both in one process, interleaved, one thread; the smallest of `--repeats` times counts, in seconds of
processor time (the machine may be shared) and on the wall. The lab's pictures have 36 tokens; on Janus-Pro
(576) or Emu3 (8 000) the number of passes saved grows in proportion.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import cpu_name

import minimal_aia as aia

ROOT = Path(__file__).resolve().parents[1]


class Counted:
    """Counts the forward passes of a module."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.n = 0
        model.register_forward_pre_hook(self.count)

    def count(self, *_: Any) -> None:
        self.n += 1


@torch.no_grad()
def decode(adapter: Any, samples: list[Any]) -> dict[str, torch.Tensor]:
    """Sample id -> intensity [L] of decoding its image tokens one by one."""
    decoder = adapter.model.model
    adapter.model.set_attn_implementation("eager")
    found = {}
    for sample in samples:
        batch = adapter.collate([sample], "generation")
        ids, key = batch.inputs["ids"], batch.key_mask[0]
        queries = batch.query_mask[0].nonzero().flatten().tolist()
        cache = decoder(input_ids=ids[:, : queries[0]], use_cache=True).past_key_values
        rows = []
        for position in queries:
            out = decoder(
                input_ids=ids[:, position : position + 1],
                past_key_values=cache,
                use_cache=True,
                output_attentions=True,
            )
            cache = out.past_key_values
            rows.append(torch.stack([a[0, :, 0, key[: position + 1]].sum(-1).mean() for a in out.attentions]))
        found[sample.id] = torch.stack(rows).mean(0)
    adapter.model.set_attn_implementation("sdpa")
    return found


def timed(run: Callable[[], Any], passes: Counted) -> tuple[Any, dict[str, float]]:
    before, cpu, wall = passes.n, time.process_time(), time.perf_counter()
    result = run()
    seconds = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    return result, {"forward_passes": passes.n - before, **seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=Path, default=ROOT / "data_samples" / "generation.jsonl")
    parser.add_argument("--repeats", type=int, default=3)
    out = Path(__file__).parent / "results" / "profile_speed.json"
    parser.add_argument("--out", type=Path, default=out)
    args = parser.parse_args()
    torch.set_num_threads(1)
    adapter = aia.load_adapter("lab/unified", device="cpu")
    passes = Counted(adapter.model.model)
    samples = [s for s in aia.read_samples(args.samples) if adapter.why_not(s, "generation") is None]
    aia.profile(adapter, samples[:2], "generation", progress=False)  # warm-up: what is imported at first use
    decode(adapter, samples[:1])
    runs: dict[str, list[dict[str, float]]] = {"profile": [], "decode": []}
    for _ in range(args.repeats):
        adapter._lengths.clear()  # what a fresh run has to do too
        profile, took = timed(lambda: aia.profile(adapter, samples, "generation", progress=False), passes)
        runs["profile"].append(took)
        stepwise, took = timed(lambda: decode(adapter, samples), passes)
        runs["decode"].append(took)
    gap = max(
        float((torch.tensor(profile.matrix.loc[name].to_numpy()) - curve).abs().max())
        for name, curve in stepwise.items()
    )
    best = {name: {key: min(r[key] for r in rows) for key in rows[0]} for name, rows in runs.items()}
    ratio = {key: best["decode"][key] / best["profile"][key] for key in best["profile"]}
    result = {
        "machine": {
            "cpu": cpu_name(),
            "threads": 1,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "model": "lab/unified",
        "samples": len(samples),
        "repeats": args.repeats,
        **best,
        "ratio": ratio,
        "max_intensity_difference": gap,
    }
    for key, value in ratio.items():
        slow, fast = best["decode"][key], best["profile"][key]
        print(f"{key:16}decode {slow:9.2f}   profile {fast:9.2f}   ratio {value:.1f}")
    print(f"largest difference of the intensities: {gap:.1e}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
