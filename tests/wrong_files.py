"""A folder of things that people hand to a command by mistake; the cases of wrong_arguments.txt name them."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

from safetensors.numpy import load_file, save_file

from minimal_aia.paths import DATA

BOM = b"\xef\xbb\xbf"
GARBAGE = bytes(range(256)) * 8
GENERATION = {
    "conversations": [{"from": "human", "value": "a red square"}, {"from": "gpt", "value": "<image>"}]
}
UNDERSTANDING = {
    "image": "a picture.png",
    "conversations": [
        {"from": "human", "value": "<image>\nis there a circle ?"},
        {"from": "gpt", "value": "yes"},
    ],
}
RECIPE = "model: lab/unified\nmax_steps: 2\nuse_cpu: true\nreport_to: none\n"
DATA_RECIPE = (
    RECIPE + "generation_data: target.jsonl\nunderstanding_data: good.jsonl\nper_device_train_batch_size: 2\n"
)
SWEEP = """\
name: two
question: does it end?
base: {max_steps: 2, model: lab/unified}
seeds: [0]
baseline: plain
arms:
  plain: {aia_weight: 0}
  aia: {}
"""
STAGES = "generation:\n- {first_layer: 0, last_layer: 7, target: 0.4, delta: 0.1}\n"
STAGES += STAGES.replace("generation", "understanding")
GENEVAL = {"filename": "0.png", "tag": "counting", "correct": True, "metadata": "{}"}


def make(folder: Path) -> Path:
    """Fill an empty folder; every kind of wrongness that a file can have, for every kind of file."""
    where = folder.joinpath

    def text(name: str, content: str) -> None:
        where(name).write_bytes(content.encode())

    def lines(name: str, *objects: object) -> None:
        text(name, "".join((o if isinstance(o, str) else json.dumps(o)) + "\n" for o in objects))

    where("folder").mkdir()
    text("file.txt", "a file\n")
    for suffix in ("jsonl", "yaml", "json", "csv", "parquet", "txt", "safetensors", "pth", "ipynb"):
        text(f"empty.{suffix}", "")
        where(f"garbage.{suffix}").write_bytes(GARBAGE)
        where(f"full.{suffix}").symlink_to("/dev/full")  # a disk without space, on every Linux
    shutil.copy(DATA / "images/lab/000.png", where("a picture.png"))
    where("broken.png").write_bytes(where("a picture.png").read_bytes()[:60])

    # samples
    target = {**GENERATION, "image": "a picture.png"}
    lines("good.jsonl", UNDERSTANDING)
    lines("prompts.jsonl", GENERATION)
    lines("target.jsonl", target)
    lines("both.jsonl", GENERATION, UNDERSTANDING)
    lines("row.jsonl", target, {"conversations": []})
    where("packed.jsonl").write_bytes(gzip.compress(b"{}\n"))
    where("utf16.jsonl").write_bytes(json.dumps(target).encode("utf-16"))
    lines("list.jsonl", "[", json.dumps(target), "]")
    lines("torn.jsonl", target, '{"image": ')
    lines("lost-picture.jsonl", {**target, "image": "lost.png"})
    lines("broken-picture.jsonl", {**target, "image": "broken.png"})
    lines("outside.jsonl", {**target, "image": "../secret.png"})
    where("windows.jsonl").write_bytes(BOM + where("both.jsonl").read_bytes().replace(b"\n", b"\r\n"))
    where("ünï cödé 図").mkdir()
    shutil.copy(where("windows.jsonl"), where("ünï cödé 図/my sämples.jsonl"))
    shutil.copy(where("a picture.png"), where("ünï cödé 図/a picture.png"))

    # recipes
    text("good.yaml", RECIPE)
    text("data.yaml", DATA_RECIPE)
    for name, change in {
        "unknown-key": "max_stps: 3",
        "ill-typed": "max_steps: soon",
        "nested": "max_steps: [1, 2]",
        "twice": "max_steps: 3",
        "negative": "seed: -1",
        "nan": "learning_rate: .nan",
        "no-yaml": "freeze: [",
        "wrong-targets": "targets: janus-por",
        "wrong-depth": "targets: janus-pro",
        "wrong-model": "model: lab/unifeid",
        "wrong-choice": "aia_kind: hubr",
        "ratio": "task_ratio: half",
        "layers": 'aia_layers: "0-99"',
        "stages-gap": "targets: gap.yaml",
        "stages-garbage": "targets: garbage.yaml",
        "stages-folder": "targets: folder",
        "out-file": "output_dir: file.txt",
        "resume-no": "resume: no-checkpoint",
        "freeze": "freeze: visoin",
        "processes": "num_processes: 2",
    }.items():
        key = change.split(":")[0]
        kept = [line for line in RECIPE.splitlines() if not line.startswith(f"{key}:") or name == "twice"]
        text(f"{name}.yaml", "\n".join([*kept, change]) + "\n")
    for name, data in {
        "lost-data": "no.jsonl",
        "row-data": "row.jsonl",
        "folder-data": "folder",
        "garbage-data": "garbage.jsonl",
        "empty-data": "empty.jsonl",
        "broken-data": "broken-picture.jsonl",
        "parquet-data": "garbage.parquet",
    }.items():
        text(f"{name}.yaml", DATA_RECIPE.replace("target.jsonl", data))
    where("windows.yaml").write_bytes(BOM + DATA_RECIPE.replace("\n", "\r\n").encode())
    text("ünï cödé 図/my recipe.yaml", DATA_RECIPE.replace(": good.jsonl", ": ünï cödé 図/my sämples.jsonl"))

    # targets
    text("stages.yaml", STAGES)
    text("gap.yaml", STAGES.replace("first_layer: 0", "first_layer: 1"))

    # sweeps
    text("sweep.yaml", SWEEP)
    text("sweep-key.yaml", SWEEP + "armz: {}\n")
    text("sweep-no-yaml.yaml", SWEEP + "arms: [\n")
    text("sweep-arm-key.yaml", SWEEP.replace("aia_weight", "aia_wieght"))
    text("sweep-arm-type.yaml", SWEEP.replace("aia_weight: 0", "max_steps: soon"))
    text("sweep-arm-list.yaml", SWEEP.replace("{aia_weight: 0}", "[1, 2]"))
    text("sweep-base-list.yaml", SWEEP.replace("{max_steps: 2, model: lab/unified}", "[1]"))
    text("sweep-seeds.yaml", SWEEP.replace("[0]", "[zero]"))
    text("sweep-arm-seeds.yaml", SWEEP.replace("aia_weight: 0", "seeds: 3"))
    text("sweep-baseline.yaml", SWEEP.replace("baseline: plain", "baseline: plian"))
    text("sweep-model.yaml", SWEEP.replace("lab/unified", "lab/unifeid"))
    text("sweep-lost-model.yaml", SWEEP.replace("lab/unified", "no/such/model"))
    text("sweep-targets.yaml", SWEEP.replace("{}", "{targets: lab-rwa}"))
    text("sweep-items.yaml", SWEEP + "items: many\n")
    text("sweep-items-0.yaml", SWEEP + "items: 0\n")
    text("sweep-range.yaml", SWEEP.replace("max_steps: 2", "max_steps: -2"))
    text("sweep-layers.yaml", SWEEP.replace("{}", "{aia_layers: 0-99}"))
    where("sweep-windows.yaml").write_bytes(BOM + SWEEP.replace("\n", "\r\n").encode())

    # results of scorers
    lines("geneval.jsonl", GENEVAL)
    where("geneval-windows.jsonl").write_bytes(
        BOM + where("geneval.jsonl").read_bytes().replace(b"\n", b"\r\n")
    )
    lines("geneval-row.jsonl", GENEVAL, {**GENEVAL, "filename": "1.png", "correct": "yes"})
    text("lmms.json", json.dumps({"results": {"pope": {"acc,none": 0.8}}, "model_name": "m"}))
    text("lmms-nothing.json", json.dumps({"results": {"pope": {}}}))
    text("dpg.txt", "a.png, 0.5, 1.0, 0.75\nModel: m\nDPG-Bench score: 75.0\n")
    text("dpg-torn.txt", "a.png, 0.5, 1.0, 0.75\n")
    text("metadata.jsonl", '{"tag": "single_object", "include": [], "prompt": "a red square"}\n')
    text(
        "metadata-row.jsonl",
        '{"tag": "single_object", "include": [], "prompt": "a red square"}\n{"tag": 3}\n',
    )
    text("scores.csv", "model,task\nm,t\n")

    models(folder)
    text("no-cells.ipynb", "{}")
    text(
        "bad-cell.ipynb",
        '{"cells": [{"cell_type": "code"}], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}',
    )
    return folder


def models(folder: Path) -> None:
    """Model folders with one thing wrong in each."""
    good = DATA / "checkpoints/unified"
    for name in (
        "torn",
        "garbage",
        "no-weights",
        "garbage-config",
        "no-codebook",
        "bad-codebook",
        "few",
        "ünï mödel",
    ):
        shutil.copytree(good, folder / "models" / name)
    at = (folder / "models").joinpath
    weights = at("torn/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    at("garbage/model.safetensors").write_bytes(GARBAGE)
    at("no-weights/model.safetensors").unlink()
    at("garbage-config/config.json").write_bytes(GARBAGE)
    at("no-codebook/codebook.safetensors").unlink()
    at("bad-codebook/codebook.safetensors").write_bytes(GARBAGE)
    tensors = load_file(good / "model.safetensors")
    tensors.pop(next(name for name in tensors if "layers.3" in name))
    save_file(tensors, at("few/model.safetensors"), metadata={"format": "pt"})
    at("unknown").mkdir()
    at("unknown/config.json").write_text('{"model_type": "gpt9"}')
    at("list-config").mkdir()
    at("list-config/config.json").write_text("[1, 2]")
    at("original").mkdir()
    at("original/config.json").write_text('{"model_type": "multi_modality"}')
    shutil.copytree(DATA / "checkpoints/janus", at("janus"))
    shutil.copytree(DATA / "checkpoints/janus", at("janus-torn"))
    weights = at("janus-torn/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    for path in at().rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors makes them private
