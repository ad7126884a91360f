"""Peak memory of one Emu3-sized attention layer: our attention, stock fused attention, and the matrix.

    python benchmarks/capture_memory.py            # minutes on one free CPU core, under 7 GB
    python benchmarks/capture_memory.py --length 2048 --cases bfloat16:forward

Each measurement is a fresh process that makes q, k and v (32 heads, 8 192 tokens, head size 128), notes its
resident memory, runs the layer's attention function, and reports how far its peak rose above that:

capture   the function that `capture` installs in every layer, with its report of the intensity
sdpa      what transformers runs when nobody asks for the intensity
eager     transformers' eager attention of Emu3, and Eq. 1 on its matrix at no further cost (a product with
          the indicator of the keys)

Eager attention does not fit at full length, so it is measured at shorter ones; its peak grows with the square
of the length, and the table says what that comes to. The matrix alone is heads x length^2 numbers.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
from pathlib import Path

from machine import cpu_name

HEADS, HEAD_DIM = 32, 128
GB = 1e9


def one(side: str, dtype: str, length: int, backward: bool) -> dict:
    """Run one side here, in this process, and say what it took."""
    import psutil
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.models.emu3.modeling_emu3 import eager_attention_forward

    from minimal_aia.capture import KEYWORD, _attention
    from minimal_aia.intensity import mean_over_queries
    from minimal_aia.record import Call

    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = (1, HEADS, length, HEAD_DIM)
    q, k, v = (torch.randn(shape, dtype=getattr(torch, dtype), requires_grad=backward) for _ in range(3))
    keys = (torch.arange(length) < length // 32)[None]  # a prompt of 3 %, then the image
    layer = torch.nn.Module()
    layer.layer_idx, layer.is_causal, layer.num_key_value_groups = 0, True, 1
    layer.eval()
    call = Call(~keys, keys, None, None)
    scaling = HEAD_DIM**-0.5

    before = psutil.Process().memory_info().rss
    if side == "capture":
        out, _ = _attention(layer, q, k, v, None, scaling=scaling, **{KEYWORD: call})
        intensity = call.intensity[0]
    elif side == "sdpa":
        out, _ = sdpa_attention_forward(layer, q, k, v, None, scaling=scaling)
        intensity = torch.zeros(1)
    else:
        mask = torch.full((length, length), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)[None, None]
        out, attn = eager_attention_forward(layer, q, k, v, mask, scaling=scaling)
        mass = (attn @ keys[0].to(attn.dtype)).float()  # [1, H, L]: no second copy of the matrix
        intensity = mean_over_queries(mass, ~keys, keys).mean(-1)
    if backward:
        (out.float().mean() + intensity.sum()).backward()
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "side": side,
        "dtype": dtype,
        "length": length,
        "backward": backward,
        "peak_above_inputs_gb": (peak - before) / GB,
        "inputs_gb": 3 * q.numel() * q.element_size() / GB,
        "matrix_gb": HEADS * length**2 * q.element_size() / GB,
        "intensity": float(intensity.detach()),
    }


def in_a_fresh_process(side: str, dtype: str, length: int, backward: bool) -> dict:
    command = [sys.executable, __file__, "--one", side, dtype, str(length), str(int(backward))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=8192, help="tokens (Emu3: about 8 000 an image)")
    parser.add_argument("--eager-lengths", type=int, nargs="+", default=[1024, 1536, 2048])
    parser.add_argument(
        "--cases",
        nargs="+",
        default=["float32:forward", "bfloat16:forward", "float32:backward", "bfloat16:backward"],
        help="DTYPE:forward or DTYPE:backward (forward and backward); cases already in --out are kept",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "capture_memory.json")
    parser.add_argument(
        "--one", nargs=4, metavar=("SIDE", "DTYPE", "LENGTH", "BACKWARD"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.one:
        side, dtype, length, backward = args.one
        print(json.dumps(one(side, dtype, int(length), backward == "1")))
        return

    rows, extrapolated = [], []
    print(f"{HEADS} heads of {HEAD_DIM}, {args.length} tokens; GB above q, k and v")
    print(f"{'dtype':10}{'pass':>18}{'sdpa':>8}{'capture':>9}{'eager':>20}{'matrix alone':>14}")
    for case in args.cases:
        dtype, _, passes = case.partition(":")
        backward = passes == "backward"
        here = [in_a_fresh_process(side, dtype, args.length, backward) for side in ("sdpa", "capture")]
        eager = [in_a_fresh_process("eager", dtype, n, backward) for n in args.eager_lengths]
        full = extrapolate(eager, args.length)
        rows += [*here, *eager]
        extrapolated.append(full)
        sdpa, ours = (r["peak_above_inputs_gb"] for r in here)
        name = "forward, backward" if backward else "forward"
        guess = f"{full['peak_above_inputs_gb']:.1f} (extrapolated)"
        print(
            f"{dtype:10}{name:>18}{sdpa:8.2f}{ours:9.2f}{guess:>20}{here[0]['matrix_gb']:14.2f}", flush=True
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine(), "measured": rows, "extrapolated": extrapolated}
    if args.out.exists() and (old := json.loads(args.out.read_text()))["machine"] == result["machine"]:
        for part in ("measured", "extrapolated"):
            new = {_key(row) for row in result[part]}
            result[part] = [row for row in old[part] if _key(row) not in new] + result[part]
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.out}")


def extrapolate(eager: list[dict], length: int) -> dict:
    """Least squares through the origin of the peak against length^2: what eager would need at `length`."""
    squares, peaks = [r["length"] ** 2 for r in eager], [r["peak_above_inputs_gb"] for r in eager]
    slope = sum(s * p for s, p in zip(squares, peaks, strict=True)) / sum(s * s for s in squares)
    return {
        "side": "eager, extrapolated",
        "dtype": eager[0]["dtype"],
        "length": length,
        "backward": eager[0]["backward"],
        "peak_above_inputs_gb": slope * length**2,
        "largest_relative_misfit": max(abs(slope * s / p - 1) for s, p in zip(squares, peaks, strict=True)),
    }


def _key(row: dict) -> tuple:
    return row["side"], row["dtype"], row["length"], row["backward"]


def machine() -> dict:
    import psutil
    import torch
    import transformers

    return {
        "cpu": cpu_name(),
        "threads": 1,
        "memory_gb": round(psutil.virtual_memory().total / GB, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    main()
