"""What the repository ships: the checkpoints load, run, and are the ones that the tables describe."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, JanusForConditionalGeneration

import minimal_aia as aia
from minimal_aia.lab import images, metrics, models, scenes
from minimal_aia.models.lab import CHECKPOINTS, load_lab

DATA = Path(__file__).parents[2] / "data_samples"
PAIRS = [(name, task) for name in models.NAMES for task in models.TASKS[name]]


def test_all_checkpoints_together_stay_under_15_megabytes():
    sizes = [file.stat().st_size for file in CHECKPOINTS.rglob("*") if file.is_file()]
    assert {f.name for f in CHECKPOINTS.iterdir() if f.is_dir()} == {*models.NAMES, "unified-early"}
    assert sum(sizes) < 15e6
    assert not [f for f in CHECKPOINTS.rglob("*") if f.suffix in (".bin", ".pt", ".pth", ".pkl")]


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_the_tables_describe_the_shipped_weights(name, task):
    """Measured again from the weights: the held-out loss and the curve of seed 0 in the tables."""
    model, codebook = models.load(CHECKPOINTS / name)
    scores = pd.read_csv(DATA / "lab" / "metrics.csv").set_index(["model", "seed", "task", "metric", "group"])
    stored = scores.loc[(name, 0, task, "next_token_loss", "all"), "value"]
    assert metrics.held_out_loss(model, codebook, task) == pytest.approx(stored, abs=1e-3)
    curves = pd.read_csv(DATA / "lab" / "curves.csv").query("model == @name and seed == 0 and task == @task")
    np.testing.assert_allclose(metrics.curves(model, codebook, task)["mean"], curves["mean"], atol=1e-3)


def test_every_model_has_its_full_length_seeds_in_the_tables():
    for file in ("metrics.csv", "curves.csv"):
        table = pd.read_csv(DATA / "lab" / file)
        seeds = table.groupby(["model", "task"])["seed"].unique()
        assert set(seeds.index) == set(PAIRS)
        assert all(set(range(5)) <= set(found) for found in seeds)
    items = pd.read_csv(DATA / "lab" / "metrics.csv").query("metric != 'next_token_loss'")
    assert (items.groupby(["model", "seed", "metric"])["items"].sum() >= 400).all()
    steps = pd.read_csv(DATA / "lab" / "training_loss.csv").groupby(["model", "seed"])["step"].max()
    assert steps.nunique() == 1


def test_the_unified_model_feels_the_conflict():
    """The set-up's own criterion: worse than the single-task models, over seeds, in at least one task."""
    losses = pd.read_csv(DATA / "lab" / "metrics.csv").query("metric == 'next_token_loss'")
    wide = losses.pivot(index="seed", columns=["model", "task"], values="value")
    gap = wide["unified", "generation"] - wide["generation", "generation"]
    assert gap.mean() > 3 * gap.std() / len(gap) ** 0.5 > 0


@pytest.mark.parametrize("name", ["unified", "generation"])
def test_from_pretrained_and_generate_draw_a_picture(name):
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name).eval()
    words = AutoTokenizer.from_pretrained(CHECKPOINTS / name)
    _, codebook = models.load(CHECKPOINTS / name)
    ids = words("<bos> a red circle <boi>", return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=images.N_IMAGE_TOKENS, do_sample=False)
    tokens = words.convert_ids_to_tokens(out[0, ids.shape[1] :])
    assert all(t.startswith("<code_") for t in tokens)
    codes = np.array([[int(t[6:-1]) for t in tokens]])
    assert len(images.detect(images.decode(codes, codebook)[0])) >= 1


