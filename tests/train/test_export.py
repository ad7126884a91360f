"""Checkpoints that trainers really write, exported without them: the same weights in a folder that loads."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from real_models import checkpoint, module
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as FORMATS
from transformers import JanusForConditionalGeneration
from worlds import run_script

from minimal_aia.cli import main
from minimal_aia.models import load_adapter
from minimal_aia.models.tensor_files import load_tensors
from minimal_aia.train import checkpoints as ck
from minimal_aia.train import sft, sharded
from minimal_aia.train.config import TrainConfig
from minimal_aia.train.export import export


@pytest.fixture(scope="module")
def base() -> Path:
    return checkpoint("janus")


@pytest.fixture(scope="module")
def shards(base, tmp_path_factory) -> Path:
    """What two processes wrote with FSDP2 and, where it is installed, ZeRO-3; see shard_worker.py."""
    out = tmp_path_factory.mktemp("shards")
    run_script("train/shard_worker.py", out, base)
    return out


def check(out: Path, expected: dict[str, torch.Tensor], base: Path) -> None:
    """`out` holds these weights, loads without a word, and is not the base."""
    model, info = JanusForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found = model.state_dict()
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)
    before = load_tensors(base)
    assert any(not torch.equal(found[name], before[name]) for name in before)
    assert load_adapter(out, device="cpu").processor.num_image_tokens == 16


@pytest.mark.parametrize("layout", ["accelerate", "accelerate/pytorch_model_fsdp_0", "dcp"])
def test_fsdp2_shards_of_two_processes(shards, base, tmp_path, layout):
    assert len(list((shards / layout).rglob("*.distcp"))) == 2
    report = export(shards / layout, tmp_path / "out", base=str(base))
    assert report.kind == "fsdp"
    check(tmp_path / "out", load_file(shards / "expected.safetensors"), base)


def test_tensors_are_cast_as_they_are_read(shards, base, tmp_path):
    export(shards / "dcp", tmp_path / "out", base=str(base), dtype="bfloat16")
    expected = load_file(shards / "expected.safetensors")
    for name, tensor in load_tensors(tmp_path / "out").items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name].bfloat16())
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_zero3_shards_of_two_processes(shards, base, tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; it compiles code when it first runs")
    report = export(shards / "zero", tmp_path / "out", base=str(base))
    assert report.kind == "deepspeed"
    check(tmp_path / "out", load_file(shards / "expected_zero.safetensors"), base)


def test_without_deepspeed_its_checkpoints_are_named(base, tmp_path, monkeypatch):
    (tmp_path / "zero/global_step1").mkdir(parents=True)
    (tmp_path / "zero/global_step1/zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ImportError, match="pip install deepspeed"):
        export(tmp_path / "zero", tmp_path / "out", base=str(base))
    assert not (tmp_path / "out").exists()


def test_a_missing_shard_is_said(shards, base, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(shards / "dcp", broken)
    (broken / "__1_0.distcp").unlink()
    with pytest.raises(OSError, match="a shard is missing or damaged"):
        export(broken, tmp_path / "out", base=str(base))


def test_members_of_enumerations_are_read_as_early_python_311_writes_them():
    assert sharded._member(FORMATS, FORMATS.TORCH_PRESERVE_FORMAT.name) is FORMATS.TORCH_PRESERVE_FORMAT
    with pytest.raises(pickle.UnpicklingError):
        sharded._member(torch.Size, "mro")


class Attack:
    def __reduce__(self):
        return (Path.touch, (Path("attacked"),))


class Reach:
    """`getattr`, which early Python 3.11 uses to name members of enumerations, on something else."""

    def __reduce__(self):
        return (getattr, (torch.Size, "mro"))


@pytest.mark.parametrize("content", [Attack(), Reach(), torch.nn.Linear(1, 1), {"a": 1}, None])
def test_a_list_of_tensors_that_is_more_is_refused(base, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "dcp"
    folder.mkdir()
    (folder / ".metadata").write_bytes(b"cut" if content is None else pickle.dumps(content))
    with pytest.raises((ValueError, OSError), match=r"refused|holds a dict|not a complete"):
        export(folder, tmp_path / "out", base=str(base))
    assert not (tmp_path / "attacked").exists()


# --- one process --------------------------------------------------------------------------------------------


def trained(base: Path) -> dict[str, torch.Tensor]:
    """Weights that training might have left: not the base's, input and output embeddings apart."""
    model = JanusForConditionalGeneration.from_pretrained(base)
    state = {name: tensor + 0.5 for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] = state["lm_head.weight"] * 2
    return state


