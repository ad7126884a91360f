"""Lab models against transformers' own paths: forward, greedy decoding, image generation, saving."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from minimal_aia.lab import images, metrics, models, scenes, sequences

CODEBOOK = np.random.default_rng(0).random((images.N_CODES, 48)).astype(np.float32)


@pytest.fixture(scope="module")
def built() -> dict:
    return {name: models.build(name, seed=1).eval() for name in ("unified", "janus")}


def batch_of(task: str, size: int = 4) -> sequences.Sequences:
    return sequences.draw_batch(task, size, np.random.default_rng(5), CODEBOOK)


@pytest.mark.parametrize("task", ["generation", "understanding"])
def test_spans_decode_to_prompt_answer_and_picture(task):
    batch = batch_of(task)
    words = models.tokenizer(with_codes=True)
    rng = np.random.default_rng(5)
    found = scenes.draw_scenes(rng, 4)
    codes = images.encode(np.stack([scenes.render(s) for s in found]), CODEBOOK)
    for row, scene in enumerate(found):
        query = words.decode(batch.ids[row][batch.query_mask[row]])
        key = words.decode(batch.ids[row][batch.key_mask[row]])
        picture = " ".join(f"<code_{c}>" for c in codes[row])
        if task == "generation":
            assert key == scenes.draw_prompt(scene, rng).text
            assert query == picture
            assert torch.equal(batch.label_mask[row], batch.query_mask[row])
        else:
            questions = scenes.draw_questions(scene, 4, rng)
            assert query == " ".join(q.answer for q in questions)
            assert key == picture
            labels = words.decode(batch.ids[row][batch.label_mask[row]])
            assert labels == " ".join(f"{q.answer} <eos>" for q in questions)
    assert not (batch.query_mask & ~batch.attention_mask).any()
    assert (batch.ids[~batch.attention_mask] == sequences.PAD).all()


@pytest.mark.parametrize("name", ["unified", "janus"])
def test_understanding_logits_equal_the_class_s_own_forward(built, name):
    model, batch = built[name], batch_of("understanding")
    logits, labels = models.label_logits(model, batch, "understanding")
    inputs = {"input_ids": batch.ids, "attention_mask": batch.attention_mask.long()}
    if name == "janus":
        inputs["input_ids"] = batch.ids.masked_fill(batch.ids >= sequences.FIRST_CODE, sequences.IMAGE)
        inputs["pixel_values"] = batch.pixels
    own = model(**inputs).logits[:, :-1][batch.label_mask[:, 1:]]
    torch.testing.assert_close(logits, own, atol=1e-5, rtol=1e-4)
    targets = batch.ids.masked_fill(~batch.label_mask, -100)
    flat = model(**inputs).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(flat, targets[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(models.next_token_loss(model, batch, "understanding"), expected)
    assert len(labels) == int(batch.label_mask.sum())


def test_answers_right_is_greedy_decoding(built):
    """Teach one answer by force, so that both outcomes occur, then compare with `generate` row by row."""
    model = models.build("unified", seed=2)
    rng = np.random.default_rng(0)
    found = scenes.draw_scenes(rng, 12)
    questions = [scenes.draw_question(s, "count", rng) for s in found]
    codes = images.encode(np.stack([scenes.render(s) for s in found]), CODEBOOK).tolist()
    rows = [sequences.understanding_tokens([(q.text, q.answer)], c) for q, c in zip(questions, codes)]
    pictures = np.stack([scenes.render(s) for s in found])
    batch = sequences.pad(rows, pictures)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(12):
        optimizer.zero_grad()
        models.next_token_loss(model, batch, "understanding").backward()
        optimizer.step()
    model.eval()
    right = metrics.answers_right(model, batch)
    for i, (ids, roles) in enumerate(rows):
        start = roles.rindex("-") + 1
        out = model.generate(torch.tensor([ids[:start]]), max_new_tokens=len(ids) - start, do_sample=False)
        assert bool(right[i]) == (out[0].tolist() == ids), i
    assert 0 < right.sum() < len(right)


@pytest.mark.parametrize("name", ["unified", "janus"])
def test_drawing_follows_the_teacher_forced_logits(built, name):
    """At temperature 0+ the sampler takes the most likely code; one teacher-forced pass must agree."""
    model = built[name]
    prompts = ["a red circle", "two blue squares", "a red circle above a blue square"]
    codes = models.draw(model, prompts, temperature=1e-4)
    rows = [sequences.generation_tokens(p, c) for p, c in zip(prompts, codes.tolist())]
    batch = sequences.pad(rows, images.decode(codes, CODEBOOK))
    logits, labels = models.label_logits(model, batch, "generation")
    if name == "unified":
        logits, labels = logits[:, sequences.FIRST_CODE :], labels - sequences.FIRST_CODE
    assert torch.equal(logits.argmax(-1), labels)


def test_drawing_is_the_same_from_the_same_seed(built):
    prompts = ["a red circle", "a green cross at top left"]
    a, b, c = (models.draw(built["unified"], prompts, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


@pytest.mark.parametrize("name", ["unified", "janus"])
def test_saved_models_come_back_with_tokenizer_and_codebook(built, name, tmp_path):
    models.save(built[name], CODEBOOK, tmp_path)
    model, codebook = models.load(tmp_path)
    np.testing.assert_array_equal(codebook, CODEBOOK)
    for task in ("generation", "understanding"):
        batch = batch_of(task)
        with torch.no_grad():
            ours = models.label_logits(built[name], batch, task)[0]
            theirs = models.label_logits(model, batch, task)[0]
        torch.testing.assert_close(theirs, ours, atol=0, rtol=0)
    words = AutoTokenizer.from_pretrained(tmp_path)
    text = "is the red circle left of the blue square ?"
    assert words(text)["input_ids"] == sequences.word_ids(text)
    assert words("zebra")["input_ids"] == [sequences.UNK]
    assert words.convert_tokens_to_ids(["<pad>", "<bos>", "<eos>", "<boi>", "<eoi>", "<image>"]) == list(
        range(6)
    )


def test_a_folder_without_codebook_is_no_lab_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="no lab model"):
        models.load(tmp_path)
    with pytest.raises(ValueError, match="unknown lab model 'gpt'"):
        models.build("gpt")


def test_loading_is_silent_and_leaves_progress_bars_as_they_were(built, tmp_path, capfd):
    """A bar in a stored notebook differs from run to run."""
    models.save(built["unified"], CODEBOOK, tmp_path)
    capfd.readouterr()
    enabled = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        models.load(tmp_path)
        assert logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        models.load(tmp_path)
        assert not logging.is_progress_bar_enabled()
    finally:
        (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()
    assert "Loading" not in "".join(capfd.readouterr())


def test_guessing_level_counts_the_things_that_share_the_answer(monkeypatch):
    one = (scenes.Thing("red", "circle", 0, 0),)
    two = (scenes.Thing("red", "circle", 0, 0), scenes.Thing("blue", "cross", 1, 1))
    asked = {
        "color": [scenes.Question("what color is the circle ?", "red", "color")] * 2,
        "position": [scenes.Question("where is the red circle ?", "top left", "position")] * 2,
    }
    monkeypatch.setattr(metrics, "held_out_items", lambda kind, count, seed: ([one, two], asked[kind]))
    assert metrics.guessing_level("color") == pytest.approx(0.75)
    assert metrics.guessing_level("position") == pytest.approx(0.75)
