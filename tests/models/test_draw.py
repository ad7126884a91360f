"""Prompts without a target picture: the model draws one, and one pass over it equals the steps that drew
it."""

from __future__ import annotations

import pytest
import torch
from checkpoints import MAKERS

from minimal_aia.data import Sample
from minimal_aia.models import AdapterError, load_adapter

PROMPTS = [
    Sample("p:1", "generation", (("a red circle", ""),), ()),
    Sample("p:2", "generation", (("two blue squares on a white wall", ""),), ()),
]
DRAWING = {
    "janus": {"draw": True},
    "emu3": {"draw": True, "image_area": 24 * 24},
    "simplear": {"n_codes": 12},
}


def load(checkpoint, family: str, **more):
    return load_adapter(checkpoint(family), device="cpu", **{**DRAWING[family], **more})


def image_ids(model, batch) -> list[list[int]]:
    if model.family == "janus":
        return batch.inputs["codes"].tolist()
    ids = model.token_ids(batch) if model.family == "emu3" else batch.inputs["input_ids"]
    return [row[mask].tolist() for row, mask in zip(ids, batch.query_mask)]


@pytest.mark.parametrize("family", list(DRAWING))
def test_drawn_pictures_depend_on_the_sample_and_the_seed_only(checkpoint, family):
    both = load(checkpoint, family)
    batch = both.collate(PROMPTS, "generation")
    drawn = image_ids(both, batch)
    alone = load(checkpoint, family)
    assert image_ids(alone, alone.collate(PROMPTS[1:], "generation")) == drawn[1:]
    other = load(checkpoint, family, seed=1)
    assert image_ids(other, other.collate(PROMPTS, "generation")) != drawn
    assert image_ids(both, both.collate(PROMPTS, "generation")) == drawn  # remembered

    tokenizer = both.tokenizer
    for row, sample in enumerate(PROMPTS):
        assert (
            tokenizer.decode(batch.inputs["input_ids"][row][batch.key_mask[row]]).strip()
            == sample.turns[0][0]
        )
    with torch.no_grad(), both.capture(batch) as record:
        both.forward(batch)
    assert record.per_head.isfinite().all()


def test_emu3_draws_rows_of_codes_with_line_ends(checkpoint):
    model = load(checkpoint, "emu3")
    vocabulary = model.model.config.vocabulary_map
    codes = {i for token, i in vocabulary.items() if token.startswith("<|visual")}
    for ids in image_ids(model, model.collate(PROMPTS, "generation")):
        rows = torch.tensor(ids).view(3, 4)  # 24 x 24 pixels, 8 a code
        assert set(rows[:, :3].flatten().tolist()) <= codes
        assert set(rows[:, 3].tolist()) == {vocabulary["<|extra_200|>"]}


@pytest.mark.parametrize("family", ["janus", "emu3"])
def test_target_pictures_beside_drawn_ones_stay_what_they_were(checkpoint, samples, family):
    model = load(checkpoint, family)
    target = samples["generation"][0]
    plain, mixed = model.collate([target], "generation"), model.collate([target, PROMPTS[0]], "generation")
    n = int(plain.attention_mask.sum())
    assert torch.equal(plain.query_mask[0], mixed.query_mask[0, :n])
    assert torch.equal(plain.key_mask[0], mixed.key_mask[0, :n])
    with torch.no_grad():
        with model.capture(plain) as one:
            model.forward(plain)
        with model.capture(mixed) as two:
            model.forward(mixed)
    torch.testing.assert_close(one.per_head[:, 0], two.per_head[:, 0], atol=1e-5, rtol=1e-4)


def test_one_pass_equals_the_decoding_steps(checkpoint):
    """Eq. 1 from eager attention rows, one cached step a token, against one teacher-forced pass."""
    model = load(checkpoint, "simplear")
    batch = model.collate(PROMPTS[:1], "generation")
    with torch.no_grad(), model.capture(batch) as record:
        model.forward(batch)
    model.model.set_attn_implementation("eager")
    ids, cache, rows = batch.inputs["input_ids"], None, []
    with torch.no_grad():
        for position in range(ids.shape[1]):
            out = model.model(
                ids[:, position : position + 1], past_key_values=cache, use_cache=True, output_attentions=True
            )
            cache = out.past_key_values
            if batch.query_mask[0, position]:
                keys = batch.key_mask[0, : position + 1]
                rows.append(torch.stack([a[0, :, 0, keys].sum(-1) for a in out.attentions]))
    assert len(rows) == 12
    torch.testing.assert_close(record.per_head[:, 0], torch.stack(rows).mean(0), atol=1e-5, rtol=1e-4)


def test_simplear_takes_codes_of_a_target_picture(checkpoint, samples):
    model = load(checkpoint, "simplear", image_codes=lambda path: [3, 1, 4, 1, 5])
    batch = model.collate(samples["generation"], "generation")
    first = len(model.tokenizer)  # the authors count codes from there
    assert [[i - first for i in ids] for ids in image_ids(model, batch)] == [[3, 1, 4, 1, 5]] * 2
    wrong = load(checkpoint, "simplear", image_codes=lambda path: [32])
    with pytest.raises(AdapterError, match="codes outside the vocabulary"):
        wrong.collate(samples["generation"], "generation")


def test_a_text_model_is_not_taken_for_simplear(tmp_path):
    folder = MAKERS["simplear"](tmp_path / "text", n_codes=0)
    with pytest.raises(AdapterError, match="no image codes in its vocabulary"):
        load_adapter(folder, device="cpu")


def test_unknown_options_name_the_known_ones(checkpoint):
    with pytest.raises(AdapterError, match=r"'janus' has no option 'steps'; it has: .*draw"):
        load_adapter(checkpoint("janus"), steps=3)
    with pytest.raises(AdapterError, match=r"'deepseek-vl' has no option 'draw'"):
        load_adapter(checkpoint("deepseek-vl"), draw=True)
