"""The plan against what is really allocated, and against itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from minimal_aia import cli
from minimal_aia.lab.finetune import step_batches
from minimal_aia.models.lab import as_batch, load_lab
from minimal_aia.targets import StageTargets
from minimal_aia.train.activations import Rows
from minimal_aia.train.config import TrainConfig
from minimal_aia.train.layout import GIB, GPUS, Layout, find_gpu, read_layout, running_layout
from minimal_aia.train.memory import held
from minimal_aia.train.module import SFTModule
from minimal_aia.train.plan import Lengths, plan
from minimal_aia.train.plan_report import plan_text
from minimal_aia.train.recipe import parse_recipe
from minimal_aia.train.remedies import remedies
from minimal_aia.train.shapes import count, count_weights, read_shape
from minimal_aia.train.work import work_of

ROOT = Path(__file__).parents[2]
SEVEN_B = TrainConfig(
    model="deepseek-community/Janus-Pro-7B",
    per_device_train_batch_size=8,
    bf16=True,
    gradient_checkpointing=True,
    max_length=2048,
)


def lab_module(config: TrainConfig) -> tuple[SFTModule, dict]:
    adapter = load_lab(config.model)
    adapter.ends_turns = True
    targets = StageTargets.constant(len(adapter.layers()), generation=0.3, understanding=0.3)
    batches = {
        task: as_batch(rows, task, ["x"] * len(rows.ids))
        for task, rows in step_batches(config, 0, adapter.codebook).items()
    }
    return SFTModule(adapter, config, targets).train(), batches


def rows_of(batches: dict) -> dict[str, Rows]:
    return {
        task: Rows(len(b), b.attention_mask.shape[1], round(int(b.inputs["label_mask"].sum()) / len(b)))
        for task, b in batches.items()
    }


# --- weights ------------------------------------------------------------------------------------------------


# Sizes of the weight files as their pages on huggingface.co state them, in GB with two decimals:
# deepseek-ai/Janus-Pro-7B in bf16 (two files), BAAI/Emu3-Gen in float32 (seven; without the tokenizer).
@pytest.mark.parametrize(
    ("model", "gigabytes", "width", "files"),
    [("janus-pro-7b", 9.99 + 4.85, 2, 2), ("emu3", 4.94 + 4.83 + 5 + 5 + 4.83 + 5 + 4.37, 4, 7)],
)
def test_built_in_shapes_have_the_size_of_the_published_files(model, gigabytes, width, files):
    shape = read_shape(model)
    numbers = count(shape.model.parameters())
    if model == "emu3":
        numbers -= count(shape.part("vqmodel").parameters())
    else:
        numbers += 12_596_224  # the pooling head of the vision encoder, which transformers leaves out
    assert width * numbers / 1e9 == pytest.approx(gigabytes, abs=0.005 * files)


@pytest.mark.parametrize("model", ["lab/unified", "lab/janus"])
@pytest.mark.parametrize("lora", [{}, {"lora_rank": 4}], ids=["full", "lora"])
def test_weights_gradients_and_moments_are_those_of_a_real_step(model, lora):
    config = TrainConfig(model=model, per_device_train_batch_size=4, **lora)
    module, batches = lab_module(config)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    loss, _ = module(batches, config.weights())
    loss.backward()
    optimizer.step()
    shape = read_shape(model)
    weights = count_weights(shape, config)
    fixed = held(config, Layout(), weights, shape.layers)

    def size(tensors) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    assert weights.trained + weights.lora == sum(p.numel() for p in trained)
    assert fixed.weights == size(module.parameters())
    assert fixed.gradients == size(p.grad for p in trained)
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    assert fixed.optimizer == size(moments)


def test_a_folder_counts_like_the_model_that_it_is(tmp_path):
    model = load_lab("lab/janus").model
    model.save_pretrained(tmp_path)
    assert count(read_shape(str(tmp_path)).model.parameters()) == count(model.parameters())
    # with a head of its own in the files, whatever the configuration says of ties
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    assert count(read_shape(str(tmp_path)).model.parameters()) == count(model.parameters())
    assert read_shape(str(file)).layers == 8


# --- peaks --------------------------------------------------------------------------------------------------


def test_committed_peaks_are_the_planned_ones():
    """Of tensors within a tenth; of processes within 20 MB, whatever their size: libraries' own buffers."""
    found = json.loads((ROOT / "benchmarks/results/plan_check.json").read_text())["cases"]
    errors = {name: case["error_percent"] for name, case in found.items()}
    assert len(errors) >= 12
    assert any("FSDP2" in name for name in errors)
    assert max(map(abs, errors.values())) <= 10, errors
    beyond = {n: c["process_mb"] - c["plan_mb"] for n, c in found.items() if "process_mb" in c}
    assert len(beyond) >= 5
    assert max(map(abs, beyond.values())) <= 20, beyond


