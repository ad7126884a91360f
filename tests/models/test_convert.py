"""The converter against an independent model in the original layout: same numbers, bit for bit back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from convert_helpers import IMAGE, PRO_7B, hf_config
from hypothesis import given, settings
from hypothesis import strategies as st
from original_janus import OriginalJanus, Sizes, random_model
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import JanusForConditionalGeneration

from minimal_aia.models import convert_keys as keys
from minimal_aia.models.convert import convert, convert_back
from minimal_aia.models.convert_config import to_hf, to_original
from minimal_aia.models.tensor_files import load_tensors


@pytest.fixture(scope="module")
def model() -> OriginalJanus:
    return random_model()


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    hf_config(Sizes()).save_pretrained(folder)
    return folder / "config.json"


@pytest.fixture(scope="module")
def original_folder(model, tmp_path_factory) -> Path:
    """As DeepSeek's folders: pickled shards and a config.json of theirs."""
    folder = tmp_path_factory.mktemp("original") / "tiny"
    folder.mkdir()
    state = model.state_dict()
    where = {}
    for i in range(3):
        file = f"pytorch_model-{i + 1:05}-of-00003.bin"
        shard = {name: state[name].clone() for name in sorted(state)[i::3]}
        where |= dict.fromkeys(shard, file)
        torch.save(shard, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps(to_original(hf_config(Sizes()), "float32")))
    return folder


@pytest.fixture(scope="module")
def converted(original_folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "hf"
    convert(original_folder, out, shard_bytes=200_000)
    return out


def same(found: dict, expected: dict) -> bool:
    assert set(found) == set(expected)
    return all(found[k].dtype == expected[k].dtype and torch.equal(found[k], expected[k]) for k in expected)


# --- the same numbers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(converted) -> JanusForConditionalGeneration:
    found, info = JanusForConditionalGeneration.from_pretrained(converted, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found.config.image_token_id = IMAGE  # a matter of the tokenizer, which this folder lacks
    return found.eval()


def test_understanding_gives_the_logits_and_loss_of_the_original(model, loaded):
    torch.manual_seed(1)
    ids = torch.randint(6, 60, (2, 24))
    ids[0, 2:18] = ids[1, 5:21] = IMAGE
    pixels = torch.randn(2, 3, 16, 16)
    labels = ids.masked_fill(ids == IMAGE, -100)
    with torch.no_grad():
        expected = model.understand(ids, pixels, IMAGE)
        found = loaded(input_ids=ids, pixel_values=pixels, labels=labels)
    assert expected.std() > 0.1
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-5)
    loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(found.loss, loss, rtol=1e-5, atol=1e-6)


def test_generation_gives_the_image_tokens_logits_loss_and_picture_of_the_original(model, loaded):
    torch.manual_seed(2)
    pixels, ids = torch.randn(8, 3, 16, 16), torch.randint(6, 60, (8, 7))
    with torch.no_grad():
        codes = model.gen_vision_model.encode(pixels)
        found_codes = loaded.model.vqmodel.encode(pixels).image_tokens.view(8, -1)
        assert len(codes.unique()) > 10  # not one code everywhere
        assert torch.equal(found_codes, codes)

        expected = model.draw(ids, codes)
        words = loaded.get_input_embeddings()(ids)
        image = loaded.prepare_embeddings_for_image_generation(codes)
        hidden = loaded.model.language_model(inputs_embeds=torch.cat([words, image], 1)).last_hidden_state
        found = loaded.model.generation_head(hidden[:, 6:-1])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        loss = F.cross_entropy(expected.flatten(0, 1), codes.flatten())
        torch.testing.assert_close(F.cross_entropy(found.flatten(0, 1), codes.flatten()), loss)

        picture = loaded.model.vqmodel.decode(codes)
        torch.testing.assert_close(picture, model.gen_vision_model.decode(codes), rtol=1e-3, atol=1e-4)


def test_the_untouched_codebook_would_give_other_image_tokens(model, loaded):
    """Why the converter normalises it: transformers' encode compares lengths too."""
    torch.manual_seed(2)
    pixels = torch.randn(8, 3, 16, 16)
    weight = loaded.model.vqmodel.quantize.embedding.weight
    kept = weight.clone()
    try:
        with torch.no_grad():
            expected = model.gen_vision_model.encode(pixels)
            weight.copy_(model.gen_vision_model.quantize.embedding.weight)
            wrong = loaded.model.vqmodel.encode(pixels).image_tokens.view(8, -1)
    finally:
        weight.data.copy_(kept)
    assert (wrong != expected).float().mean() > 0.2


# --- back and forth, bit for bit ----------------------------------------------------------------------------


def wrapped(state: dict, kind: str, path: Path) -> Path:
    path = path / f"iter_999.{'safetensors' if kind == 'safetensors' else 'pth'}"
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "top":
        torch.save(state, path)
    elif kind == "old":  # before torch 1.6; cannot be mapped
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        torch.save({kind: state, "epoch": 3}, path)
    return path


@pytest.mark.parametrize("kind", ["top", "module", "ema", "state_dict", "old", "safetensors"])
def test_a_bare_file_goes_there_and_back(model, config_file, tmp_path, kind):
    state = model.state_dict()
    report = convert(wrapped(state, kind, tmp_path), tmp_path / "hf", config=config_file)
    assert any(repr(kind) in note for note in report.notes) == (kind in ("module", "ema", "state_dict"))
    convert_back(tmp_path / "hf", tmp_path / "back.pth")
    assert same(torch.load(tmp_path / "back.pth", weights_only=True), state)


def test_of_several_sets_of_weights_the_authors_choice_is_taken_and_named(model, config_file, tmp_path):
    state = model.state_dict()
    other = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"module": other, "ema": state}, tmp_path / "a.pth")
    report = convert(tmp_path / "a.pth", tmp_path / "hf", config=config_file)
    assert any("'ema'" in note and "module" in note for note in report.notes)
    convert_back(tmp_path / "hf", tmp_path / "back.pth")
    assert same(torch.load(tmp_path / "back.pth", weights_only=True), state)