@pytest.mark.parametrize("name", ["unified", "understanding"])
def test_from_pretrained_and_generate_answer(name):
    model, codebook = models.load(CHECKPOINTS / name)
    words = AutoTokenizer.from_pretrained(CHECKPOINTS / name)
    right = 0
    for color in scenes.COLORS:
        scene = (scenes.Thing(color, "circle", 1, 1),)
        codes = images.encode(scenes.render(scene)[None], codebook)[0]
        text = "<bos> <boi> " + " ".join(f"<code_{c}>" for c in codes) + " <eoi> how many shapes are there ?"
        ids = words(text, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=2, do_sample=False)
        right += words.decode(out[0, ids.shape[1] :]) == "one <eos>"
    assert right >= 5  # of 6


def test_janus_generates_pictures_and_answers_through_its_own_class():
    model = JanusForConditionalGeneration.from_pretrained(CHECKPOINTS / "janus").eval()
    words = AutoTokenizer.from_pretrained(CHECKPOINTS / "janus")
    model.generation_config.generation_kwargs = {"boi_token_id": words.convert_tokens_to_ids("<boi>")}
    prompt = words("<bos> a red circle <boi>", return_tensors="pt")
    torch.manual_seed(0)
    tokens = model.generate(
        prompt["input_ids"], attention_mask=torch.ones_like(prompt["input_ids"]),
        generation_mode="image", do_sample=True, guidance_scale=2,
    )  # fmt: skip
    assert tokens.shape == (1, images.N_IMAGE_TOKENS)
    pixels = model.decode_image_tokens(tokens)
    assert pixels.shape == (1, 24, 24, 3)
    picture = pixels.detach().add(1).mul(127.5).clamp(0, 255).byte()[0].numpy()
    assert {t.color for t in images.detect(picture)} >= {"red"}

    scene = (scenes.Thing("blue", "square", 0, 2),)
    pixel_values = torch.from_numpy(scenes.render(scene)).permute(2, 0, 1)[None].float() / 127.5 - 1
    ids = words("<bos> <boi> " + "<image> " * 36 + "<eoi> how many shapes are there ?", return_tensors="pt")[
        "input_ids"
    ]
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixel_values,
        generation_mode="text", max_new_tokens=2, do_sample=False,
    )  # fmt: skip
    assert words.decode(out[0, ids.shape[1] :]) == "one <eos>"


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_adapter_spans_and_intensity_equal_eager_attention(name, task):
    adapter = load_lab(name)
    words = models.tokenizer(with_codes=True)
    samples = [s for s in aia.read_samples(DATA / f"{task}.jsonl") if adapter.why_not(s, task) is None][:6]
    assert len(samples) == 6
    batch = adapter.collate(samples, task)
    for row, sample in enumerate(samples):
        text = sample.turns[0][0] if task == "generation" else " ".join(a for _, a in sample.turns)
        span = batch.key_mask if task == "generation" else batch.query_mask
        assert words.decode(batch.inputs["ids"][row][span[row]]) == text
        picture = batch.query_mask if task == "generation" else batch.key_mask
        assert int(picture[row].sum()) == 36
    with torch.no_grad(), adapter.capture(batch) as record:
        adapter.forward(batch)
    decoder = adapter.model.model.language_model if models.is_janus(adapter.model) else adapter.model.model
    seen: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda module, args, out: seen.append(out[1]))
        for layer in adapter.layers()
    ]
    decoder.set_attn_implementation("eager")
    with torch.no_grad():
        adapter.forward(batch)
    for hook in hooks:
        hook.remove()
    eager = torch.stack([aia.intensity_from_attention(a, batch.query_mask, batch.key_mask) for a in seen])
    torch.testing.assert_close(record.intensity, eager, atol=1e-6, rtol=0)


def test_samples_outside_the_lab_are_refused_with_the_reason():
    adapter = load_lab("unified")
    reasons = {
        adapter.why_not(s, s.task) for s in aia.read_samples(DATA / "generation.jsonl") if s.source != "lab"
    }
    assert None not in reasons
    assert any("does not know the word" in reason for reason in reasons)
    with pytest.raises(aia.models.base.AdapterError, match="no lab model 'nothing'"):
        load_lab("nothing")