def test_the_peak_of_a_real_step_is_the_planned_one():
    """The same measurement as the benchmark's, of one case, now."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/plan_check.py"), "--case", "lab/unified, checkpointed"],
        env=os.environ | {"PLAN_CHECK_PROFILE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["plan"] == pytest.approx(found["tensors"], rel=0.1)


# --- operations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_matrix_products_are_counted_as_pytorch_counts_them(checkpointing):
    config = TrainConfig(per_device_train_batch_size=4, aia_weight=0, gradient_checkpointing=checkpointing)
    module, batches = lab_module(config)
    with FlopCounterMode(display=False) as counter:
        module(batches, config.weights())[0].backward()
    products = counter.get_flop_counts()["Global"]
    real = sum(n for operation, n in products.items() if str(operation) in ("aten.mm", "aten.addmm"))
    shape = read_shape(config.model)
    rows = rows_of(batches)
    found = work_of(shape, config, count_weights(shape, config), rows)
    attention = sum(
        2 * r.tokens * shape.layers * shape.hidden * r.length * (3.5 + checkpointing) for r in rows.values()
    )
    assert found.executed - attention == pytest.approx(real, rel=0.01)  # labels are rounded to a mean
    assert found.tokens == sum(r.tokens for r in rows.values())


def test_time_follows_from_operations():
    found = plan(SEVEN_B, Layout.of("fsdp2", 8), "h100", mfu=0.5)
    assert found.step_seconds == pytest.approx(found.work.executed / (0.5 * 989e12))
    assert found.hours == pytest.approx(found.step_seconds * SEVEN_B.max_steps / 3600)
    # six operations a weight and token, as usual: the language model's layers dominate
    text = 6 * found.work.tokens * 6.07e9
    assert found.work.model == pytest.approx(text, rel=0.15)
    assert plan(SEVEN_B, gpu="80GB").hours is None


# --- how figures move ---------------------------------------------------------------------------------------


def needed(config: TrainConfig = SEVEN_B, sharding: str = "fsdp2", world: int = 8) -> int:
    return plan(config, Layout.of(sharding, world)).needed


@settings(max_examples=20)
@given(
    world=st.sampled_from([2, 4, 8, 16]),
    sharding=st.sampled_from(["fsdp2", "zero3"]),
    size=st.sampled_from([1, 2, 4, 8]),
    accumulation=st.sampled_from([1, 4]),
    checkpointing=st.booleans(),
    length=st.integers(700, 3000),
)
def test_less_of_anything_never_needs_more(world, sharding, size, accumulation, checkpointing, length):
    config = replace(
        SEVEN_B,
        model="janus-pro-1b",
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing,
        max_length=length,
    )
    base = needed(config, sharding, world)
    assert needed(config, sharding, 2 * world) < base
    assert needed(replace(config, gradient_checkpointing=True), sharding, world) <= base
    assert needed(replace(config, max_length=length + 100), sharding, world) >= base
    assert needed(replace(config, aia_weight=0), sharding, world) <= base
    assert needed(replace(config, lora_rank=8, dtype="bfloat16"), sharding, world) < base
    assert needed(replace(config, codes="made before"), sharding, world) <= base


def test_what_each_layout_holds():
    shape, config = read_shape("janus-pro-1b"), replace(SEVEN_B, model="janus-pro-1b")
    weights = count_weights(shape, config)

    def at(sharding: str, world: int, shard: int | None = None):
        return held(config, Layout.of(sharding, world, shard), weights, shape.layers)

    one, ddp, fsdp, zero = at("none", 1), at("ddp", 8), at("fsdp2", 8), at("zero3", 8)
    trained, frozen = weights.trained, weights.frozen
    assert one.weights == 4 * (trained + frozen)
    assert (one.optimizer, one.gradients, one.buckets) == (8 * trained, 4 * trained, 0)
    assert ddp == replace(one, buckets=4 * trained)
    assert fsdp.weights == (4 * trained + 4 * frozen) // 8
    assert fsdp.gathered > 2 * (weights.total - weights.in_layers)
    assert zero.weights == 2 * weights.total // 8
    assert zero.optimizer == 12 * trained // 8
    assert at("hsdp", 64) == at("fsdp2", 8)  # eight copies, each on eight
    assert at("hsdp", 64, 16) == at("fsdp2", 16)


def test_aia_costs_little_and_stored_matrices_much():
    config = replace(SEVEN_B, gradient_checkpointing=False)
    found = plan(config, Layout.of("fsdp2", 64))
    own = found.memory["forward"]["intensities"]
    assert 0 < own < 0.06 * found.memory["forward"]["activations"]
    assert "intensities" not in plan(replace(config, aia_weight=0), Layout.of("fsdp2", 64)).memory["forward"]
    # the authors' way: 30 layers, 32 heads, 3 000 tokens, two bytes: 17 GB for one sample of understanding
    one = replace(config, per_device_train_batch_size=1, task_ratio="0:1")
    matrices, everything, _ = plan(one, Layout.of("fsdp2", 64)).comparison.values()
    assert matrices == 30 * 32 * 3000**2 * 2
    assert everything == 3 * matrices


def test_two_tasks_in_one_micro_batch_hold_whole_gradients():
    both, one = SEVEN_B, replace(SEVEN_B, per_device_train_batch_size=1)
    assert plan(both, Layout.of("fsdp2", 8)).memory["between"]["whole gradients"] > 11 * GIB
    assert all("whole gradients" not in parts for parts in plan(one, Layout.of("fsdp2", 8)).memory.values())
    several = replace(one, gradient_accumulation_steps=2)
    assert plan(several, Layout.of("fsdp2", 8)).memory["forward"]["whole gradients"] > 11 * GIB
    assert "whole gradients" not in plan(several, Layout.of("zero3", 8)).memory["forward"]


# --- what to change -----------------------------------------------------------------------------------------


def test_remedies_are_in_order_and_each_is_planned_as_a_recipe_with_it_would_be():
    config = replace(
        SEVEN_B, model="janus-pro-1b", gradient_checkpointing=False, per_device_train_batch_size=16
    )
    found = remedies(config, Layout(), "a100-40")
    assert not plan(config, Layout(), "a100-40").fits
    steps = [r for r in found if not r.alternative]
    sizes = [plan(config, Layout(), "a100-40").needed, *(r.plan.needed for r in steps)]
    assert sizes == sorted(sizes, reverse=True)
    assert steps[0].change == "gradient_checkpointing: true"
    assert found[-1].plan.fits
    for remedy in steps:
        if ":" in remedy.change and "(" not in remedy.change and "made" not in remedy.change:
            text = remedy.change.replace(", ", "\n")
            config = replace(config, **parse_recipe(text))
            again = plan(config, Layout(), "a100-40")
            if remedy is steps[0]:
                assert again.needed == remedy.plan.needed
    assert remedies(replace(config, gradient_checkpointing=True), Layout.of("fsdp2", 8), "h100") == []


def test_alternatives_come_when_harmless_changes_do_not_suffice():
    found = remedies(SEVEN_B, Layout(), "rtx4090")
    others = [r for r in found if r.alternative]
    assert [r.plan.fits for r in others] == [True] * len(others)
    assert others[0].change.startswith("lora_rank: 64, dtype: bfloat16, per_device_train_batch_size: ")
    lora = replace(SEVEN_B, **parse_recipe(others[0].change.replace(", ", "\n")))
    assert plan(lora, Layout(), "rtx4090").needed == others[0].plan.needed
    assert others[-1].plan.gpu.memory > 24


# --- layouts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "layout"),
    [
        ({}, Layout()),
        ({"WORLD_SIZE": "2"}, Layout("ddp", 2, 1)),
        ({"WORLD_SIZE": "8", "ACCELERATE_USE_FSDP": "true"}, Layout("fsdp2", 8, 8)),
        ({"WORLD_SIZE": "8", "ACCELERATE_USE_DEEPSPEED": "true"}, Layout("zero3", 8, 8)),
        (
            {"WORLD_SIZE": "16", "ACCELERATE_USE_FSDP": "true", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"},
            Layout("hsdp", 16, 8),
        ),
    ],
)
def test_the_running_processes_tell_their_layout(environment, layout, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "PARALLELISM_", "WORLD_SIZE")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert running_layout() == layout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_version: 1}\n",
            "fsdp_version is not 2",
        ),
        (
            "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {zero_stage: 2}\n",
            "ZeRO stage 2",
        ),
        ("distributed_type: FSDP\nnum_proceses: 2\n", "num_proceses"),
        ("num_processes: 2\n", "distributed_type"),
    ],
)
def test_other_accelerate_configurations_are_refused(tmp_path, text, message):
    file = tmp_path / "launch.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_layout(file)
    assert str(file) in str(error.value)


def test_every_gpu_is_found_by_its_name_and_others_by_their_memory():
    assert all(find_gpu(name.upper()) == gpu for name, gpu in GPUS.items())
    assert find_gpu("24GB").memory == find_gpu("24").memory == 24
    assert find_gpu("24GB").teraflops is None


# --- words --------------------------------------------------------------------------------------------------


def test_the_text_adds_up():
    shown = plan_text(SEVEN_B, Layout.of("fsdp2", 8), "h100")
    table = shown[shown.index("weights  ") : shown.index("needed:")].strip().splitlines()
    columns = list(zip(*(re.split(r" {2,}", line)[1:] for line in table)))
    assert len(table) > 8
    assert len(columns) == 5
    for column in columns:
        *parts, total = (0.0 if cell == "-" else float(cell) for cell in column)
        assert sum(parts) == pytest.approx(total, abs=0.06 * len(parts))
    assert "fits" in shown
    assert "not done here" in shown
    assert "what to change" not in shown
    assert "what to change" in plan_text(SEVEN_B, Layout(), "rtx4090")


def test_a_kind_without_formulas_is_told_and_stops_no_dry_run(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mot"}))
    config = TrainConfig(model=str(tmp_path))
    with pytest.raises(ValueError, match="'mot'"):
        plan(config)
    assert plan_text(config).startswith("none: ")


def run(*arguments: str) -> int:
    try:
        return cli.main(["plan", *arguments])
    except SystemExit as stop:  # of an argument that is no number
        return stop.code


def test_the_command_prints_text_json_and_one_line_a_combination(capsys):
    recipe = str(ROOT / "recipes/lab.yaml")
    assert run(recipe, "--gpu", "rtx3090") == 0
    assert "rtx3090 has 24: fits" in capsys.readouterr().out
    assert run(recipe, "--json", "--max-steps", "7") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 7
    assert found["fits"] is True
    assert found["needed"] > found["peak"] == sum(found["memory"][found["peak_moment"]].values())
    assert run(recipe, "--world-size", "2,8", "--sharding", "fsdp2,ddp", "--gpu", "h100,24GB") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 8
    big = ("--model", "janus-pro-7b", "--targets", "janus-pro", "--gpu", "24GB")
    assert run(recipe, *big, "--prompt-tokens", "300") == 1  # it does not fit
    shown = capsys.readouterr().out
    assert "does not fit" in shown
    assert f"{576 + 32 + 300} tokens" in shown
    assert "time: not known for 24 GB" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "abacus"], "choose from"),
        (["--model", "who/knows"], "janus-pro-7b"),
        (["--world-size", "8,many"], "'many'"),
        (["--world-size", "12", "--sharding", "hsdp"], "not whole copies of 8"),
        (["--world-size", "2", "--sharding", "none"], "one process"),
        (["--sharding", "zero9"], "zero3"),
        (["--mfu", "40"], "at most 1"),
        (["--accelerate", "recipes/ddp.yaml", "--sharding", "ddp"], "give one"),
        (["--prompt-tokens", "-5"], "whole number from 0 on"),
        (["--model", "janus-pro-1b", "--max-length", "600"], "608"),
        (["--lora-rank", "4", "--lora-target-modules", "q_porj"], "q_porj"),
        (["--freeze", "eyes"], "eyes"),
    ],
)
def test_faults_are_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert run("recipes/lab.yaml", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_recipe_or_the_table_must_be_asked_for(capsys):
    assert run() == 2
    assert "--table" in capsys.readouterr().err


def test_lengths_say_which_one_is_wrong():
    with pytest.raises(ValueError, match="answer of -1"):
        Lengths(answer=-1)
