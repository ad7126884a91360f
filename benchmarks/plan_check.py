"""How far `minimal-aia plan` is from what really happens: peak memory of whole training steps on a CPU.

    python benchmarks/plan_check.py            # about ten minutes on one free core, under 4 GB
    python benchmarks/plan_check.py --cases lab

Every case is a fresh process that trains two steps of both tasks (forward, backward, clipping, AdamW) with
the `SFTModule` of a real run, and reports two figures of the second:

tensors   peak of the bytes that PyTorch's allocator has handed out, by its profiler, against `Plan.peak`
process   for the larger model, how far resident memory rose above what it was before the model was made; it
          includes what the allocator keeps and the kernels' own buffers, so it is expected above the plan

The GPU's own overheads (context, NCCL, fragmentation) are assumptions of the plan that no CPU can check.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from machine import cpu_name

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "plan_check.json"
MB = 1e6

# name -> (model, sequences a task, recipe); lab: real lab batches. mid: random ids of 256 tokens.
LAB = {"per_device_train_batch_size": 32, "seed": 0}
MID = {"per_device_train_batch_size": 4, "seed": 0}
CHECKPOINTED, PLAIN, BF16 = {"gradient_checkpointing": True}, {"aia_weight": 0}, {"bf16": True}
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "lab/unified": ("lab/unified", 1, LAB),
    "lab/unified, no AIA": ("lab/unified", 1, LAB | PLAIN),
    "lab/unified, checkpointed": ("lab/unified", 1, LAB | CHECKPOINTED),
    "lab/unified, bf16": ("lab/unified", 1, LAB | BF16),
    "lab/janus": ("lab/janus", 1, LAB),
    "lab/unified, FSDP2 on two": ("lab/unified", 2, LAB | {"per_device_train_batch_size": 8}),
    "mid": ("mid", 1, MID),
    "mid, no AIA": ("mid", 1, MID | PLAIN),
    "mid, checkpointed": ("mid", 1, MID | CHECKPOINTED),
    "mid, bf16 autocast": ("mid", 1, MID | BF16),
    "mid, bf16 autocast, checkpointed": ("mid", 1, MID | BF16 | CHECKPOINTED),
    "mid, bf16 weights, LoRA, checkpointed": (
        "mid",
        1,
        MID | CHECKPOINTED | BF16 | {"dtype": "bfloat16", "lora_rank": 16},
    ),
    "mid, one task a micro-batch": ("mid", 1, MID | {"per_device_train_batch_size": 1}),
    "mid, FSDP2 on two": ("mid", 2, MID | {"per_device_train_batch_size": 2}),
    "mid, FSDP2 on two, checkpointed": ("mid", 2, MID | CHECKPOINTED | {"per_device_train_batch_size": 2}),
}
MID_SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
LENGTH = 256


def mid_folder(folder: Path) -> Path:
    """A configuration of the mid-size model, for the plan and for the run."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **MID_SHAPE}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def adapter_and_batches(model: str, config: Any) -> tuple[Any, list[dict[str, Any]]]:
    """An adapter with fresh or shipped weights, and two micro-batches."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from minimal_aia.lab.finetune import step_batches
    from minimal_aia.lab.sequences import Sequences
    from minimal_aia.models.lab import LabAdapter, as_batch, load_lab
    from minimal_aia.train.config import task_counts

    dtype = getattr(torch, config.dtype)
    if model != "mid":
        adapter = load_lab(model, dtype=dtype)
        made = [step_batches(config, step, adapter.codebook) for step in range(2)]
        return adapter, [
            {task: as_batch(rows, task, ["x"] * len(rows.ids)) for task, rows in m.items()} for m in made
        ]
    torch.manual_seed(0)
    codebook = load_lab("lab/unified").codebook
    net = LlamaForCausalLM(LlamaConfig(**MID_SHAPE)).to(dtype)
    half = torch.arange(LENGTH) >= LENGTH // 2

    def rows(task: str, n: int) -> Any:
        ids = torch.randint(0, MID_SHAPE["vocab_size"], (n, LENGTH))
        marks = half.expand(n, -1)
        sequences = Sequences(ids, torch.ones_like(marks), marks, ~marks, marks, torch.zeros(n, 3, 24, 24))
        return as_batch(sequences, task, ["x"] * n)

    batches = [{task: rows(task, n) for task, n in task_counts(config, step).items()} for step in range(2)]
    return LabAdapter("mid", net, codebook, ("generation", "understanding")), batches


def run_case(name: str) -> None:
    """One case in this process; prints a JSON line."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    from minimal_aia.targets import Stage, StageTargets
    from minimal_aia.train.activations import Rows
    from minimal_aia.train.config import TrainConfig
    from minimal_aia.train.layout import Layout
    from minimal_aia.train.module import SFTModule
    from minimal_aia.train.plan import plan

    model, world, recipe = CASES[name]
    config = TrainConfig(model=model, **recipe)
    if world > 1:
        torch.distributed.init_process_group("gloo")
    adapter_and_batches(
        "lab/unified", TrainConfig(per_device_train_batch_size=2)
    )  # everything is imported now
    before = _resident()
    profiled = os.environ.get("PLAN_CHECK_PROFILE") == "1"
    watch = profile(activities=[ProfilerActivity.CPU], profile_memory=True) if profiled else None
    if watch:
        watch.start()
    adapter, batches = adapter_and_batches(model, config)
    n_layers = len(adapter.layers())
    stages = (Stage(0, n_layers - 1, 0.2, 0.05),)
    module: Any = SFTModule(adapter, config, StageTargets(stages, stages)).train()
    if world > 1:
        from torch.distributed.fsdp import fully_shard

        for layer in adapter.layers():
            fully_shard(layer)
        fully_shard(module)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    for step, batch in enumerate(batches):
        with record_function(f"step {step}"):
            with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
                loss, logs = module(batch, config.weights())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            del loss, logs
    found: dict[str, Any] = {"process": _peak_resident() - before}
    if watch:
        watch.stop()
        found["tensors"] = _peak_of(watch, "step 1")
    if world > 1 and torch.distributed.get_rank():
        return
    rows = {
        task: Rows(len(b), b.attention_mask.shape[1], round(int(b.inputs["label_mask"].sum()) / len(b)))
        for task, b in batches[1].items()
    }
    folder = mid_folder(ROOT / "runs" / "plan_check") if model == "mid" else None
    planned = plan(
        TrainConfig(model=str(folder or model), **recipe),
        Layout.of("fsdp2", world) if world > 1 else Layout(),
        rows=rows,
    )
    found |= {"plan": planned.peak, "moment": planned.moment, "parts": planned.memory[planned.moment]}
    print(json.dumps(found), flush=True)


