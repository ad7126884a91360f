"""One attention layer from 640 to 16 384 tokens: what the intensity costs in time, how its memory grows.

    python benchmarks/attention_lengths.py          # minutes on one CPU core

plain   fused causal attention (SDPA)
aia     `attention_with_intensity`: the same call with eight indicator columns, and a gradient through it
eager   the attention matrix and Eq. 1 on it, up to --eager-limit tokens

Time: forward and backward, sides in turn in one process, median of the repeats in processor time. Memory:
peak of a fresh process above its inputs, forward and backward; `aia`'s growth is fitted as length^p.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from machine import peak as memory_peak
from machine import reset_peak
from training_step import machine

import minimal_aia as aia

LENGTHS = (640, 1576, 3000, 8192, 16384)
SIDES = ("plain", "aia", "eager")


def run(side: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    """Forward and backward with a loss on the output and, but for `plain`, on the intensity."""
    length = q.shape[2]
    keys = (torch.arange(length) < max(1, length // 16))[None]  # a prompt, then the image
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    start = time.process_time()
    if side == "plain":
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        loss = out.mean()
    elif side == "aia":
        out, mass = aia.attention_with_intensity(q, k, v, keys, is_causal=True)
        loss = out.mean() + mass[..., length // 16 :].mean().square()
    else:
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        attn = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf).softmax(
            -1
        )
        out = attn @ v
        loss = out.mean() + aia.intensity_from_attention(attn, ~keys, keys).mean().square()
    loss.backward()
    return time.process_time() - start


def inputs(length: int, heads: int, head_dim: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, length, head_dim, generator=generator) for _ in range(3)]


def peak(side: str, length: int, heads: int, head_dim: int) -> float:
    qkv = inputs(length, heads, head_dim)
    run(side, *inputs(64, heads, head_dim))  # kernels are loaded before memory counts
    before = reset_peak()
    run(side, *qkv)
    return memory_peak() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager-limit", type=int, default=8192)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "attention_lengths.json"
    )
    parser.add_argument("--peak", nargs=2, metavar=("SIDE", "LENGTH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        print(json.dumps(peak(args.peak[0], int(args.peak[1]), args.heads, args.head_dim)))
        return
    rows = []
    for length in args.lengths:
        sides = [s for s in SIDES if s != "eager" or length <= args.eager_limit]
        repeats = args.repeats if length <= 8192 else 1
        times: dict[str, list[float]] = {side: [] for side in sides}
        qkv = inputs(length, args.heads, args.head_dim)
        for _ in range(repeats):
            for side in sides:
                times[side].append(run(side, *qkv))
        for side in sides:
            command = [sys.executable, __file__, f"--heads={args.heads}", f"--head-dim={args.head_dim}"]
            command += ["--peak", side, str(length)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            row = {"length": length, "side": side, "seconds": statistics.median(times[side]),
                   "peak_bytes": json.loads(done.stdout), "repeats": repeats}  # fmt: skip
            rows.append(row)
            print(f"{length:7} {side:7}{row['seconds']:9.3f} s {row['peak_bytes'] / 1e6:9.1f} MB", flush=True)
    ours = [row for row in rows if row["side"] == "aia"]
    exponent = float(
        np.polyfit(np.log([r["length"] for r in ours]), np.log([r["peak_bytes"] for r in ours]), 1)[0]
    )
    print(f"memory of aia ~ length^{exponent:.2f}")
    result = {"machine": machine("cpu"), "heads": args.heads, "head_dim": args.head_dim, "dtype": "float32",
              "rows": rows, "aia_memory_exponent": exponent}  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
