"""A real run on files: tiny Janus and Emu3, prompts dropped, lengths sorted, codes from disk, resumed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data_fakes import entries, write_lines, write_pictures
from real_models import checkpoint
from safetensors.torch import load_file

from minimal_aia import cli
from minimal_aia.train import sft
from minimal_aia.train.config import TrainConfig
from minimal_aia.train.recipe import to_yaml

TASKS = ("generation", "understanding")


@pytest.fixture(scope="module", params=["janus", "emu3"])
def config(request, tmp_path_factory) -> TrainConfig:
    folder = tmp_path_factory.mktemp(request.param)
    pictures = write_pictures(folder)
    for task in TASKS:
        write_lines(folder / f"{task}.jsonl", entries(task, 9, pictures))
    c = TrainConfig(
        model=str(checkpoint(request.param)),
        **{f"{task}_data": str(folder / f"{task}.jsonl") for task in TASKS},
        targets=("janus-pro" if request.param == "janus" else "emu3") + ":rescaled",
        per_device_train_batch_size=4,
        max_steps=6,
        save_steps=3,
        prompt_dropout=0.3,
        length_window=2,
        warmup_steps=1,
        logging_steps=1,
        curve_steps=0,
        report_to="none",
        use_cpu=True,
    )
    recipe = folder / "recipe.yaml"
    recipe.write_text(to_yaml(c))
    assert cli.main(["prepare", str(recipe), str(folder / "codes"), "--device", "cpu"]) == 0
    return c


def weights(folder) -> dict[str, torch.Tensor]:
    return {
        name: t for file in sorted(Path(folder).glob("*.safetensors")) for name, t in load_file(file).items()
    }


def losses(folder) -> list[float]:
    state = json.loads((Path(folder) / "checkpoint-6" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.slow
def test_codes_workers_and_a_resume_change_nothing(config, tmp_path):
    """Pictures and no worker; codes and a worker; the last three of six steps once more. To the last bit."""
    plain = replace(config, output_dir=str(tmp_path / "plain"))
    sft.run(plain)
    assert len(losses(plain.output_dir)) == 6
    assert losses(plain.output_dir)[0] > 0
    before = weights(config.model)
    after = weights(plain.output_dir)
    assert any(not torch.equal(after[name], before[name]) for name in before)

    codes = replace(
        config,
        output_dir=str(tmp_path / "codes"),
        codes=str(Path(config.generation_data).parent / "codes"),
        dataloader_num_workers=1,
    )
    sft.run(codes)
    assert losses(codes.output_dir) == losses(plain.output_dir)
    for file in Path(codes.output_dir).glob("*.safetensors"):
        file.unlink()
    shutil.rmtree(Path(codes.output_dir) / "checkpoint-6")
    sft.run(replace(codes, resume="auto"))  # goes on from step 3
    assert losses(codes.output_dir) == losses(plain.output_dir)
    resumed = weights(codes.output_dir)
    assert resumed.keys() == after.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, resumed[name]), name
