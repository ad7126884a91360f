"""Finding the family, and one clear error for everything that can be missing."""

from __future__ import annotations

import json
import re

import huggingface_hub
import psutil
import pytest
import torch
from checkpoints import MAKERS
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from minimal_aia.data import Sample
from minimal_aia.models import FAMILIES, AdapterError, load_adapter, loading, support_table
from minimal_aia.models.loading import config_file
from minimal_aia.profiles import profile


@pytest.mark.parametrize("family", list(MAKERS))
def test_the_family_is_found_from_the_config(adapter, family):
    model = adapter(family)
    assert model.family == family
    assert model.tasks == FAMILIES[family].tasks
    assert model.name == "tiny"
    assert not model.model.training
    assert len(model.layers()) == 3


def test_dtype_is_that_of_the_checkpoint_or_the_one_asked_for(checkpoint):
    assert load_adapter(checkpoint("deepseek-vl"), device="cpu").dtype == torch.float32
    half = load_adapter(checkpoint("deepseek-vl"), device="cpu", dtype="bfloat16")
    assert half.dtype == torch.bfloat16


def test_bfloat16_runs(checkpoint, samples):
    model = load_adapter(checkpoint("janus"), device="cpu", dtype=torch.bfloat16)
    for task in model.tasks:
        batch = model.collate(samples[task], task)
        with torch.no_grad(), model.capture(batch) as record:
            model.forward(batch)
        assert record.per_head.isfinite().all()


def test_generic_decoder_needs_only_the_image_token_id(checkpoint, samples, monkeypatch):
    folder = checkpoint("deepseek-vl")
    known = load_adapter(folder, device="cpu")
    unknown = load_adapter(folder, family="decoder", device="cpu", image_token_id=known.image_token_id)
    a, b = (m.collate(samples["understanding"], "understanding") for m in (known, unknown))
    assert torch.equal(a.query_mask, b.query_mask)
    assert torch.equal(a.key_mask, b.key_mask)
    with torch.no_grad(), unknown.capture(b) as record, known.capture(a) as reference:
        unknown.forward(b)
        known.forward(a)  # itself compared with eager attention in test_transformers
    torch.testing.assert_close(record.per_head, reference.per_head)
    # The class of a processor that also takes video is found from the folder, and needs no torchvision.
    folder = checkpoint("qwen3-vl")
    token = load_adapter(folder, device="cpu").image_token_id
    video = load_adapter(folder, family="decoder", device="cpu", image_token_id=token)
    assert video.collate(samples["understanding"], "understanding").key_mask.any()


def test_support_table_has_a_row_a_family():
    table = support_table()
    assert len(table.splitlines()) == 2 + len(FAMILIES)
    for name, family in FAMILIES.items():
        row = next(line for line in table.splitlines() if f"`{name}`" in line)
        assert family.tested in row
        assert family.systems in row


def error(call, *parts: str) -> None:
    """The call raises AdapterError, one line to read, with all `parts` in it."""
    with pytest.raises(AdapterError) as caught:
        call()
    for part in parts:
        assert re.search(part, str(caught.value)), str(caught.value)


def test_no_such_folder(tmp_path):
    error(lambda: load_adapter(tmp_path / "nothing"), "nothing: no such folder")


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    asked = []

    def unreachable(name, file):
        asked.append(file)
        raise LocalEntryNotFoundError("no connection, and nothing in the cache")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    error(lambda: load_adapter("owner/model-nobody-made"), "no such folder here", "cannot be reached")
    assert asked == ["model_index.json"]


def test_a_hub_that_says_no(monkeypatch):
    def not_found(name, file):
        raise EntryNotFoundError("404")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", not_found)
    error(lambda: load_adapter("owner/model-nobody-made"), "the hub gave no config", "check the spelling")


def test_a_config_in_the_cache_needs_no_network(monkeypatch, checkpoint):
    folder = checkpoint("janus")

    def cached(name, file):
        return str(folder / file) if (folder / file).is_file() else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: pytest.fail("the hub was asked"))
    assert config_file("owner/model") == folder / "config.json"


def test_folder_without_config(tmp_path):
    error(lambda: load_adapter(tmp_path), "neither model_index.json nor config.json")


def test_folder_without_weights(checkpoint, tmp_path):
    for file in checkpoint("janus").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    error(lambda: load_adapter(tmp_path), "holds no weights", "download the model's")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    error(lambda: load_adapter(tmp_path), "pytorch_model.bin is a pickle file", "convert it to safetensors")


