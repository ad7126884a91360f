"""Every recipe is read, planned and started as far as that goes without GPUs and weights."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from real_models import LAYERS, TARGETS, checkpoint

from minimal_aia import cli
from minimal_aia.train.config import TrainConfig, task_counts
from minimal_aia.train.layout import GIB, Layout, read_layout, running_layout
from minimal_aia.train.memory import BUCKETS, LIVE
from minimal_aia.train.module import resolve_targets
from minimal_aia.train.plan_report import parse_command, planned, read_header, recipes, table
from minimal_aia.train.recipe import read_recipe
from minimal_aia.train.shapes import read_shape

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
TRAINING, LAUNCH = recipes(training=True), recipes(training=False)
REAL = [path for path in TRAINING if path.name != "lab.yaml"]
PAPER = {
    "aia_weight": 40.0,
    "learning_rate": 2e-5,
    "lr_scheduler_type": "cosine",
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "weight_decay": 0.05,
    "max_grad_norm": 1.0,
    "task_ratio": "1:1",
    "prompt_dropout": 0.1,
    "freeze": "vision",
}


def by_name(path: Path) -> str:
    return path.name


def test_nothing_is_missing_and_nothing_is_left_over():
    assert {path.name for path in TRAINING} == {
        "lab.yaml",
        "janus_pro_1b.yaml",
        "janus_pro_1b_lora_24gb.yaml",
        "janus_pro_7b.yaml",
        "emu3_8b.yaml",
    }
    assert {path.name for path in LAUNCH} == {
        "ddp.yaml",
        "fsdp2.yaml",
        "fsdp2_multinode.yaml",
        "hsdp.yaml",
        "zero3.yaml",
    }


def test_readme_shows_the_recipes_as_they_are():
    readme = (RECIPES / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- plan:.*?-->\n(.*?)<!-- end of plan -->", readme, re.DOTALL)
    assert shown is not None
    assert shown[1] == table()


# --- training recipes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", TRAINING, ids=by_name)
def test_a_training_recipe_is_whole(path):
    config = read_recipe(path)
    shape = read_shape(config.model, config.image_area)
    targets = resolve_targets(config, shape.layers)
    assert targets is not None
    assert targets.n_layers == shape.layers
    assert set(task_counts(config, 0)) == {"generation", "understanding"}
    assert config.warmup_steps < config.max_steps
    assert config.output_dir == f"runs/train/{path.stem.removesuffix('_24gb')}"
    for task in config.shares():
        source = getattr(config, f"{task}_data")
        assert source == "lab" or (ROOT / source).is_file()


@pytest.mark.parametrize("path", [*REAL, *LAUNCH], ids=by_name)
def test_a_recipe_says_what_is_planned_and_fits(path):
    header = read_header(path)
    found = planned(path)
    assert header.gib == round(found.needed / GIB, 1)
    assert found.fits
    assert found.layout.world == header.world
    for command in header.commands:
        named = [word for word in command.split() if word.startswith("recipes/")]
        assert named
        assert all((ROOT / word).is_file() for word in named), command
        if "minimal-aia plan" not in command:
            parse_command(command)  # its options are keys of a recipe


@pytest.mark.parametrize("name", ["janus_pro_7b.yaml", "emu3_8b.yaml"])
def test_the_papers_settings_are_the_papers(name):
    config = read_recipe(RECIPES / name)
    assert {key: getattr(config, key) for key in PAPER} == PAPER
    assert not config.lora_rank
    assert config.bf16
    assert config.targets == {"janus_pro_7b.yaml": "janus-pro", "emu3_8b.yaml": "emu3"}[name]
    if name == "emu3_8b.yaml":
        assert config.image_area == 720 * 720
    else:
        assert read_shape(config.model).image_size == 384


@pytest.mark.parametrize("path", REAL, ids=by_name)
def test_a_dry_run_shows_plan_data_and_spans_without_weights(path, tmp_path, capsys, monkeypatch):
    import transformers

    def refuse(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
    monkeypatch.chdir(ROOT)
    TARGETS.save(tmp_path / "targets.yaml")
    family = "emu3" if "emu3" in path.name else "janus"
    tiny = ["--model", str(checkpoint(family)), "--targets", str(tmp_path / "targets.yaml")]
    small = ["--max-length", "none", "--image-area", "0"]  # the tiny tokenizer writes words letter by letter
    assert cli.main(["train", str(path), "--dry-run", *tiny, *small]) == 0
    shown = capsys.readouterr().out
    assert f"{LAYERS} layers" in shown
    assert "GiB on each GPU" in shown
    assert "all tensors" in shown
    assert "queries" in shown
    assert re.search(r"understanding: \d samples", shown)


# --- configurations for accelerate --------------------------------------------------------------------------


def launched(path: Path, monkeypatch, *options: str) -> dict[str, str]:
    """What `accelerate launch` would tell the processes, from its own parser and functions."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    monkeypatch.chdir(ROOT)
    command = ["--config_file", str(path), *options, "-m", "minimal_aia.train.sft", "x"]
    args, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(command))
    if args.use_deepspeed:
        fields = yaml.safe_load(path.read_text())["deepspeed_config"]
        args.deepspeed_fields_from_accelerate_config = ",".join(fields)  # as `launch_command` does
        return dict(prepare_deepspeed_cmd_env(args)[1])
    return dict(prepare_multi_gpu_env(args))