def test_a_sharded_folder_goes_there_and_back(model, original_folder, converted, tmp_path):
    assert len(list(converted.glob("model-*.safetensors"))) > 2
    convert_back(converted, tmp_path / "back", shard_bytes=300_000)
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 2
    assert same(load_tensors(tmp_path / "back"), model.state_dict())
    assert (tmp_path / "back/config.json").read_bytes() == (original_folder / "config.json").read_bytes()


def test_precision_is_kept_tensor_by_tensor(model, config_file, tmp_path):
    state = {
        name: tensor if "codebook_used" in name or "aligner" in name else tensor.bfloat16()
        for name, tensor in model.state_dict().items()
    }
    torch.save(state, tmp_path / "a.pth")
    report = convert(tmp_path / "a.pth", tmp_path / "hf", config=config_file)
    assert any("several precisions" in note for note in report.notes)
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "bfloat16"
    convert_back(tmp_path / "hf", tmp_path / "back.pth")
    assert same(torch.load(tmp_path / "back.pth", weights_only=True), state)


@pytest.mark.parametrize("tie", [True, False])
def test_a_hugging_face_folder_goes_there_and_back(tmp_path, tie):
    torch.manual_seed(3)
    first = JanusForConditionalGeneration(hf_config(Sizes(), tie_word_embeddings=tie))
    first.save_pretrained(tmp_path / "hf")
    report = convert_back(tmp_path / "hf", tmp_path / "original")
    assert any("strict loading" in note for note in report.notes)
    assert any("not length one" in note for note in report.notes)
    original = load_tensors(tmp_path / "original")
    reference = OriginalJanus(Sizes())
    missing, unexpected = reference.load_state_dict(original, strict=False)
    assert not unexpected
    assert all(keys.LEFTOVER.fullmatch(name) for name in missing)
    convert(tmp_path / "original", tmp_path / "again")
    assert same(load_tensors(tmp_path / "again"), load_tensors(tmp_path / "hf"))
    before, after = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("hf", "again"))
    assert after["vision_config"] == before["vision_config"]
    assert after["vq_config"] == before["vq_config"]
    assert after["tie_word_embeddings"] == before["tie_word_embeddings"] == tie


def test_leftovers_come_from_the_original_when_training_lost_them(
    model, converted, original_folder, tmp_path
):
    trained = JanusForConditionalGeneration.from_pretrained(converted)
    with torch.no_grad():
        trained.lm_head.weight.add_(1)
    trained.save_pretrained(tmp_path / "trained")  # as any trainer does: no `other_layout`
    report = convert_back(tmp_path / "trained", tmp_path / "a.pth")
    assert any("--leftovers" in note for note in report.notes)
    expected = model.state_dict()
    expected["language_model.lm_head.weight"] = trained.lm_head.weight.detach()
    for i, leftovers in enumerate([original_folder, converted]):
        convert_back(tmp_path / "trained", tmp_path / f"{i}.pth", leftovers=leftovers)
        assert same(torch.load(tmp_path / f"{i}.pth", weights_only=True), expected)
        OriginalJanus(Sizes()).load_state_dict(expected, strict=True)


def test_a_codebook_that_was_trained_is_not_put_back(converted, tmp_path):
    trained = JanusForConditionalGeneration.from_pretrained(converted)
    with torch.no_grad():
        codebook = trained.model.vqmodel.quantize.embedding.weight.neg_().clone()
    trained.save_pretrained(tmp_path / "trained")
    convert_back(tmp_path / "trained", tmp_path / "a.pth", leftovers=converted)
    assert torch.equal(torch.load(tmp_path / "a.pth", weights_only=True)[keys.CODEBOOK], codebook)


# --- output embeddings, tied or not -------------------------------------------------------------------------


