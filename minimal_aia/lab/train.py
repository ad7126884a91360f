"""Train the lab's models from a seed: `python -m minimal_aia.lab.train unified --seed 0`.

Every step sees fresh scenes, 8 a task. The data of step t depends on (seed, task, t) alone, so a run that
was interrupted goes on with the same data, and models of one seed see the same scenes in the same order.

`--constant-rate` stops without lowering the learning rate: an early checkpoint, for fine-tuning.
`--aia-weight 40` adds the AIA loss from the first step on; `--targets lab-wrong` is its control.
`--scale small --device cuda` trains models a hundred times as large, ten times as long.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers.models.janus.modeling_janus import JanusVisionModel, JanusVQVAE

from minimal_aia.capture import capture
from minimal_aia.console import Parser, a_device, nearest, not_negative, number, positive, start
from minimal_aia.lab import images, models, vision, vq
from minimal_aia.lab.muon import Muon
from minimal_aia.lab.references import lab_targets
from minimal_aia.lab.sequences import draw_batch
from minimal_aia.loss import AIALoss, total_loss

TASK_NUMBER = {"generation": 0, "understanding": 1}


@dataclass
class Settings:
    """One set-up for all lab models; fixed before any model was trained with an AIA loss."""

    steps: int = 3000
    batch: int = 8  # sequences a task and step
    muon_lr: float = 0.01
    adam_lr: float = 3e-3
    warmup: int = 50
    save_every: int = 500
    decay: bool = True  # False: no cosine, the rate stays up to the last step
    aia_weight: float = 0.0  # λ of Eq. 3, from the first step on
    targets: str = "lab"  # of the AIA loss: a name of `references.lab_targets`
    scale: str = "laptop"  # a key of `models.SCALES`


def data_rng(seed: int, task: str, step: int) -> np.random.Generator:
    return np.random.default_rng((seed, TASK_NUMBER[task], step))


def optimizers(model: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformer layers, AdamW for embeddings, heads, norms and biases."""
    muon: list[nn.Parameter] = []
    adam: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (muon if p.ndim == 2 and ".layers." in name else adam).append(p)
    return [
        Muon(muon, lr=settings.muon_lr),
        torch.optim.AdamW(adam, lr=settings.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(step: int, settings: Settings) -> float:
    """Share of the full learning rate: linear warm-up, then cosine to zero (or constant)."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    if not settings.decay:
        return 1.0
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.5 * (1 + float(np.cos(np.pi * done)))


def train(
    name: str,
    seed: int,
    out: Path,
    codebook: np.ndarray,
    settings: Settings | None = None,
    parts: dict[str, nn.Module] | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> nn.Module:
    """Train one model, saving its state every `save_every` steps; a second call goes on where it stopped."""
    settings = settings or Settings()
    aia = AIALoss(lab_targets(settings.targets)) if settings.aia_weight else None
    model: Any = models.build(name, seed, parts, settings.scale)
    model.to(device).train()
    if models.is_janus(model):
        models.freeze(model)
    opts = optimizers(model, settings)
    log: list[dict] = []
    start, seconds = 0, 0.0
    state_file = out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=device)
        if state["settings"] != vars(settings):
            raise ValueError(
                f"{state_file} was made with other settings: delete the folder {out} or choose another"
            )
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        start, seconds, log = state["step"], state["seconds"], state["log"]
    out.mkdir(parents=True, exist_ok=True)
    clock = time.process_time()
    bar = tqdm(range(start, settings.steps), desc=f"{name} seed {seed}", initial=start, total=settings.steps,
               disable=not progress, mininterval=5)  # fmt: skip
    for step in bar:
        for opt, full in zip(opts, (settings.muon_lr, settings.adam_lr), strict=True):
            for group in opt.param_groups:
                group["lr"] = full * rate(step, settings)
        losses = {}
        for task in models.TASKS[name]:
            batch = draw_batch(task, settings.batch, data_rng(seed, task, step), codebook).to(device)
            if aia:
                with capture(model, batch.query_mask, batch.key_mask) as record:
                    loss = models.next_token_loss(model, batch, task)
                total_loss(loss, aia(record.intensity, task), settings.aia_weight).backward()
            else:
                loss = models.next_token_loss(model, batch, task)
                loss.backward()
            losses[task] = loss.item()
        if not all(np.isfinite(value) for value in losses.values()):
            raise FloatingPointError(
                f"{name} seed {seed}: loss {losses} at step {step}; the last state is kept"
            )
        for opt in opts:
            opt.step()
            opt.zero_grad()
        if step % 10 == 0:
            log.append({"step": step, **losses})
            bar.set_postfix({task[:3]: f"{value:.3f}" for task, value in losses.items()})
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            state = {
                "settings": vars(settings),
                "model": model.state_dict(),
                "optimizers": [opt.state_dict() for opt in opts],
                "step": step + 1,
                "seconds": seconds + time.process_time() - clock,
                "log": log,
            }
            torch.save(state, state_file.with_suffix(".tmp"))
            os.replace(state_file.with_suffix(".tmp"), state_file)
    model.eval()
    models.save(model, codebook, out)
    seconds += time.process_time() - clock
    summary = {"name": name, "seed": seed, **vars(settings), "cpu_seconds": round(seconds), "log": log,
               "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}  # fmt: skip
    (out / "training.json").write_text(json.dumps(summary) + "\n")
    state_file.unlink(missing_ok=True)
    return model


def frozen_parts(folder: Path, codebook: np.ndarray) -> dict[str, Any]:
    """The Janus-like model's image tokenizer and vision encoder; made once for all seeds, then read back."""
    makers = {
        "vqmodel": (JanusVQVAE, lambda: vq.distill(codebook)),
        "vision_model": (JanusVisionModel, lambda: vision.pretrain()[0]),
    }
    parts = {}
    for name, (kind, make) in makers.items():
        if not (folder / name / "config.json").exists():
            make().save_pretrained(folder / name)
        parts[name] = kind.from_pretrained(folder / name).eval()
    return parts


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m minimal_aia.lab.train", description=__doc__.splitlines()[0])
    parser.add_argument(
        "models", nargs="*", default=list(models.NAMES), help=f"any of {', '.join(models.NAMES)}"
    )
    parser.add_argument("--seed", type=not_negative, nargs="+", default=[0], help="one run a model and seed")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/lab"), help="parent folder; runs go to MODEL-seedN"
    )
    parser.add_argument("--scale", choices=models.SCALES, default=Settings.scale, help="small: for a GPU")
    parser.add_argument(
        "--steps", type=positive, help=f"default {Settings.steps}, ten times that at scale small"
    )
    parser.add_argument("--batch", type=positive, default=Settings.batch, help="sequences a task and step")
    parser.add_argument(
        "--constant-rate", action="store_true", help="keep the learning rate up: an early checkpoint"
    )
    parser.add_argument("--aia-weight", type=number, default=0.0, help="λ; 0 trains without the AIA loss")
    parser.add_argument(
        "--targets", default=Settings.targets, help="whose curves AIA aims at: lab, lab-wrong, ..."
    )
    parser.add_argument("--device", type=a_device, default="cpu", help="cpu, cuda, cuda:1, mps")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.models) - set(models.NAMES)):
        close = nearest(unknown[0], models.NAMES)
        parser.error(f"unknown model {', '.join(unknown)}: choose from {', '.join(models.NAMES)}{close}")
    if args.scale != "laptop" and "janus" in args.models:
        parser.error("janus comes in laptop scale only: name the other models")
    settings = Settings(
        steps=args.steps or Settings.steps * (1 if args.scale == "laptop" else 10),
        batch=args.batch,
        decay=not args.constant_rate,
        aia_weight=args.aia_weight,
        targets=args.targets,
        scale=args.scale,
    )
    if args.aia_weight:
        try:
            lab_targets(settings.targets)
        except ValueError as wrong:
            parser.error(str(wrong))
    args.out.mkdir(parents=True, exist_ok=True)
    codebook = images.fit_codebook()
    parts = frozen_parts(args.out / "parts", codebook) if "janus" in args.models else None
    for seed in args.seed:
        for name in args.models:
            out = args.out / f"{name}-seed{seed}"
            if (out / "training.json").exists():
                print(f"{out}: already trained")
                continue
            train(name, seed, out, codebook, settings, parts, args.device)
            print(f"{out}: done")


if __name__ == "__main__":
    start("python -m minimal_aia.lab.train", main)
