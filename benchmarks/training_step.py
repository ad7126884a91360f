"""A training step on both tasks: plain SFT, with AIA, with eager attention, and as the released recipe.

    python benchmarks/training_step.py             # minutes on one CPU core
    python benchmarks/training_step.py --device cuda --shape janus-pro-1b --dtype bfloat16

sft              fused attention, logits at label positions, padding to the longest sample; no AIA
aia              the same with `capture` and the AIA loss
eager            the AIA loss from `output_attentions=True`: all matrices of all layers kept; else as sft
authors-recipe   eager, padding to 1 000 + 576 (generation) and 3 000 tokens (understanding), logits over
                 the whole sequence, Python loops over layers and samples: the cost model of the released
                 code, written from its description

The model is the language model of Janus-Pro at a smaller size, fed with embeddings: vision encoder and VQ
tokenizer are frozen and cost all sides the same. 576 image tokens; prompts and answers have log-normal
lengths (medians 60 and 120 tokens, spread 0.6, cut at 400): an assumption, not measured on the paper's data.
Sides run in turn in one process; the median of the repeats counts, in processor time on a CPU. Peak memory
is that of a fresh process, above what it held before the step.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import cpu_name, reset_peak
from machine import peak as memory_peak
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import minimal_aia as aia

IMAGE = 576
FIXED = {"generation": 1000 + IMAGE, "understanding": 3000}
SHAPES = {  # hidden, feed-forward, layers, heads, vocabulary; the last two are deepseek-ai's Janus-Pro
    "small": (256, 704, 6, 4, 8192),
    "janus-pro-1b": (2048, 5632, 24, 16, 102400),
    "janus-pro-7b": (4096, 11008, 30, 32, 102400),
}
SIDES = ("sft", "aia", "eager", "authors-recipe")


def samples(task: str, count: int, seed: int) -> list[tuple[int, int, int]]:
    """(tokens, end of the keys, start of the queries) of `count` samples."""
    rng = np.random.default_rng((seed, len(task)))
    median = {"generation": 60, "understanding": 120}[task]
    text = np.clip(rng.lognormal(np.log(median), 0.6, count), 8, 400).astype(int)
    if task == "generation":  # prompt (keys), image (queries)
        return [(n + IMAGE, n, n) for n in text]
    question = 20
    return [(IMAGE + question + n, IMAGE, IMAGE + question) for n in text]  # image (keys), question, answer


def batch(task: str, count: int, seed: int, length: int | None, width: int, device: str, dtype: Any) -> dict:
    rows = samples(task, count, seed)
    length = length or max(n for n, _, _ in rows)
    at = torch.arange(length, device=device)
    ends, keys, starts = (torch.tensor(column, device=device)[:, None] for column in zip(*rows, strict=True))
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(count, length, width, generator=generator).to(device, dtype)
    return {
        "task": task,
        "embeds": embeds.requires_grad_(),  # the aligner behind it is trained
        "mask": (at < ends).long(),
        "query": (at >= starts) & (at < ends),
        "key": at < keys,
        "labels": torch.randint(0, 1000, (count, length), generator=generator).to(device),
    }


def step(model: Any, side: str, batches: list[dict], aia_loss: nn.Module, weight: float = 40.0) -> float:
    """Forward and backward of both tasks, as one of the four sides does it."""
    total = 0.0
    for b in batches:
        inputs = {"inputs_embeds": b["embeds"], "attention_mask": b["mask"], "use_cache": False}
        if side == "authors-recipe":
            out = model(**inputs, output_attentions=True)
            wanted = b["query"][:, 1:]
            loss = nn.functional.cross_entropy(out.logits[:, :-1][wanted].float(), b["labels"][:, 1:][wanted])
            loss = loss + weight * looped(out.attentions, b, aia_loss)
        else:
            if side == "aia":
                with aia.capture(model, b["query"], b["key"]) as record:
                    hidden = model.model(**inputs).last_hidden_state
                intensity = record.intensity
            else:
                out = model.model(**inputs, output_attentions=side == "eager")
                hidden = out.last_hidden_state
                if side == "eager":
                    layers = [aia.intensity_from_attention(a, b["query"], b["key"]) for a in out.attentions]
                    intensity = torch.stack(layers)
            wanted = b["query"][:, 1:]
            logits = model.lm_head(hidden[:, :-1][wanted])
            loss = nn.functional.cross_entropy(logits.float(), b["labels"][:, 1:][wanted])
            if side != "sft":
                loss = loss + weight * aia_loss(intensity, b["task"])
        loss.backward()
        total += loss.item()
    model.zero_grad(set_to_none=True)
    return total


def looped(attentions: tuple[Tensor, ...], b: dict, aia_loss: Any) -> Tensor:
    """Eq. 2 sample by sample and layer by layer."""
    target, delta = aia_loss.targets.tensors(b["task"], len(attentions), b["mask"].device)
    total = torch.zeros((), device=b["mask"].device)
    for layer, attention in enumerate(attentions):
        for i in range(len(attention)):
            rows = attention[i][:, b["query"][i]][..., b["key"][i]]  # [H, queries, keys]
            x = rows.float().sum(-1).mean() - target[layer]
            small = x.abs() <= delta[layer]
            total = total + torch.where(small, x**2 / 2, delta[layer] * (x.abs() - delta[layer] / 2))
    return total / (len(attentions) * len(b["mask"]))


def make(args: argparse.Namespace) -> tuple[Any, nn.Module]:
    hidden, feed, layers, heads, vocabulary = SHAPES[args.shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=feed, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=16384,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(args.device, getattr(torch, args.dtype)).train()
    return model, aia.AIALoss(aia.StageTargets.paper("janus-pro", layers))


def prepare(model: Any, side: str, args: argparse.Namespace, seed: int) -> list[dict]:
    model.set_attn_implementation("eager" if side in ("eager", "authors-recipe") else "sdpa")
    width, dtype = model.config.hidden_size, next(model.parameters()).dtype
    fixed = FIXED if side == "authors-recipe" else dict.fromkeys(FIXED)
    return [batch(task, args.batch, seed, fixed[task], width, args.device, dtype) for task in FIXED]


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def timed(args: argparse.Namespace) -> dict[str, list[float]]:
    model, aia_loss = make(args)
    times: dict[str, list[float]] = {side: [] for side in args.sides}
    for repeat in range(args.repeats + 1):
        for side in args.sides:
            batches = prepare(model, side, args, repeat)
            start = clock(args.device)
            step(model, side, batches, aia_loss)
            if repeat:  # the first round warms up
                times[side].append(clock(args.device) - start)
        print(f"round {repeat} of {args.repeats}", file=sys.stderr, flush=True)
    return times


def peak(args: argparse.Namespace, side: str) -> float:
    """Bytes above those held before the step, of one side alone in this process."""
    model, aia_loss = make(args)
    for p in model.parameters():  # gradients are there on all sides before the step counts
        p.grad = torch.zeros_like(p)
    batches = prepare(model, side, args, seed=1)
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(model, side, batches, aia_loss)
        return torch.cuda.max_memory_allocated() - before
    before = reset_peak()
    step(model, side, batches, aia_loss)
    return memory_peak() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=2, help="samples a task")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training_step.json")
    parser.add_argument("--peak", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        print(json.dumps(peak(args, args.peak)))
        return
    times = timed(args)
    same = [f"--{name}={getattr(args, name)}" for name in ("shape", "device", "dtype", "batch")]
    peaks = {}
    for side in args.sides:
        command = [sys.executable, __file__, *same, "--peak", side]
        peaks[side] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    median = {side: statistics.median(values) for side, values in times.items()}
    result = {
        "machine": machine(args.device),
        "shape": dict(zip(("hidden", "feed_forward", "layers", "heads", "vocabulary"), SHAPES[args.shape])),
        "batch": args.batch,
        "dtype": args.dtype,
        "seconds": times,
        "median_s": median,
        "peak_bytes": peaks,
        "time_over_sft": {side: value / median["sft"] for side, value in median.items()},
        "memory_over_sft": {side: value / peaks["sft"] for side, value in peaks.items()},
    }
    for side in args.sides:
        print(f"{side:16}{median[side]:8.2f} s {result['time_over_sft'][side]:7.2f} x sft  "
              f"{peaks[side] / 1e6:8.0f} MB {result['memory_over_sft'][side]:7.2f} x sft")  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def machine(device: str) -> dict:
    import transformers

    name = cpu_name() if device == "cpu" else torch.cuda.get_device_name()
    return {"device": name, "threads": 1, "python": platform.python_version(),
            "torch": torch.__version__, "transformers": transformers.__version__}  # fmt: skip


if __name__ == "__main__":
    main()
