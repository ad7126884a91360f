"""`minimal-aia evaluate generation`: draw a benchmark's prompts into the folders that its scorer reads."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimal_aia.console import add_command, not_negative, number, positive
from minimal_aia.evaluation.prompts import (
    Layout,
    Prompt,
    check_images,
    missing,
    prepare,
    read_prompts,
    save,
    write_whole,
)
from minimal_aia.profile_command import add_loading, check_task, load

if TYPE_CHECKING:
    from minimal_aia.models.base import Adapter

HELP = """\
Draw the pictures of a generation benchmark. Scoring them is the benchmark's own business (GenEval needs
mmdet 2.x, DPG-Bench the mPLUG model, each in an environment of its own): this writes what their scorers read.

GenEval (https://github.com/djghosh13/geneval), four pictures a prompt:

  minimal-aia evaluate generation --model weights/janus-pro-7b --dtype bfloat16 \\
      --prompts geneval/prompts/evaluation_metadata.jsonl --out geneval_images

DPG-Bench (https://github.com/TencentQQGYLab/ELLA), grids of four:

  minimal-aia evaluate generation --model weights/janus-pro-7b --dtype bfloat16 \\
      --prompts ELLA/dpg_bench/prompts --out dpg_images

The same on eight GPUs; prompts are split over them:

  accelerate launch --multi_gpu --num_processes 8 -m minimal_aia.cli evaluate generation --processes 8 ...

Every picture has a seed made of --seed, its prompt and its number, so a subset (--limit) is part of the whole
whatever the batch size. A killed run goes on where it stopped when the same command is given again.
Comparable scores need the same prompts (some published GenEval scores use rewritten, longer ones), the same
number of pictures and the same guidance; all of them are kept in OUT.run.json, beside the folder."""


def export(
    adapter: Adapter,
    prompts: Sequence[Prompt],
    layout: Layout,
    out: str | Path,
    *,
    images: int = 4,
    seed: int = 0,
    guidance: float | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    batch_size: int = 16,
    limit: int | None = None,
    progress: bool = True,
) -> int:
    """Draw `images` pictures for each of the first `limit` prompts; returns how many this process drew.

    guidance, top_k: None for the family's own (Janus 5 and all codes, Emu3 3 and 2 048, lab models 1).
    batch_size: pictures drawn at a time; no picture depends on it. Under `accelerate launch` each process
    draws its own share of the prompts. What is complete in `out` stays; settings lie in `<out>.run.json`.

    Raises ValueError for prompts that the model cannot take, impossible settings, or a folder that was made
    with other settings; MemoryError if a batch does not fit.
    """
    import torch
    from accelerate import PartialState
    from tqdm.auto import tqdm

    from minimal_aia.models.draw import draw, image_seed

    check_images(layout, images)
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, must be above 0")
    mine, out, state = adapter.drawer(), Path(out), PartialState()
    chosen = prompts[:limit]
    reasons = [f"{p.id}: {reason}" for p in chosen if (reason := adapter.bad_text(p.text))]
    if reasons:
        more = [f"and {len(reasons) - 10} more"] if len(reasons) > 10 else []
        shown = "\n  ".join(reasons[:10] + more)
        raise ValueError(f"{adapter.name} cannot draw these prompts:\n  {shown}")
    asked = {
        "model": adapter.name,
        "family": adapter.family,
        "dtype": str(adapter.dtype).removeprefix("torch."),
        "layout": layout,
        "images": images,
        "seed": seed,
        "guidance": mine.guidance if guidance is None else guidance,
        "temperature": temperature,
        "top_k": mine.top_k if top_k is None else top_k,
    }
    text = _check_settings(adapter, prompts, out, asked)
    state.wait_for_everyone()  # all have looked before any writes
    if text and state.is_main_process:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(settings_file(out), lambda half: half.write_text(text, encoding="utf-8"), out)
    state.wait_for_everyone()

    share = chosen[state.process_index :: state.num_processes]
    jobs: list[tuple[Prompt, int]] = []
    for prompt in share:
        prepare(layout, out, prompt)
        jobs += [(prompt, i) for i in missing(layout, out, prompt, images)]
    drawn: dict[Prompt, dict[int, Any]] = {}
    with tqdm(
        total=images * len(share),
        initial=images * len(share) - len(jobs),
        desc=f"{adapter.name} {layout}",
        unit="picture",
        disable=not (progress and state.is_main_process),
    ) as bar:
        for first in range(0, len(jobs), batch_size):
            batch = jobs[first : first + batch_size]
            seeds = [image_seed(seed, prompt.id, number) for prompt, number in batch]
            try:
                texts = [prompt.text for prompt, _ in batch]
                pictures = draw(mine, texts, seeds, guidance=guidance, temperature=temperature, top_k=top_k)
            except torch.OutOfMemoryError as error:
                raise MemoryError(f"out of memory drawing {len(batch)} at a time: --batch-size") from error
            for (prompt, number), picture in zip(batch, pictures, strict=True):
                drawn.setdefault(prompt, {})[number] = picture
                if layout == "geneval" or len(drawn[prompt]) == images:
                    save(layout, out, prompt, drawn.pop(prompt))
            bar.update(len(batch))
    state.wait_for_everyone()
    return len(jobs)


def settings_file(out: Path) -> Path:
    """Beside the folder: DPG-Bench's scorer takes every file inside for a picture."""
    return out.with_name(f"{out.name}.run.json")


def _check_settings(
    adapter: Adapter, prompts: Sequence[Prompt], out: Path, asked: dict[str, Any]
) -> str | None:
    """What the settings file is to say; None if it says so already. ValueError if it says something else:
    pictures of another model or other settings are never mixed with these."""
    from minimal_aia.resume import fingerprint

    texts = json.dumps([[p.id, p.text, p.line] for p in prompts]).encode()
    asked = {
        **asked,
        "prompts": hashlib.sha256(texts).hexdigest(),
        "weights": fingerprint(adapter.model, {}),
    }
    file = settings_file(out)
    if not file.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise ValueError(f"{out}: is not empty and {file} is missing; choose another --out")
        versions = {name: version(name) for name in ("minimal-aia", "torch", "transformers")}
        return json.dumps({**asked, "versions": versions, "device": adapter.device.type}, indent=2) + "\n"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        differ = [key for key in asked if asked[key] != found.get(key)]
    except (ValueError, AttributeError):
        raise ValueError(f"{file}: not a settings file; delete it and {out} to start over") from None
    if differ:
        key = differ[0]
        raise ValueError(
            f"{out}: was drawn with another {' and another '.join(differ)} ({file.name} says {key} "
            f"{found.get(key)!r}, now {asked[key]!r}); choose another --out, or delete both to start over"
        )
    return None


def add_generation(kinds: Any) -> argparse.ArgumentParser:
    """Add `evaluate generation`."""
    summary = "draw the pictures of GenEval or DPG-Bench, ready for their scorers"
    command = add_command(kinds, "generation", run, summary, HELP)
    add = command.add_argument
    add("--model", required=True, help="lab/unified, ..., a Janus or Emu3 folder, or a hub id")
    add(
        "--prompts",
        required=True,
        metavar="PATH",
        help="evaluation_metadata.jsonl, or a folder of .txt files",
    )
    add("--out", required=True, type=Path, metavar="FOLDER", help="where the pictures go")
    add("--images", type=positive, default=4, metavar="N", help="pictures a prompt (default 4)")
    add("--limit", type=positive, metavar="N", help="only the first N prompts")
    add(
        "--guidance",
        type=number,
        metavar="W",
        help="classifier-free guidance (default: Janus 5, Emu3 3, lab 1)",
    )
    above = partial(number, above=True)
    add("--temperature", type=above, default=1.0, metavar="T", help="of sampling (default 1)")
    add("--top-k", type=positive, metavar="K", help="sample from the K likeliest (default: all; Emu3 2048)")
    add("--seed", type=not_negative, default=0, help="other pictures of the same prompts (default 0)")
    add("--batch-size", type=positive, default=16, metavar="N", help="pictures at a time (default 16)")
    add_loading(command)
    return command


def run(args: argparse.Namespace) -> int:
    layout, prompts = read_prompts(args.prompts)
    check_images(layout, args.images)
    if args.out.is_file():
        raise ValueError(f"{args.out}: is a file; give a folder")
    check_task(args.model, args.family, "generation")
    adapter, first = load(args)
    names = ("images", "seed", "guidance", "temperature", "top_k", "batch_size", "limit")
    drawn = export(adapter, prompts, layout, args.out, **{name: getattr(args, name) for name in names})
    if first:
        print(f"{drawn} pictures drawn here, {args.out} is complete")
        print(next_step(layout, args.out, args.images))
    return 0


def next_step(layout: Layout, out: Path, images: int) -> str:
    """The scorer's command, with the one number that is easily got wrong."""
    from PIL import Image

    if layout == "geneval":
        return (
            "score them in GenEval's environment:\n"
            f"  python evaluation/evaluate_images.py {out} --outfile results.jsonl --model-path DETECTOR\n"
            "then: minimal-aia import-scores results.jsonl --model NAME --out scores.csv"
        )
    with Image.open(next(out.glob("*.png"))) as whole:
        resolution = whole.width // (2 if images == 4 else 1)
    return (
        "score them in DPG-Bench's environment:\n"
        f"  PIC_NUM={images} bash dpg_bench/dist_eval.sh {out} {resolution}\n"
        f"then: minimal-aia import-scores {out}/dpg-bench_*_results.txt --out scores.csv"
    )