def _peak_of(watch: Any, span: str) -> int:
    """The most bytes at once while `span` ran, from all allocations and releases since the profiler began."""
    events = watch.profiler.kineto_results.events()
    (wanted,) = [e for e in events if e.name() == span]
    begin, end = wanted.start_ns(), wanted.start_ns() + wanted.duration_ns()
    now = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        if begin <= event.start_ns() <= end:
            peak = max(peak, now)
    return peak


def _resident() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def _peak_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str) -> dict[str, Any]:
    """A case in fresh processes: once under the profiler, and once without it for resident memory."""
    _, world, _ = CASES[name]
    command = [sys.executable] if world == 1 else ["torchrun", "--standalone", f"--nproc_per_node={world}"]
    if world > 1:
        command[0] = str(Path(sys.executable).parent / "torchrun")
    found = []
    for profiled in ("1", "0"):
        # large blocks come from the system and go back to it, or resident memory would only ever grow
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        env |= {"OMP_NUM_THREADS": "1", "PLAN_CHECK_PROFILE": profiled}
        done = subprocess.run(
            [*command, __file__, "--case", name], env=env, capture_output=True, text=True, cwd=ROOT
        )
        if done.returncode:
            raise RuntimeError(f"{name}:\n{done.stderr[-3000:]}")
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
        if not name.startswith("mid") or world > 1:
            break
    result = {
        "plan_mb": round(found[0]["plan"] / MB, 2),
        "tensors_mb": round(found[0]["tensors"] / MB, 2),
        "error_percent": round(100 * (found[0]["plan"] / found[0]["tensors"] - 1), 1),
        "moment": found[0]["moment"],
    }
    if len(found) > 1:
        result["process_mb"] = round(found[1]["process"] / MB, 1)
        result["process_error_percent"] = round(100 * (found[1]["plan"] / found[1]["process"] - 1), 1)
    print(
        f"{name:40} {json.dumps(result)} { ({k: round(v / MB, 1) for k, v in found[0]['parts'].items()}) }",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--cases", default="", help="only cases whose name starts so")
    args = parser.parse_args()
    if args.case:
        return run_case(args.case)
    import torch
    import transformers

    results = {name: measure(name) for name in CASES if name.startswith(args.cases)}
    if args.cases:
        return None
    about = {
        "made_by": "benchmarks/plan_check.py",
        "machine": cpu_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cases": results,
    }
    OUT.write_text(json.dumps(about, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
