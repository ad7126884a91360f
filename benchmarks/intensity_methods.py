"""Three ways to get the mass of Eq. 1 without the [Q, K] matrix, beside plain attention: time and exactness.

    python benchmarks/intensity_methods.py

columns   `attention_with_intensity`: eight indicator columns beside the values, one fused call
rows      a second fused call, over the marked query rows only, with the indicator as the values
lse       the marked rows from the log-sum-exp: sum over marked keys of exp(q.k - LSE), with a backward of its
          own (chunks of rows); takes the LSE from PyTorch's private CPU kernel

All methods run in one process, interleaved, one thread, fp32, causal; the smallest of `--repeats` times
counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import cpu_name
from torch import Tensor

from minimal_aia.intensity import attention_with_intensity

CHUNK = 256  # query rows whose scores are in memory at once in `lse`


def columns(q: Tensor, k: Tensor, v: Tensor, rows: slice, keys: slice) -> tuple[Tensor, Tensor]:
    out, mass = attention_with_intensity(q, k, v, _key_mask(k, keys), is_causal=True)
    return out, mass[:, :, rows]


def rows(q: Tensor, k: Tensor, v: Tensor, rows: slice, keys: slice) -> tuple[Tensor, Tensor]:
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    seen = rows.stop  # later keys are invisible to every marked row
    indicator = torch.zeros_like(k[:, :, :seen])
    indicator[:, :, keys] = 1.0
    visible = torch.ones(seen, seen, dtype=torch.bool).tril()[rows]
    mass = F.scaled_dot_product_attention(q[:, :, rows], k[:, :, :seen], indicator, attn_mask=visible)
    return out, mass[..., 0]


class _MassFromLSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, lse: Tensor, rows: slice, keys: slice) -> Tensor:
        scale = q.shape[-1] ** -0.5
        mass = torch.cat(
            [_probabilities(q, k[:, :, keys], lse, r, keys.start, scale).sum(-1) for r in _chunks(rows)],
            dim=-1,
        )
        ctx.save_for_backward(q, k, lse, mass)
        ctx.rows, ctx.keys, ctx.scale = rows, keys, scale
        return mass

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, lse, mass = ctx.saved_tensors
        dq, dk, done = torch.zeros_like(q), torch.zeros_like(k), 0
        for r in _chunks(ctx.rows):
            n = r.stop - r.start
            p = _probabilities(q, k[:, :, : r.stop], lse, r, 0, ctx.scale)
            here = slice(done, done + n)
            ds = -mass[..., here, None] * p  # ds = g * p * (marked - mass)
            ds[..., ctx.keys] += p[..., ctx.keys]
            ds *= grad[..., here, None] * ctx.scale
            dq[:, :, r] = ds @ k[:, :, : r.stop]
            dk[:, :, : r.stop] += ds.transpose(-1, -2) @ q[:, :, r]
            done += n
        return dq, dk, None, None, None


def lse(q: Tensor, k: Tensor, v: Tensor, rows: slice, keys: slice) -> tuple[Tensor, Tensor]:
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    return out, _MassFromLSE.apply(q, k, log_sum.detach(), rows, keys)


def _probabilities(q: Tensor, k: Tensor, lse: Tensor, r: slice, first_key: int, scale: float) -> Tensor:
    p = (q[:, :, r] @ k.transpose(-1, -2) * scale - lse[:, :, r, None]).exp_()
    if first_key + k.shape[2] > r.start:  # otherwise every key lies before every row
        position = torch.arange(first_key, first_key + k.shape[2])
        p.masked_fill_(position > torch.arange(r.start, r.stop)[:, None], 0.0)
    return p


def _chunks(rows: slice) -> list[slice]:
    return [slice(i, min(i + CHUNK, rows.stop)) for i in range(rows.start, rows.stop, CHUNK)]


def _key_mask(k: Tensor, keys: slice) -> Tensor:
    mask = torch.zeros(k.shape[0], k.shape[2], dtype=torch.bool)
    mask[:, keys] = True
    return mask


def plain(q: Tensor, k: Tensor, v: Tensor, rows: slice, keys: slice) -> tuple[Tensor, Tensor]:
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out, out[..., 0]


METHODS = {"plain": plain, "columns": columns, "rows": rows, "lse": lse}


def measure(length: int, heads: int, head_dim: int, rows: slice, keys: slice, repeats: int) -> dict:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, head_dim, requires_grad=True) for _ in range(3))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS}
    masses, grads = {}, {}
    for _ in range(repeats):
        for name, method in METHODS.items():
            start = time.perf_counter()
            out, mass = method(q, k, v, rows, keys)
            middle = time.perf_counter()
            grads[name] = torch.autograd.grad(out.sum() + mass.square().sum(), (q, k, v))
            times[name].append((middle - start, time.perf_counter() - start))
            masses[name] = mass.detach()
    return {
        name: {
            "forward_s": min(t[0] for t in times[name]),
            "forward_backward_s": min(t[1] for t in times[name]),
            "max_mass_difference": None if name == "plain" else _gap(masses[name], masses["columns"]),
            "max_gradient_difference": None
            if name == "plain"
            else max(_gap(a, b) for a, b in zip(grads[name], grads["columns"], strict=True)),
        }
        for name in METHODS
    }


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "intensity_methods.json"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    n = args.length
    cases = {  # (query rows, key columns), the proportions of the paper's two tasks
        "generation": (slice(n // 32, n), slice(1, n // 32)),  # a prompt of 3 %, then the image
        "understanding": (
            slice(n - n // 32, n),
            slice(n // 16, n - n // 8),
        ),  # an image of 81 %, an answer of 3 %
    }
    result = {
        "machine": {
            "cpu": cpu_name(),
            "threads": 1,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "shape": {"length": n, "heads": args.heads, "head_dim": args.head_dim, "dtype": "float32"},
        "repeats": args.repeats,
        "cases": {
            name: measure(n, args.heads, args.head_dim, r, k, args.repeats) for name, (r, k) in cases.items()
        },
    }
    print(f"{'case':15}{'method':10}{'forward':>9}{'fwd+bwd':>9}   (times plain; mass and gradient gaps)")
    for case, methods in result["cases"].items():
        for name, m in methods.items():
            f, fb = (m[key] / methods["plain"][key] for key in ("forward_s", "forward_backward_s"))
            gaps = f"{m['max_mass_difference']} {m['max_gradient_difference']}"
            print(f"{case:15}{name:10}{f:9.2f}{fb:9.2f}   {gaps}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