@pytest.mark.parametrize("path", LAUNCH, ids=by_name)
def test_accelerate_reads_a_launch_configuration_as_the_plan_does(path, monkeypatch):
    layout = read_layout(path)
    env = launched(path, monkeypatch)
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_")):
            monkeypatch.delenv(name)
    for name, value in env.items():
        if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_")):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", str(layout.world))
    assert running_layout() == layout
    if layout.sharding != "zero3":
        assert env["ACCELERATE_MIXED_PRECISION"] == "bf16"


@pytest.mark.parametrize("name", ["fsdp2.yaml", "fsdp2_multinode.yaml", "hsdp.yaml"])
def test_fsdp2_wraps_the_layers_of_the_model_that_is_trained(name, monkeypatch):
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

    path = RECIPES / name
    for key, value in launched(path, monkeypatch).items():
        if key.startswith("FSDP_"):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is True
    assert not plugin.activation_checkpointing  # the training recipe's business
    assert "SHARDED" in str(plugin.state_dict_type)
    recipe, _, _ = parse_command(read_header(path).commands[0])
    shape = read_shape(read_recipe(recipe).model)
    plugin.set_auto_wrap_policy(shape.model)
    wrapped = fsdp2_prepare_auto_wrap_policy(plugin, shape.model)
    found = [module for module in shape.model.modules() if wrapped(module)]
    assert found == list(shape.decoder_layers)


def test_the_other_layer_class_that_comments_name_is_emu3s(monkeypatch):
    text = (RECIPES / "fsdp2.yaml").read_text()
    (named,) = re.findall(r"--fsdp_transformer_layer_cls_to_wrap (\w+)", text)
    assert named == type(read_shape("emu3").decoder_layers[0]).__name__
    env = launched(RECIPES / "fsdp2.yaml", monkeypatch, "--fsdp_transformer_layer_cls_to_wrap", named)
    assert env["FSDP_TRANSFORMER_CLS_TO_WRAP"] == named  # an option wins over the file


def test_hsdp_holds_one_copy_a_node(monkeypatch):
    path = RECIPES / "hsdp.yaml"
    assert read_layout(path) == Layout("hsdp", 64, 8)
    options = ("--num_machines", "2", "--num_processes", "16", "--parallelism_config_dp_replicate_size", "2")
    env = launched(path, monkeypatch, *options)
    assert env["PARALLELISM_CONFIG_DP_REPLICATE_SIZE"] == "2"
    assert env["PARALLELISM_CONFIG_DP_SHARD_SIZE"] == "8"


