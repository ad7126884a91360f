"""The converter's command, its errors, and the files beside the weights."""

from __future__ import annotations

import copy
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from checkpoints import deepseek_tokenizer
from convert_helpers import PRO_7B, hf_config
from original_janus import Sizes, random_model
from safetensors.torch import save_file
from transformers import GenerationConfig, JanusForConditionalGeneration

from minimal_aia.cli import main
from minimal_aia.models import convert_keys as keys
from minimal_aia.models import load_adapter
from minimal_aia.models.convert import OTHER, convert, convert_back
from minimal_aia.models.convert_config import to_hf, to_original
from minimal_aia.models.tensor_files import load_tensors, new_path

SIZES = Sizes(vocab=348)  # room for the test tokenizer


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return random_model(SIZES).state_dict()


@pytest.fixture
def config(tmp_path) -> str:
    hf_config(SIZES).save_pretrained(tmp_path / "config")
    return str(tmp_path / "config" / "config.json")


@pytest.fixture(scope="module")
def original(state, tmp_path_factory) -> Path:
    """A folder with all the files that DeepSeek's has."""
    folder = tmp_path_factory.mktemp("original") / "tiny"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    stated = to_original(hf_config(SIZES, tie_word_embeddings=False), "float32")
    tokenizer = deepseek_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["post_processor"] = None  # DeepSeek's class adds the first token, not the file
    names = {
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
    }
    for name, content in {
        "config.json": stated,
        "tokenizer.json": backend,
        "tokenizer_config.json": {
            **names,
            "add_bos_token": True,
            "model_max_length": 16384,
            "tokenizer_class": "LlamaTokenizer",
        },
        "special_tokens_map.json": {**names, "additional_special_tokens": ["<image_placeholder>"]},
        "preprocessor_config.json": {
            "image_processor_type": "VLMImageProcessor",
            "image_size": 16,
            "min_size": 4,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "rescale_factor": 1 / 255,
            "do_normalize": True,
        },
        "processor_config.json": {
            "processor_class": "VLChatProcessor",
            "image_tag": "<image_placeholder>",
            "num_image_tokens": 16,
            "sft_format": "deepseek",
        },
    }.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


# --- the command --------------------------------------------------------------------------------------------