@pytest.mark.parametrize(
    ("file", "prefix"),
    [
        ("model.safetensors", ""),
        ("model.safetensors", "model."),
        ("model.safetensors", "module.model."),
        ("model.safetensors", "_orig_mod.model."),
        ("model.safetensors", "model._fsdp_wrapped_module."),
        ("pytorch_model.bin", "model."),
        ("pytorch_model_fsdp.bin", "model."),
    ],
)
def test_a_module_around_the_model_is_taken_off(base, tmp_path, prefix, file):
    expected = trained(base)
    state = {prefix + name: tensor for name, tensor in expected.items()}
    (tmp_path / "ck").mkdir()
    save = save_file if file.endswith("safetensors") else torch.save
    save(state, tmp_path / "ck" / file)
    report = export(tmp_path / "ck", tmp_path / "out", base=str(base))
    assert any("tie_word_embeddings=false" in note for note in report.notes)
    check(tmp_path / "out", expected, base)


def test_a_plain_trainer_checkpoint(base, tmp_path):
    model = JanusForConditionalGeneration.from_pretrained(base)
    with torch.no_grad():
        model.model.aligner.fc1.weight.add_(1)
    model.save_pretrained(tmp_path / "ck")  # as `Trainer` does: no processor
    (tmp_path / "ck/README.md").write_text("a card")
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base/other_layout").mkdir()  # as `minimal-aia convert` leaves it: the way back stays open
    (tmp_path / "base/other_layout/conversion.json").write_text("{}")
    export(tmp_path / "ck", tmp_path / "out", base=str(tmp_path / "base"))
    assert (tmp_path / "out/other_layout/conversion.json").read_text() == "{}"
    check(tmp_path / "out", model.state_dict(), base)
    assert "lm_head.weight" not in load_tensors(tmp_path / "out")  # tied: written once
    assert (tmp_path / "out/README.md").read_text() == "a card"


def test_emu3s_names_on_disk_are_transformers_own(tmp_path):
    """Its class and its files name the same weights differently; the export must write the files' names."""
    base = checkpoint("emu3")
    adapter = load_adapter(base, device="cpu")
    state = adapter.model.state_dict()
    expected = {
        name: tensor + 0.5 if tensor.is_floating_point() else tensor for name, tensor in state.items()
    }
    (tmp_path / "ck").mkdir()
    save_file(
        {f"model.{name}": tensor for name, tensor in expected.items()}, tmp_path / "ck/model.safetensors"
    )
    export(tmp_path / "ck", tmp_path / "out", base=str(base))
    assert set(load_tensors(tmp_path / "out")) <= set(load_tensors(base))
    found = load_adapter(tmp_path / "out", device="cpu").model.state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)