def test_zero3_is_what_the_plan_takes_it_for():
    settings = json.loads((RECIPES / "zero3.json").read_text())
    zero = settings["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["stage3_max_live_parameters"] == LIVE
    assert zero["reduce_bucket_size"] + zero["stage3_prefetch_bucket_size"] == BUCKETS
    assert settings["bf16"]["enabled"] is True
    launch = yaml.safe_load((RECIPES / "zero3.yaml").read_text())["deepspeed_config"]
    assert (ROOT / launch["deepspeed_config_file"]).is_file()
    assert launch["zero3_init_flag"] is True


def test_transformers_fills_what_zero3_leaves_to_the_recipe(tmp_path):
    """With transformers' own class: every `auto` gets a value, and none contradicts the arguments."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    from minimal_aia.train.trainer import training_arguments

    config = TrainConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    arguments = training_arguments(config)
    arguments.bf16 = True
    try:
        settings = HfTrainerDeepSpeedConfig(json.loads((RECIPES / "zero3.json").read_text()))
    except ImportError as error:
        pytest.skip(f"transformers asks for DeepSpeed here: {error}")
    settings.trainer_config_process(arguments)
    assert not settings.mismatches
    found = settings.config
    assert found["train_micro_batch_size_per_gpu"] == 2
    assert found["gradient_accumulation_steps"] == 4
    assert found["gradient_clipping"] == config.max_grad_norm


# --- Slurm --------------------------------------------------------------------------------------------------

SRUN = """#!/bin/bash
# Stands for srun: runs the command that a node would run, and passes USR1 on to it.
[ "$1" = --kill-on-bad-exit=1 ] && shift
"$@" &
child=$!
trap 'kill -USR1 "$child"' USR1
wait "$child"; status=$?
while kill -0 "$child" 2>/dev/null; do wait "$child"; status=$?; done
exit "$status"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo node1; echo node2; else echo "$@" >> "$HERE/queue"; fi
"""
ACCELERATE = """#!{python}
# Stands for `accelerate launch`: trains until it is warned, as train/callbacks.py does.
import json, os, signal, sys, time
from pathlib import Path
here = Path(os.environ["HERE"])
assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN, "the launcher would die of the warning"
signal.signal(signal.SIGUSR1, lambda *_: (here.joinpath("saved").touch(), sys.exit(138)))
here.joinpath("arguments.json").write_text(json.dumps(sys.argv[1:]))
if os.environ["ENDS"] != "":
    sys.exit(int(os.environ["ENDS"]))
time.sleep(60)
"""


@pytest.fixture
def slurm(tmp_path):
    """Start slurm.sh among stand-ins; `ends`: what training ends with by itself, "" to train on."""
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    scripts = {
        "srun": SRUN,
        "accelerate": ACCELERATE.format(python=sys.executable),
        "scontrol": SCONTROL,
    }
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    started = []

    def start(*arguments: str, ends: str = "") -> subprocess.Popen:
        env = os.environ | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "HERE": str(tmp_path),
            "ENDS": ends,
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_ID": "4711",
            "SLURM_NODEID": "0",
            "SLURM_GPUS_ON_NODE": "8",
        }
        process = subprocess.Popen(
            ["bash", str(RECIPES / "slurm.sh"), *arguments],
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def arguments_of(folder: Path, process: subprocess.Popen) -> list[str]:
    """What the launcher was started with, once it was."""
    for _ in range(600):
        file = folder / "arguments.json"
        if file.is_file() and file.stat().st_size:
            return json.loads(file.read_text())
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    raise AssertionError("nothing was started")


def test_the_slurm_script_is_bash_and_can_be_run():
    subprocess.run(["bash", "-n", RECIPES / "slurm.sh"], check=True)
    assert (RECIPES / "slurm.sh").stat().st_mode & stat.S_IXUSR
    done = subprocess.run(["bash", RECIPES / "slurm.sh", "one"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage" in done.stderr
    done = subprocess.run(["bash", RECIPES / "slurm.sh", "one", "two"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no Slurm job: start it with sbatch --nodes N recipes/slurm.sh one two" in done.stderr


def test_slurm_starts_one_launcher_a_node_and_ends_with_it(slurm, tmp_path, monkeypatch):
    process = slurm("recipes/hsdp.yaml", "recipes/janus_pro_7b.yaml", "--max-steps", "7", ends="0")
    assert process.wait(60) == 0
    found = arguments_of(tmp_path, process)
    assert found[0] == "launch"
    module = found.index("-m")
    options = dict(zip(found[1:module:2], found[2:module:2], strict=True))
    assert options.pop("--machine_rank") == "0"
    assert options["--num_machines"] == "2"
    assert options["--main_process_ip"] == "node1"
    # accelerate takes these options, and they win over the file
    path = Path(options.pop("--config_file"))
    env = launched(ROOT / path, monkeypatch, *(word for pair in options.items() for word in pair))
    assert env["PARALLELISM_CONFIG_DP_REPLICATE_SIZE"] == "2"
    assert env["PARALLELISM_CONFIG_DP_SHARD_SIZE"] == "8"
    # and training takes the rest
    assert found[module + 1] == "minimal_aia.train.sft"
    recipe, _, rest = parse_command(" ".join(found[module + 2 :]))
    config = read_recipe(recipe, rest)
    assert (config.num_processes, config.resume, config.max_steps) == (16, "auto", 7)
    assert not (tmp_path / "queue").exists()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["time limit", "preempted"])
def test_a_warned_job_saves_and_is_queued_again(slurm, tmp_path, number):
    process = slurm("recipes/fsdp2_multinode.yaml", "recipes/janus_pro_7b.yaml")
    assert not any("parallelism" in word for word in arguments_of(tmp_path, process))
    process.send_signal(number)
    assert process.wait(60) == 0, process.stdout.read()
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "queue").read_text() == "requeue 4711\n"


def test_a_job_that_fails_by_itself_is_not_queued_again(slurm, tmp_path):
    process = slurm("recipes/zero3.yaml", "recipes/emu3_8b.yaml", ends="3")
    assert process.wait(60) == 3
    assert not (tmp_path / "queue").exists()


# --- the command that everything is for ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.distributed
def test_accelerate_launch_with_fsdp2_dry_runs_without_weights_or_gpus(tmp_path):
    TARGETS.save(tmp_path / "targets.yaml")
    folder = tmp_path / "no_weights"
    shutil.copytree(checkpoint("janus"), folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    launcher = Path(sys.executable).parent / "accelerate"
    command = [str(launcher), "launch", "--config_file", "recipes/fsdp2.yaml", "--num_processes", "2"]
    command += ["-m", "minimal_aia.train.sft", "recipes/janus_pro_7b.yaml", "--dry-run"]
    command += ["--model", str(folder), "--targets", str(tmp_path / "targets.yaml"), "--max-length", "none"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "on 2 GPUs, fsdp2" in done.stdout
    assert done.stdout.count("all tensors") == 1  # one process speaks for all
    assert "gathered" in done.stdout
    assert "queries" in done.stdout
    assert "image tokens]" in done.stdout