def copy(source, target):
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_cut_off_weights(checkpoint, tmp_path):
    folder = copy(checkpoint("chameleon"), tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    error(lambda: load_adapter(folder, device="cpu"), "weights could not be read", "download them again")
    weights.write_bytes(b"\xff" * 20)
    error(lambda: load_adapter(folder, device="cpu"), "not a complete safetensors file")


def test_missing_weights_are_not_made_up(checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copy(checkpoint("qwen3-vl"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    gone = next(k for k in tensors if k.endswith("layers.1.self_attn.q_proj.weight"))
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    error(
        lambda: load_adapter(folder, device="cpu"), "1 of the model's weights are not in the folder", "q_proj"
    )


def test_no_tokenizer(checkpoint, tmp_path):
    folder = copy(checkpoint("emu3"), tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (folder / file).unlink(missing_ok=True)
    error(lambda: load_adapter(folder, device="cpu"), "no usable tokenizer beside the weights")
    (folder / "processor_config.json").unlink()
    error(lambda: load_adapter(folder, device="cpu"), "no usable image processor beside the weights")


def test_wrong_family(checkpoint):
    error(
        lambda: load_adapter(checkpoint("janus"), family="emu3"),
        "model type 'janus' \\(family 'janus'\\), not family 'emu3'",
    )
    error(lambda: load_adapter(checkpoint("janus"), family="llama"), "unknown family 'llama'", "janus, emu3")


def test_a_loaded_model_is_no_name():
    error(lambda: load_adapter(torch.nn.Linear(2, 2)), "not a Linear", "minimal_aia.capture")


@pytest.mark.parametrize(
    ("model_type", "hint"),
    [("multi_modality", "minimal-aia convert"), ("Emu3", "Emu3-Chat-hf"), ("mystery", "family='decoder'")],
)
def test_unknown_model_types_name_the_way_out(tmp_path, model_type, hint):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    error(lambda: load_adapter(tmp_path), hint)


def test_missing_package(checkpoint, monkeypatch):
    real = loading.importlib.util.find_spec
    monkeypatch.setattr(
        loading.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else real(name)
    )
    error(lambda: load_adapter(checkpoint("janus"), load_in_4bit=True), "pip install bitsandbytes")


def test_too_little_memory(checkpoint, monkeypatch):
    folder = checkpoint("janus")
    need = loading.weight_bytes(folder, None)
    assert loading.weight_bytes(folder, torch.float16) == need // 2
    parameters = sum(p.numel() for p in load_adapter(folder, device="cpu").model.parameters())
    assert abs(need - 4 * parameters) <= 4 * parameters * 0.05  # buffers and tied weights aside
    free = type("memory", (), {"available": need - 1})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    error(
        lambda: load_adapter(folder, device="cpu"),
        "too little memory",
        "GiB are free on cpu",
        "load_in_4bit=True",
    )
    free.available = need + 1
    load_adapter(folder, device="cpu")


@pytest.mark.parametrize(("family", "task"), [("janus", "generation"), ("internvl", "understanding")])
def test_profile_runs_on_any_adapter(adapter, samples, family, task):
    table = profile(adapter(family), samples[task], task, batch_size=2, progress=False).table
    assert len(table) == 3 * 4 * 2
    assert table["value"].between(0, 1).all()
    assert set(table["sample"]) == {s.id for s in samples[task]}


def test_samples_of_other_files_with_the_same_name_are_kept_apart(adapter, samples):
    model, sample = adapter("chameleon"), samples["understanding"][1]
    longer = Sample(sample.id, sample.task, (("describe", "word " * 30 + "end"),), sample.images)
    assert model.length(longer, "understanding") > model.length(sample, "understanding") + 29


def test_samples_a_model_cannot_use(adapter, samples, pictures):
    model = adapter("janus")
    chat = samples["understanding"][0]
    bare = Sample("f.jsonl:3", "generation", (("a cat", ""),), ())
    assert "no target image" in model.why_not(bare, "generation")
    assert "empty prompt" in model.why_not(
        Sample("x", "generation", ((" ", ""),), (pictures[0],)), "generation"
    )
    assert "no image" in model.why_not(Sample("x", "understanding", chat.turns, ()), "understanding")
    assert "no answer" in model.why_not(
        Sample("x", "understanding", (("q", ""),), chat.images), "understanding"
    )
    spelled = Sample("x", "understanding", (("q", "an <image_placeholder>"),), chat.images)
    assert "special token '<image_placeholder>'" in model.why_not(spelled, "understanding")
    assert model.why_not(chat, "understanding") is None
    assert "does not do generation" in adapter("chameleon").why_not(bare, "generation")
    error(lambda: model.collate([bare], "generation"), "f.jsonl:3: no target image")
    error(lambda: model.collate([chat], "drawing"), "unknown task 'drawing'")


def test_template_that_loses_text_is_refused(adapter, samples):
    model = adapter("qwen2.5-vl")
    kept = model.processor.chat_template
    model.processor.chat_template = (
        "{% for m in messages %}{{ m['content'][-1]['text'] if m['role'] == 'user' }}{% endfor %}"
    )
    try:
        error(
            lambda: model.collate(samples["understanding"], "understanding"),
            "template does not keep every text once",
        )
    finally:
        model.processor.chat_template = kept


def test_importing_the_models_does_not_import_transformers():
    import subprocess
    import sys

    code = "import sys, minimal_aia.models as m; m.support_table(); print('transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"