def test_a_peft_adapter_is_merged(base, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = JanusForConditionalGeneration.from_pretrained(base)
    settings = peft.LoraConfig(r=2, lora_alpha=8, target_modules=r".*language_model.*(q_proj|down_proj)")
    wrapped = peft.get_peft_model(model, settings)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    ids = torch.arange(6, 20)[None]
    with torch.no_grad():
        expected = wrapped.eval()(input_ids=ids).logits
        plain = JanusForConditionalGeneration.from_pretrained(base).eval()(input_ids=ids).logits
    assert (expected - plain).abs().max() > 0.1
    wrapped.save_pretrained(tmp_path / "ck")
    report = export(tmp_path / "ck", tmp_path / "out")  # the adapter names its base
    assert report.kind == "peft"
    merged = load_adapter(tmp_path / "out", device="cpu").model
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_lora_in_a_sharded_runs_names_is_merged_by_its_recipe(base, tmp_path):
    """A sharded LoRA run has the base's weights too, under the names that peft gives them."""
    pytest.importorskip("peft")
    trainee = module("janus", None, lora_rank=2, lora_alpha=6.0)
    for name, parameter in trainee.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    trainee.export(tmp_path / "expected")
    (tmp_path / "ck").mkdir()
    torch.save(trainee.state_dict(), tmp_path / "ck/pytorch_model_fsdp.bin")
    with pytest.raises(ValueError, match="no recipe that says how they were scaled"):
        export(tmp_path / "ck", tmp_path / "out", base=str(base))
    ck.seal(tmp_path / "ck", config=asdict(trainee.recipe))
    export(tmp_path / "ck", tmp_path / "out")
    found, expected = load_tensors(tmp_path / "out"), load_tensors(tmp_path / "expected")
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=name)
    check(tmp_path / "out", load_adapter(tmp_path / "expected", device="cpu").model.state_dict(), base)


def test_weights_of_another_model_are_listed_and_nothing_is_written(base, tmp_path, capsys):
    state = trained(base)
    del state["model.aligner.fc1.bias"]
    state["model.aligner.fc3.bias"] = torch.zeros(1)
    state["model.aligner.fc1.weight"] = torch.zeros(2, 2)
    (tmp_path / "ck").mkdir()
    save_file(state, tmp_path / "ck/model.safetensors")
    arguments = ["export", str(tmp_path / "ck"), str(tmp_path / "out"), "--base", str(base)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "3 entries do not fit" in error
    for line in (
        "missing: model.aligner.fc1.bias",
        "extra: model.aligner.fc3.bias",
        "shape: model.aligner.fc1.weight",
    ):
        assert line in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ck"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"something": torch.zeros(2)}, "has no weight"),
        ("twice", "more than once"),
    ],
)
def test_weights_without_the_model_or_with_two_are_refused(base, tmp_path, state, message):
    if state == "twice":
        once = trained(base)
        state = {f"{p}.{name}": tensor.clone() for name, tensor in once.items() for p in ("model", "ema")}
    (tmp_path / "ck").mkdir()
    save_file(state, tmp_path / "ck/model.safetensors")
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "ck", tmp_path / "out", base=str(base))


def test_a_checkpoint_that_does_not_say_its_model_needs_base(tmp_path):
    (tmp_path / "ck").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "ck/model.safetensors")
    with pytest.raises(ValueError, match="give --base"):
        export(tmp_path / "ck", tmp_path / "out")
    with pytest.raises(OSError, match="no such folder"):
        export(tmp_path / "nowhere", tmp_path / "out")


# --- this library's own runs --------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[0, 2], ids=["full", "lora"])
def run(request, tmp_path_factory) -> Path:
    """Three steps of a lab model with a checkpoint at the second and third."""
    if request.param:
        pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("run") / "lab"
    options = {"max_steps": 3, "save_steps": 1, "save_total_limit": 2, "curve_steps": 0, "report_to": "none"}
    options |= {"per_device_train_batch_size": 2, "use_cpu": True, "lora_rank": request.param}
    sft.run(TrainConfig(model="lab/janus", output_dir=str(folder), **options))
    return folder


def test_a_runs_newest_checkpoint_is_what_the_run_exported_itself(run, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert "took checkpoint-3" in capsys.readouterr().out
    found, expected = load_tensors(tmp_path / "out"), load_tensors(run)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (tmp_path / "out/tokenizer.json").is_file()
    export(run / "checkpoint-2", tmp_path / "earlier")
    earlier = load_tensors(tmp_path / "earlier")
    assert any(not torch.equal(earlier[name], expected[name]) for name in expected)


def test_a_damaged_checkpoint_is_passed_over_or_refused(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    file = next((copy / "checkpoint-3").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="the checkpoint is damaged"):
        export(copy / "checkpoint-3", tmp_path / "out")
    report = export(copy, tmp_path / "out")
    assert "took checkpoint-2" in report.notes
    assert any("checkpoint-3" in note for note in report.notes)
    assert not ck.problems(copy / "checkpoint-2")
