"""Every family of transformers: spans are exactly the words and pictures, intensity equals eager."""

from __future__ import annotations

import unicodedata

import pytest
import torch
from checkpoints import MAKERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minimal_aia.data import Sample
from minimal_aia.intensity import intensity_from_attention
from minimal_aia.models import FAMILIES

CASES = [(family, task) for family in MAKERS for task in FAMILIES[family].tasks]
CHATS = [family for family in MAKERS if "understanding" in FAMILIES[family].tasks]


def runs(mask: torch.Tensor) -> list[list[int]]:
    """Positions of a row mask, cut into unbroken runs."""
    result: list[list[int]] = []
    for position in mask.nonzero().flatten().tolist():
        if result and result[-1][-1] == position - 1:
            result[-1].append(position)
        else:
            result.append([position])
    return result


def decoded(adapter, batch, row: int, mask: torch.Tensor) -> list[str]:
    ids = batch.inputs["input_ids"][row]
    return [adapter.tokenizer.decode(ids[run]).strip() for run in runs(mask[row])]


def check_spans(adapter, batch, samples, task: str) -> None:
    words, image = (
        (batch.query_mask, batch.key_mask) if task == "understanding" else (batch.key_mask, batch.query_mask)
    )
    for row, sample in enumerate(samples):
        texts = [answer for _, answer in sample.turns] if task == "understanding" else [sample.turns[0][0]]
        assert decoded(adapter, batch, row, words) == texts
        ids = batch.inputs["input_ids"][row]
        is_image = (
            ids >= adapter.first_code if adapter.family == "simplear" else ids == adapter.image_token_id
        )
        assert torch.equal(image[row], is_image)
        assert image[row].any()
        padding = batch.attention_mask[row] == 0
        assert not (padding & (words[row] | image[row])).any()


@pytest.mark.parametrize(("family", "task"), CASES)
def test_spans_are_the_words_and_the_pictures(adapter, samples, family, task):
    model = adapter(family)
    batch = model.collate(samples[task], task)
    check_spans(model, batch, samples[task], task)
    assert batch.ids == [s.id for s in samples[task]]
    lengths = [model.length(s, task) for s in samples[task]]
    assert lengths == batch.attention_mask.sum(1).tolist()
    assert max(lengths) == batch.attention_mask.shape[1]


@pytest.mark.parametrize("family", CHATS)
def test_several_pictures_are_all_keys(adapter, samples, family):
    model = adapter(family)
    one, two = samples["understanding"]
    apart = sum(
        int(model.collate([Sample("x", "understanding", two.turns, (path,))], "understanding").key_mask.sum())
        for path in two.images
    )
    together = int(model.collate([two], "understanding").key_mask.sum())
    if (
        family == "llava-onevision"
    ):  # with several pictures, each gets the base view only: 16 tokens and a newline
        assert together == 2 * 17
    else:
        assert together == apart
    assert int(model.collate([one], "understanding").key_mask.sum()) > 0


@pytest.mark.parametrize(("family", "task"), CASES)
def test_intensity_equals_eager_attention(adapter, samples, family, task):
    model = adapter(family)
    batch = model.collate(samples[task], task)
    with torch.no_grad(), model.capture(batch) as record:
        model.forward(batch)

    attention = {}
    before = model.model.config._attn_implementation
    model.model.set_attn_implementation("eager")
    hooks = [
        layer.self_attn.register_forward_hook(lambda m, a, out, i=i: attention.__setitem__(i, out[1]))
        for i, layer in enumerate(model.layers())
    ]
    with torch.no_grad():
        model.forward(batch)
    for hook in hooks:
        hook.remove()
    model.model.set_attn_implementation(before)

    reference = torch.stack(
        [
            intensity_from_attention(attention[i], batch.query_mask, batch.key_mask, per_head=True)
            for i in range(len(model.layers()))
        ]
    )
    assert record.per_head.shape == (3, 2, 4)
    torch.testing.assert_close(record.per_head, reference, atol=1e-6, rtol=1e-5)
    assert reference.std() > 0.01  # attention is not flat, so the comparison means something