def test_the_command_converts_there_and_back(original, state, tmp_path, capsys):
    assert main(["convert", str(original), str(tmp_path / "hf")]) == 0
    assert "tensors" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "back"), "--to-original"]) == 0
    back = load_tensors(tmp_path / "back")
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    for file in original.iterdir():
        if file.suffix == ".json":
            assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out"], "no such file or folder"),
        (["a.pth", "out"], "give --config"),
        (["a.pth", "out", "--config", "nowhere.json"], "nowhere.json"),
        (["a.pth", "out", "--to-original"], "config.json"),
        (["a.pth", "out", "--leftovers", "b"], "--leftovers goes with --to-original"),
        (["hf", "out"], "in Hugging Face's layout already"),
        (["a.pth", "full", "--config", "hf"], "exists already"),
        (["a.pth", "gone/out", "--config", "hf"], "there is no folder"),
        (["cut.pth", "out", "--config", "hf"], "not a complete PyTorch file"),
        (["cut.safetensors", "out", "--config", "hf"], "not a complete safetensors file"),
        (["list.pth", "out", "--config", "hf"], "not a dictionary"),
        (["shards", "out", "--config", "hf"], "1 shards are missing: model-2.safetensors"),
        (["empty", "out", "--config", "hf"], "no weights here"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(state, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("full", "hf", "shards", "empty"):
        (tmp_path / name).mkdir()
    torch.save(state, "a.pth")
    torch.save([1], "list.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:1000])
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    (tmp_path / "full/something").touch()
    hf_config(SIZES).save_pretrained("hf")
    save_file(state, "shards/model-1.safetensors")
    where = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (tmp_path / "shards/model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    before = sorted(tmp_path.rglob("*"))
    assert main(["convert", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


class Attack:
    def __reduce__(self):
        return (os.mkdir, ("attacked",))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused(state, config, tmp_path, monkeypatch, capsys, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({**state, "x": Attack()}, "a.pth", _use_new_zipfile_serialization=zipped)
    assert main(["convert", "a.pth", "out", "--config", config]) == 2
    error = capsys.readouterr().err
    assert "refused" in error
    assert ".mkdir" in error
    assert error.count("\n") == 1
    assert not Path("attacked").exists()
    assert not Path("out").exists()


def test_every_mismatch_is_listed_at_once(state, config, tmp_path):
    state = dict(state)
    del state["gen_embed.weight"]
    del state["vision_model.vision_tower.blocks.1.attn.qkv.bias"]
    state["aligner.layers.4.weight"] = torch.zeros(2)
    state["step"] = 3
    state["language_model.model.norm.weight"] = torch.zeros(31)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="5 entries do not fit") as caught:
        convert(tmp_path / "a.pth", tmp_path / "hf", config=config)
    assert str(caught.value).splitlines()[1:] == [
        "  extra: aligner.layers.4.weight [2]",
        "  missing: gen_embed.weight [40, 8]",
        "  missing: vision_model.vision_tower.blocks.1.attn.qkv.bias [72]",
        "  not a tensor: step (int)",
        "  shape: language_model.model.norm.weight is [31], should be [32]",
    ]
    assert not (tmp_path / "hf").exists()


def test_a_missing_output_embedding_is_an_error_unless_tied(state, tmp_path):
    hf_config(SIZES, tie_word_embeddings=False).save_pretrained(tmp_path / "untied")
    torch.save({k: v for k, v in state.items() if k != keys.HEAD}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"missing: language_model.lm_head.weight \[348, 32\]"):
        convert(tmp_path / "a.pth", tmp_path / "hf", config=tmp_path / "untied")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("gen_vision_config"), "lacks gen_vision_config"),  # JanusFlow has none
        (lambda c: c["aligner_config"]["params"].update(projector_type="linear"), "projector 'linear'"),
        (lambda c: c["vision_config"]["params"].update(model_name="sam_b"), "'sam_b' is not known"),
        (lambda c: c["vision_config"]["params"].update(pixel_mean=[0.5]), "pixel_mean"),
        (lambda c: c["gen_vision_config"].update(cls="VQ-8"), "'VQ-8' is not known"),
        (lambda c: c["gen_head_config"]["params"].update(image_token_embed=1), "one size"),
        (lambda c: c["language_config"].update(model_type="qwen2"), "'qwen2'"),
        (lambda c: c["aligner_config"]["params"].pop("n_embed"), "'n_embed' is not stated"),
    ],
)
def test_a_configuration_that_hugging_faces_class_cannot_express_is_refused(change, message):
    stated = copy.deepcopy(PRO_7B)
    change(stated)
    with pytest.raises(ValueError, match=message):
        to_hf(stated, Path("config.json"))


def test_the_towers_output_layer_counts():
    """DeepSeek's code builds fewer blocks when an earlier layer is selected."""
    stated = copy.deepcopy(PRO_7B)
    stated["vision_config"]["params"]["select_layer"] = -2
    assert to_hf(stated, Path("config.json")).vision_config.num_hidden_layers == 23


def test_rotary_settings_and_precision_survive(tmp_path):
    stated = copy.deepcopy(PRO_7B)
    stated["language_config"] |= {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    config = to_hf(stated, Path("config.json"))
    assert config.text_config.rope_parameters == {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    language = to_original(config, "bfloat16")["language_config"]
    assert (language["rope_theta"], language["rope_scaling"]["factor"]) == (5e5, 2.0)
    assert language["torch_dtype"] == "bfloat16"


# --- what lies beside the weights ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(original, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "hf"
    convert(original, out)
    return out


CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " what is it? "}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a circle"}]},
    {"role": "user", "content": "and now?"},
]


def test_the_converted_folder_serves_the_library_like_any_other(converted, state, samples):
    adapter = load_adapter(converted, device="cpu")
    processor = adapter.processor
    assert (processor.image_processor.size["height"], processor.image_processor.min_size) == (16, 4)
    assert processor.apply_chat_template(CHAT, add_generation_prompt=True) == (
        "<|User|>: <image_placeholder>\nwhat is it?\n\n<|Assistant|>: a circle<｜end▁of▁sentence｜>"
        "<|User|>: and now?\n\n<|Assistant|>:"
    )
    assert processor.apply_chat_template(CHAT[:2]).endswith("a circle<｜end▁of▁sentence｜>")
    ids = adapter.tokenizer("a red circle")["input_ids"]
    assert ids[0] == adapter.tokenizer.bos_token_id
    assert ids.count(adapter.tokenizer.bos_token_id) == 1
    assert adapter.model.config.image_token_id == adapter.tokenizer.convert_tokens_to_ids(
        "<image_placeholder>"
    )
    # A padding row would get no gradient; the original's does, and dropped prompts are made of it.
    assert adapter.model.get_input_embeddings().padding_idx is None
    for task in ("generation", "understanding"):
        batch = adapter.collate(samples[task], task)
        assert batch.query_mask.any()
        assert batch.key_mask.any()
        assert adapter.forward(batch).logits.isfinite().all()


def test_generation_settings_are_what_generate_needs(converted):
    model = JanusForConditionalGeneration.from_pretrained(converted)
    settings = model.generation_config
    assert settings.guidance_scale == 5
    assert settings.pad_token_id != settings.eos_token_id
    ids = torch.tensor([[settings.bos_token_id, 70, 71]])
    settings.generation_kwargs = GenerationConfig.from_pretrained(converted).generation_kwargs
    drawn = model.generate(ids, attention_mask=torch.ones_like(ids), generation_mode="image", max_length=20)
    assert drawn.shape == (1, 16)


def test_a_hugging_face_folders_processor_is_copied_as_it_is(converted, original, tmp_path):
    torch.save(load_tensors(original), tmp_path / "a.pth")
    report = convert(tmp_path / "a.pth", tmp_path / "hf", config=converted)
    assert not any("processor" in note for note in report.notes)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "processor_config.json",
        "generation_config.json",
    ):
        assert (tmp_path / "hf" / name).read_bytes() == (converted / name).read_bytes()


def test_processor_files_for_deepseeks_code_are_made_from_hugging_faces(converted, original, tmp_path):
    plain = tmp_path / "plain"  # as from the hub: nothing of the original beside it
    shutil.copytree(converted, plain, ignore=lambda *_: {OTHER})
    convert_back(plain, tmp_path / "back")
    for name in ("preprocessor_config.json", "processor_config.json"):
        made, expected = (json.loads((f / name).read_text()) for f in (tmp_path / "back", original))
        assert made.items() >= expected.items()
    made = json.loads((tmp_path / "back/tokenizer_config.json").read_text())
    assert made["bos_token"] == "<｜begin▁of▁sentence｜>"
    convert(tmp_path / "back", tmp_path / "again")  # and Hugging Face's own come back
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (plain / "tokenizer.json").read_bytes()


def test_a_tokenizer_without_janus_tokens_is_refused(original, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(original, folder)
    text = (folder / "tokenizer.json").read_text().replace("begin_of_image", "something_else")
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="it lacks <begin_of_image>"):
        convert(folder, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


# --- writing ------------------------------------------------------------------------------------------------


def test_a_failed_run_leaves_nothing_and_a_killed_ones_leftovers_are_replaced(tmp_path):
    out = tmp_path / "out"

    def fail() -> None:
        with new_path(out) as part:
            part.mkdir()
            (part / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part/half").touch()
    with new_path(out) as part:
        part.mkdir()
        (part / "whole").touch()
    assert [p.name for p in out.iterdir()] == ["whole"]


def test_a_full_disk_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(OSError, match=r"needs 1000000000\.0 GB of disk"), new_path(tmp_path / "out", 10**18):
        raise AssertionError("never entered")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_are_never_held_in_memory(state, tmp_path, suffix):
    """A big embedding: memory of our own must not grow by its size, though all of it is copied."""
    rows = 250_000  # 64 MB with the output embedding
    big = {**state, keys.WORDS: torch.zeros(rows, 32), keys.HEAD: torch.ones(rows, 32)}
    save_file(big, tmp_path / "a.safetensors") if suffix == "safetensors" else torch.save(
        big, tmp_path / "a.pth"
    )
    del big
    config = hf_config(Sizes(vocab=rows))
    config.save_pretrained(tmp_path)

    def own() -> int:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    convert(
        tmp_path / "a.pth" if suffix == "pth" else tmp_path / "a.safetensors", tmp_path / "warm", tmp_path
    )
    before, peak, done = own(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], own())
            done.wait(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        convert(tmp_path / f"a.{suffix}", tmp_path / "hf", config=tmp_path)
    finally:
        done.set()
        watcher.join()
    assert peak[0] - before < 32e6


# --- folders that other converters made ---------------------------------------------------------------------


def test_the_adapter_names_the_originals_codes_though_a_folder_has_the_untouched_codebook(
    converted, state, tmp_path
):
    """transformers' own converter left the codebook as it was; its `encode` then finds other codes."""
    plain = tmp_path / "plain"
    shutil.copytree(converted, plain, ignore=lambda *_: {OTHER})
    weights = load_tensors(converted)
    save_file({**weights, keys.HF_CODEBOOK: state[keys.CODEBOOK]}, plain / "model.safetensors")
    original = random_model(SIZES)
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = original.gen_vision_model.encode(pixels)
        stock = JanusForConditionalGeneration.from_pretrained(plain).model.vqmodel.encode(pixels).image_tokens
    assert (stock.view(4, -1) != expected).any()
    adapter = load_adapter(plain, device="cpu")
    assert torch.equal(adapter.image_codes(pixels), expected)
    assert torch.equal(load_adapter(converted, device="cpu").image_codes(pixels), expected)
