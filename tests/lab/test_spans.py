"""The four definitions of a span, read off the tokens by eye."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minimal_aia.lab.sequences import FIRST_CODE, generation_tokens, pad, understanding_tokens
from minimal_aia.lab.spans import DEFINITIONS, spans

CODES = [1, 2, 3, 4]
PICTURES = np.zeros((2, 24, 24, 3), dtype=np.uint8)
# generation     <bos> a red circle <boi> 4 codes <eoi>, and a shorter prompt that is padded
# understanding  <bos> <boi> 4 codes <eoi> q q a a <eos> q a <eos>, and one turn that is padded
ROWS = {
    "generation": [generation_tokens("a red circle", CODES), generation_tokens("two", CODES)],
    "understanding": [
        understanding_tokens([("what color", "red red"), ("how", "two")], CODES),
        understanding_tokens([("what", "red")], CODES),
    ],
}
MARKS = {
    ("generation", "paper"): ["-kkk-qqqq-", "-k-qqqq-  "],
    ("generation", "predicting"): ["-kkkqqqq--", "-kqqqq--  "],
    ("generation", "code"): ["kkkk-qqq--", "kk-qqq--  "],
    ("generation", "code-plots"): ["kkkkkqqq--", "kkkqqq--  "],
    ("understanding", "paper"): ["--kkkk---qq--q-", "--kkkk--q-     "],
    ("understanding", "predicting"): ["--kkkk--qq--q--", "--kkkk-q--     "],
    ("understanding", "code"): ["-kkkk----qq--qq", "-kkkk---qq     "],
    ("understanding", "code-plots"): ["-kkkkk---qq--q-", "-kkkkk--q-     "],
}


@pytest.mark.parametrize(("task", "definition"), MARKS)
def test_marks(task, definition):
    batch = pad(ROWS[task], PICTURES)
    before = batch.query_mask.clone(), batch.key_mask.clone()
    query, key = spans(batch, task, definition)
    found = [
        "".join("q" if q else "k" if k else "-" if real else " " for q, k, real in zip(*row))
        for row in zip(query.tolist(), key.tolist(), batch.attention_mask.tolist())
    ]
    assert found == MARKS[task, definition]
    assert not (query & key).any()
    assert torch.equal(batch.query_mask, before[0])  # the batch stays as it was
    assert torch.equal(batch.key_mask, before[1])
    assert (batch.ids[batch.query_mask] >= FIRST_CODE).all() == (task == "generation")


def test_the_table_above_is_complete():
    assert set(MARKS) == {(task, d) for task in ROWS for d in DEFINITIONS}


@pytest.mark.parametrize(
    ("task", "definition", "said"), [("drawing", "paper", "'drawing'"), ("generation", "theirs", "'theirs'")]
)
def test_unknown_names_are_an_error(task, definition, said):
    with pytest.raises(ValueError, match=said):
        spans(pad(ROWS["generation"], PICTURES), task, definition)