@pytest.mark.parametrize(("family", "task"), CASES)
def test_padding_and_neighbours_change_nothing(adapter, samples, family, task):
    model = adapter(family)
    together = model.collate(samples[task], task)
    with torch.no_grad(), model.capture(together) as both:
        model.forward(together)
    for row, sample in enumerate(samples[task]):
        alone = model.collate([sample], task)
        with torch.no_grad(), model.capture(alone) as single:
            model.forward(alone)
        torch.testing.assert_close(single.per_head[:, 0], both.per_head[:, row], atol=1e-5, rtol=1e-4)


WORDS = st.text(
    st.characters(min_codepoint=32, max_codepoint=0x2FFF, exclude_categories=("Cs", "Cn", "Cc", "Co", "Mn")),
    min_size=1,
    max_size=25,
).map(str.strip)


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(question=WORDS, answer=WORDS.filter(bool))
@pytest.mark.parametrize("family", ["qwen2.5-vl", "janus", "emu3", "chameleon"])
def test_any_words_are_found_again(adapter, pictures, family, question, answer):
    model = adapter(family)
    sample = Sample("x", "understanding", ((question, answer), (answer, answer)), (pictures[1],))
    if model.why_not(sample, "understanding"):
        return
    batch = model.collate([sample], "understanding")
    normal = unicodedata.normalize("NFC", answer).strip()
    found = [unicodedata.normalize("NFC", text) for text in decoded(model, batch, 0, batch.query_mask)]
    assert found == [normal, normal]


def test_janus_teacher_forcing_equals_its_own_generate(adapter, samples):
    """Hidden states of one pass over drawn codes equal those of the token-by-token loop that drew them."""
    model = adapter("janus")
    sample = samples["generation"][0]
    alone = model.collate([sample], "generation")
    prompt = alone.inputs["input_ids"][:, : int(alone.query_mask.nonzero()[0, 1])]
    steps = []
    hook = model.model.model.language_model.register_forward_hook(
        lambda m, a, out: steps.append(out.last_hidden_state[0, -1])
    )
    settings = model.model.generation_config
    settings.generation_kwargs = {"boi_token_id": model.tokenizer.convert_tokens_to_ids("<begin_of_image>")}
    settings.pad_token_id = model.tokenizer.pad_token_id
    settings.bos_token_id = model.tokenizer.bos_token_id
    torch.manual_seed(0)
    codes = model.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        generation_mode="image",
        do_sample=True,
        guidance_scale=2.0,
        max_length=prompt.shape[1] + 16,
    )
    hook.remove()

    batch = model.collate(samples["generation"], "generation")
    embeddings = model.generation_embeddings(batch, codes.repeat(2, 1))
    with torch.no_grad():
        forced = model.model.model.language_model(
            inputs_embeds=embeddings, attention_mask=batch.attention_mask
        ).last_hidden_state
    image = forced[0][batch.query_mask[0]]
    # Step 0 reads the prompt; step i reads code i - 1, whose own position is i - 1 of the image span.
    torch.testing.assert_close(torch.stack(steps[1:]), image[:-1], atol=2e-5, rtol=1e-4)
    assert image[:-1].std(0).mean() > 0.02  # codes differ by far more than the tolerance


def test_emu3_codes_stand_where_the_placeholders_were(adapter, samples):
    model = adapter("emu3")
    batch = model.collate(samples["generation"], "generation")
    ids = model.token_ids(batch)
    vocabulary = model.model.config.vocabulary_map
    codes = {v for k, v in vocabulary.items() if k.startswith("<|visual token")}
    for row, (height, width) in enumerate((batch.inputs["image_sizes"] // 8).tolist()):
        image = ids[row][batch.query_mask[row]].view(height, width + 1)
        assert set(image[:, :-1].flatten().tolist()) <= codes
        assert set(image[:, -1].tolist()) == {vocabulary["<|extra_200|>"]}
        assert torch.equal(
            ids[row][~batch.query_mask[row]], batch.inputs["input_ids"][row][~batch.query_mask[row]]
        )