def test_unlike_embeddings_stay_apart_though_the_configuration_ties_them(model, config_file, tmp_path):
    """JanusConfig ties them unless told otherwise; Janus' are different tensors."""
    assert json.loads(config_file.read_text())["tie_word_embeddings"] is True
    torch.save(model.state_dict(), tmp_path / "a.pth")
    report = convert(tmp_path / "a.pth", tmp_path / "hf", config=config_file)
    assert any("tie_word_embeddings=false" in note for note in report.notes)
    loaded = JanusForConditionalGeneration.from_pretrained(tmp_path / "hf")
    assert loaded.config.tie_word_embeddings is False
    assert torch.equal(loaded.lm_head.weight, model.language_model.lm_head.weight)


@pytest.mark.parametrize("written", [True, False])
def test_tied_embeddings_stay_tied_and_come_back_as_they_were(model, config_file, tmp_path, written):
    state = model.state_dict()
    state[keys.HEAD] = state[keys.WORDS]
    if not written:
        del state[keys.HEAD]
    torch.save(state, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "hf", config=config_file)
    assert "lm_head.weight" not in load_tensors(tmp_path / "hf")
    loaded = JanusForConditionalGeneration.from_pretrained(tmp_path / "hf")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    convert_back(tmp_path / "hf", tmp_path / "back")
    assert same(load_tensors(tmp_path / "back"), state)


# --- names and sizes ----------------------------------------------------------------------------------------

sizes = st.builds(
    Sizes,
    layers=st.sampled_from([1, 2, 11]),
    vit_layers=st.sampled_from([1, 2, 11]),
    depth=st.integers(1, 4),
    gen_depth=st.integers(1, 4),
    blocks=st.integers(1, 2),
    levels=st.lists(st.integers(1, 2), min_size=1, max_size=3).map(tuple),
    vit=st.sampled_from([8, 24]),
    code=st.integers(1, 9),
    codes=st.integers(2, 50),
    vocab=st.integers(7, 99),
    kv_heads=st.sampled_from([1, 2, 4]),
)


@settings(max_examples=8)
@given(sizes)
def test_names_and_shapes_are_those_of_the_original_at_any_size(s):
    with torch.device("meta"):
        original = {name: tuple(t.shape) for name, t in OriginalJanus(s).state_dict().items()}
    entries = keys.layout(hf_config(s))
    assert {n: e.shape for n, e in entries.items()} == {
        n: shape for n, shape in original.items() if not keys.LEFTOVER.fullmatch(n)
    }
    names = [name for entry in entries.values() for name in entry.names]
    assert len(names) == len(set(names))  # a bijection: no Hugging Face tensor is written twice or left out
    assert set(names) == set(keys.hf_shapes(hf_config(s)))
    config = hf_config(s)
    again = to_hf(json.loads(json.dumps(to_original(config, "float32"))), Path("config.json"))
    assert keys.hf_shapes(again) == keys.hf_shapes(config)


@settings(max_examples=25)
@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from(["qkv.weight", "qkv.bias", "pos_embed", "proj.weight"]),
)
def test_split_and_merge_are_inverse(rows, columns, name):
    n = 3 if "qkv" in name else 1
    tensor = torch.randn((1, rows, columns) if name == "pos_embed" else (n * rows, columns))
    entry = keys.Entry(tuple(tensor.shape), tuple("qkv"[:n]))
    parts = keys.split(name, tensor, entry)
    assert torch.equal(keys.merge(name, list(parts.values())), tensor)
    if n == 3:
        assert torch.equal(parts["k"], tensor[rows : 2 * rows])


def test_the_published_configuration_of_janus_pro_7b():
    config = to_hf(PRO_7B, Path("config.json"))
    assert (config.text_config.hidden_size, config.text_config.num_attention_heads) == (4096, 32)
    assert config.text_config.pad_token_id is None  # a padding row would get no gradient; the original's does
    assert config.vision_config.num_image_tokens == 576
    assert config.vq_config.num_patches == 24
    assert config.tie_word_embeddings is False
    big = Sizes(
        **{"vocab": 102400, "width": 4096, "feed": 11008, "layers": 30, "heads": 32, "kv_heads": 32},
        **{"image": 384, "patch": 16, "vit": 1024, "vit_layers": 24, "vit_heads": 16, "ratio": 4},
        **{
            "codes": 16384,
            "channels": 128,
            "levels": (1, 1, 2, 2, 4),
            "blocks": 2,
            "latent": 256,
            "head": 4096,
        },
    )
    with torch.device("meta"):
        original = {name: tuple(t.shape) for name, t in OriginalJanus(big).state_dict().items()}
    expected = {n: shape for n, shape in original.items() if not keys.LEFTOVER.fullmatch(n)}
    assert {n: e.shape for n, e in keys.layout(config).items()} == expected
    back = to_original(config, "bfloat16")
    for part in ("vision", "aligner", "gen_vision", "gen_aligner", "gen_head"):
        assert back[f"{part}_config"]["params"] == PRO_7B[f"{part}_config"]["params"]
    assert to_hf(back, Path("config.json")).to_dict() == config.to_dict()
