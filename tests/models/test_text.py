"""Character ranges and token masks, against slow and obvious versions of themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from minimal_aia.models import AdapterError
from minimal_aia.models.text import fill, messages, shift_spans, special_inside, token_mask

TEXT = st.text(st.characters(exclude_characters="\ue000\ue001", exclude_categories=("Cs",)), max_size=12)


@given(st.lists(TEXT, min_size=1, max_size=5), st.lists(TEXT, min_size=6, max_size=6))
def test_fill_returns_where_each_text_is(texts, between):
    def render(parts):
        return between[0] + "".join(part + glue for part, glue in zip(parts, between[1:]))

    result, spans = fill(render, texts)
    assert result == render(texts)
    assert [result[begin:end] for begin, end in spans] == texts


@pytest.mark.parametrize(
    "render",
    [lambda t: t[0], lambda t: t[1] + t[0], lambda t: t[0] + t[1] + t[0], lambda t: "".join(t)[1:]],
    ids=["dropped", "swapped", "twice", "cut"],
)
def test_fill_refuses_a_template_that_mangles_texts(render):
    with pytest.raises(AdapterError, match="does not keep every text once and in order"):
        fill(render, ["one", "two"])


@given(
    st.text("ab", max_size=5),
    st.lists(
        st.tuples(st.text("cd", min_size=1, max_size=6), st.text("<>#", max_size=9)), min_size=1, max_size=4
    ),
)
def test_shift_spans_follows_words_through_a_processor_that_expands_pictures(front, pieces):
    """Words between pictures: each piece is a word, then a placeholder "@" that becomes some expansion."""
    text, expanded, spans, replacements = "", front, [], []
    for word, expansion in pieces:
        spans.append((len(text), len(text) + len(word)))
        text, expanded = text + word, expanded + word
        at = (len(text) + len(front), len(text) + len(front) + 1)
        replacements.append({"span": at, "new_span": (len(expanded), len(expanded) + len(expansion))})
        text, expanded = text + "@", expanded + expansion
    moved = shift_spans(spans, text, "@", replacements)
    assert [expanded[begin:end] for begin, end in moved] == [word for word, _ in pieces]


def test_shift_spans_refuses_a_processor_that_leaves_pictures_out():
    with pytest.raises(AdapterError, match="2 image placeholders, but 0 were replaced"):
        shift_spans([(0, 1)], "a@b@", "@", [])


RANGE = st.tuples(st.integers(0, 12), st.integers(0, 12)).map(sorted)


@example(tokens=[[4, 6]], ranges=[[5, 5]])  # an empty answer inside a token
@given(tokens=st.lists(RANGE, min_size=1, max_size=8), ranges=st.lists(RANGE, max_size=3))
def test_token_mask_is_sharing_a_character(tokens, ranges):
    got = token_mask(torch.tensor([tokens]), [[tuple(r) for r in ranges]])[0].tolist()
    wanted = {position for begin, end in ranges for position in range(begin, end)}
    assert got == [bool(wanted & set(range(begin, end))) for begin, end in tokens]


def test_messages_put_pictures_before_the_first_question_only():
    made = messages(["q1", "q2"], ["a1", "a2"], n_images=2)
    assert [m["role"] for m in made] == ["user", "assistant"] * 2
    assert [len(m["content"]) for m in made] == [3, 1, 1, 1]


def test_special_inside_names_the_token():
    class Tokenizer:
        all_special_tokens = ("<s>",)

    assert special_inside("a <s> b", Tokenizer()) == "its text spells out the special token '<s>'"
    assert "'<img>'" in special_inside("a <img>", Tokenizer(), ("<img>",))
    assert special_inside("plain", Tokenizer()) is None
