"""Four ways to say which tokens ask and which are asked: what "intensity" means changes with them.

paper        queries: image or answer tokens, at their own positions; keys: prompt words or picture (Eq. 1)
predicting   the same keys; queries are the positions that *predict* those tokens, one to the left
code         the training loss of the released code (its models/modeling_vlm.py, trainer/trainer_t2i.py and
             dataset/t2i_dataset.py): generation keys are the whole templated prompt from <bos> on, without
             the begin-of-image marker, and the last image query is dropped; understanding keys start at the
             begin-of-image marker and miss the last image token, and the last turn's <eos> is a query too
code-plots   its plotting scripts (gen_plot.py, und_plot.py): keys from <bos> or the begin-of-image marker to
             the last token before the other modality, so the marker counts as text, and as picture; the last
             image query is dropped here too

The lab's template is a lone <bos>; Janus-Pro's also has role names, which "code" and "code-plots" count too.
"""

from __future__ import annotations

from torch import Tensor

from minimal_aia.lab.sequences import Sequences
from minimal_aia.record import shift_left

DEFINITIONS = ("paper", "predicting", "code", "code-plots")


def spans(batch: Sequences, task: str, definition: str = "paper") -> tuple[Tensor, Tensor]:
    """(query_mask, key_mask), bool `[B, S]`, of a lab batch under one of `DEFINITIONS`.

    Raises:
        ValueError: an unknown task or definition.
    """
    if task not in ("generation", "understanding"):
        raise ValueError(f'unknown task {task!r}: "generation" or "understanding"')
    if definition not in DEFINITIONS:
        raise ValueError(f"unknown definition {definition!r}: one of {', '.join(DEFINITIONS)}")
    query, key = batch.query_mask, batch.key_mask
    if definition == "paper":
        return query, key
    if definition == "predicting":
        return shift_left(query), key
    marker = shift_left(key) & ~key  # the token before the keys: <bos> (generation) or <boi> (understanding)
    if task == "generation":
        query = query & ~_last(query)
        key = key | marker
        if definition == "code-plots":
            key = key | (shift_left(batch.query_mask) & ~batch.query_mask)  # <boi>, which ends the prompt
        return query, key
    if definition == "code-plots":
        return query, key | marker
    return query | _last(batch.label_mask), (key | marker) & ~_last(key)


def _last(mask: Tensor) -> Tensor:
    """The last marked token of every row, alone."""
    return mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
