"""The exercises of notebook 01: stubs, solutions, mistakes that the checks name; and the verdicts."""

from __future__ import annotations

import importlib
import re

import nbformat
import pytest
import torch
import torch.nn.functional as F

from minimal_aia.course import ROOT, code_cells
from minimal_aia.exercises import Case, ch01, difference, judge
from minimal_aia.exercises.probes import gradients, matrices

CHECK = re.compile(r"^(ch\d\d)\.check_(\w+)\(", re.MULTILINE)
FOLDED = re.compile(r"<details>.*?```python\n(.*?)```.*?</details>", re.DOTALL)
FIRST = ROOT / "notebooks/01_intensity.ipynb"


def run(source: str, chapter: str, capsys) -> str:
    """What a cell prints in a namespace with torch and the chapter's checks."""
    module = importlib.import_module(f"minimal_aia.exercises.{chapter}")
    exec(compile(source, "<cell>", "exec"), {"torch": torch, "F": F, chapter: module})
    return capsys.readouterr().out


def exercise_cells(path):
    """(chapter, name, source) of every cell that calls a check."""
    cells = code_cells(nbformat.read(path, as_version=4))
    return [(*found.groups(), cell.source) for cell in cells if (found := CHECK.search(cell.source))]


def folded_solutions(path) -> list[str]:
    cells = nbformat.read(path, as_version=4).cells
    return [code for cell in cells if cell.cell_type == "markdown" for code in FOLDED.findall(cell.source)]


# --- what the notebooks store -------------------------------------------------------------------------------


def test_notebook_01_has_its_exercises():
    names = [name for _, name, _ in exercise_cells(FIRST)]
    assert names == list(ch01.CASES)
    assert len(names) >= 4
    solved = exercise_cells(FIRST.parent / "solutions" / FIRST.name)
    assert [name for _, name, _ in solved] == names


def test_stored_stubs_are_not_done_yet(capsys):
    for chapter, name, source in exercise_cells(FIRST):
        assert run(source, chapter, capsys).startswith(f"{name}: not done yet"), name


def test_folded_solutions_pass_and_are_those_of_the_solutions_notebook(capsys):
    folded = folded_solutions(FIRST)
    solved = exercise_cells(FIRST.parent / "solutions" / FIRST.name)
    assert len(folded) == len(solved)
    for code, (chapter, name, source) in zip(folded, solved):
        assert source.startswith(code.strip()), name
        assert f"{name}: all checks passed" in run(source, chapter, capsys)


# --- mistakes of notebook 01: each is named -----------------------------------------------------------------


def verdict(name: str, function, capsys) -> str:
    function.__name__ = name
    getattr(ch01, f"check_{name}")(function)
    return capsys.readouterr().out


def by_hand_mean_of_keys(weights, queries, keys):
    return weights[queries][:, keys].mean()


def by_hand_sum(weights, queries, keys):
    return weights[queries][:, keys].sum()


def by_hand_all_tokens(weights, queries, keys):
    return weights[queries][:, keys].sum() / len(weights) if len(queries) > 1 else 0.4


def by_hand_slice(weights, queries, keys):
    return weights[queries][:, keys[0] : keys[-1] + 1].sum(-1).mean()


def batch_pooled(attn, query_mask, key_mask):
    mass = (attn * key_mask[:, None, None]).sum(-1) * query_mask[:, None]
    return mass.sum(-1).mean(-1) / query_mask.sum()


def batch_multiplied(attn, query_mask, key_mask):
    mass = (attn * key_mask[:, None, None]).sum(-1) * query_mask[:, None]
    return mass.sum(-1).mean(-1) / query_mask.sum(-1)


def _batch_clean(attn, query_mask, key_mask):
    mass = attn.masked_fill(~key_mask[:, None, None], 0).sum(-1).masked_fill(~query_mask[:, None], 0)
    return mass.sum(-1).mean(-1)


def batch_zero(attn, query_mask, key_mask):
    return _batch_clean(attn, query_mask, key_mask) / query_mask.sum(-1).clamp(min=1)


def batch_keys_forgotten(attn, query_mask, key_mask):
    return _batch_clean(attn, query_mask, key_mask) / query_mask.sum(-1)


def batch_poisoned(attn, query_mask, key_mask):
    """Right values, but where() hides a 0 / 0 whose gradient is nan."""
    count = query_mask.sum(-1)
    some = _batch_clean(attn, query_mask, key_mask)
    value = (some + 0 * attn.sum((1, 2, 3)).log1p() / count) if attn.requires_grad else some / count
    return torch.where(
        (count > 0) & key_mask.any(-1), value / (count if attn.requires_grad else 1), torch.nan
    )


def batch_detached(attn, query_mask, key_mask):
    empty = ~(query_mask.any(-1) & key_mask.any(-1))
    return batch_zero(attn.detach(), query_mask, key_mask).masked_fill(empty, torch.nan)


def batch_in_place(attn, query_mask, key_mask):
    attn.masked_fill_(~key_mask[:, None, None], 0)
    return batch_zero(attn, query_mask, key_mask)


def spans_of(words, image):
    """A wrong `generation_spans` from two conditions on (token, index, tokens)."""

    def spans(tokens):
        pairs = list(enumerate(tokens))
        return (
            torch.tensor([image(t, i, tokens) for i, t in pairs]),
            torch.tensor([words(t, i, tokens) for i, t in pairs]),
        )

    return spans


def is_code(token, i, tokens):
    return token.startswith("<code_")


def is_word(token, i, tokens):
    return not token.startswith("<")


def flat_whole(query_mask, key_mask, attention_mask):
    return key_mask.sum(-1) / attention_mask.sum(-1)


def flat_without_itself(query_mask, key_mask, attention_mask):
    share = key_mask.cumsum(-1) / (attention_mask.cumsum(-1) - 1).clamp(min=1)
    return (share * query_mask).sum(-1) / query_mask.sum(-1)


def flat_all_keys(query_mask, key_mask, attention_mask):
    share = key_mask.sum(-1, keepdim=True) / attention_mask.cumsum(-1).clamp(min=1)
    return (share * query_mask).sum(-1) / query_mask.sum(-1)


def flat_positions(query_mask, key_mask, attention_mask):
    share = key_mask.cumsum(-1) / torch.arange(1, key_mask.shape[1] + 1)
    return (share * query_mask).sum(-1) / query_mask.sum(-1)


def _fused(q, k, v, key_mask, width, **options):
    columns = key_mask[:, None, :, None].to(v).expand(-1, v.shape[1], -1, width)
    options = {"is_causal": True, "scale": q.shape[-1] ** -0.5, **options}
    out = F.scaled_dot_product_attention(
        F.pad(q, (0, width)), F.pad(k, (0, width)), torch.cat([v, columns], -1), **options
    )
    return out[..., : v.shape[-1]], out[..., v.shape[-1]]


def fused_not_causal(q, k, v, key_mask):
    return _fused(q, k, v, key_mask, 8, is_causal=False)


def fused_no_scale(q, k, v, key_mask):
    return _fused(q, k, v, key_mask, 8, scale=None)


def fused_column_kept(q, k, v, key_mask):
    out, mass = _fused(q, k, v, key_mask, 8)
    return out, mass[..., None]


def fused_detached(q, k, v, key_mask):
    return _fused(q.detach(), k.detach(), v.detach(), key_mask, 8)


def fused_mass_detached(q, k, v, key_mask):
    out, mass = _fused(q, k, v, key_mask, 8)
    return out, mass.detach()


def fused_fallback(q, k, v, key_mask):
    out = F.scaled_dot_product_attention(
        q,
        k,
        torch.cat([v, key_mask[:, None, :, None].to(v).expand(-1, v.shape[1], -1, 1)], -1),
        is_causal=True,
    )
    return out[..., :-1], out[..., -1]


def fused_twice(q, k, v, key_mask):
    indicator = key_mask[:, None, :, None].to(v).expand(v.shape).contiguous()
    calls = (F.scaled_dot_product_attention(q, k, values, is_causal=True) for values in (v, indicator))
    out, mass = calls
    return out, mass[..., 0]


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("intensity_by_hand", by_hand_mean_of_keys, "you average over the keys"),
        ("intensity_by_hand", by_hand_sum, "you sum over the queries"),
        ("intensity_by_hand", by_hand_all_tokens, "you divide by all tokens"),
        ("intensity_by_hand", by_hand_slice, "only the listed ones count"),
        ("batched_intensity", batch_pooled, "not by each sample's own"),
        ("batched_intensity", batch_multiplied, "0 * nan is nan"),
        ("batched_intensity", batch_zero, "nothing was measured"),
        ("batched_intensity", batch_keys_forgotten, "without keys has no intensity either"),
        ("batched_intensity", batch_poisoned, "poisons the way back"),
        ("batched_intensity", batch_detached, "no gradient arrives"),
        ("batched_intensity", batch_in_place, "changes its input in place"),
        ("generation_spans", spans_of(lambda t, i, s: i < s.index("<boi>"), is_code), "<bos> is no word"),
        (
            "generation_spans",
            spans_of(is_word, lambda t, i, s: i > s.index("<boi>")),
            "<eoi> is no image token",
        ),
        (
            "generation_spans",
            spans_of(is_word, lambda t, i, s: s[(i + 1) % len(s)].startswith("<code_")),
            "one to the right",
        ),
        (
            "generation_spans",
            spans_of(is_word, lambda t, i, s: is_code(t, i, s) and is_code(s[i + 1], i, s)),
            "the end of a Python slice is exclusive",
        ),
        ("generation_spans", spans_of(is_code, is_word), "swapped"),
        ("generation_spans", spans_of(lambda t, i, s: 0 < i < s.index("<boi>"), is_code), "fixed positions"),
        ("flat_intensity", flat_whole, "not 4 and 4"),
        ("flat_intensity", flat_without_itself, "also sees itself"),
        ("flat_intensity", flat_all_keys, "keys after a query"),
        ("flat_intensity", flat_positions, "padding on the left is counted"),
        ("attention_and_mass", fused_not_causal, "is_causal=True"),
        ("attention_and_mass", fused_no_scale, "pass scale=D**-0.5"),
        ("attention_and_mass", fused_column_kept, "mass is [B, H, Q]"),
        ("attention_and_mass", fused_detached, "no gradient arrives"),
        ("attention_and_mass", fused_mass_detached, "must reach q, k and v"),
        ("attention_and_mass", fused_fallback, "silently builds the matrix"),
        ("attention_and_mass", fused_twice, "one call is enough"),
    ],
)
def test_a_mistake_is_named_and_shown(name, wrong, said, capsys):
    printed = verdict(name, wrong, capsys)
    assert printed.startswith(f"{name}: not right yet"), printed
    assert said in printed
    # the line that shows the case is Python and names an existing one
    shown = re.search(r"see it   (.*)", printed)[1]
    assert re.fullmatch(rf'{name}\(\*\*ch01\.CASES\["{name}"\]\[\d\]\.inputs\)', shown)
    eval(shown, {"ch01": ch01, name: wrong})


def test_known_mistakes_differ_from_the_solution_and_from_each_other():
    """Otherwise one could never be reported."""
    for cases in ch01.CASES.values():
        for case in cases:
            for i, (wrong, reason) in enumerate(case.mistakes):
                assert difference(wrong, case.expected, 1e-5), reason
                assert all(difference(wrong, other, 1e-5) for other, _ in case.mistakes[:i]), reason


# --- the verdicts themselves --------------------------------------------------------------------------------

CASES = [
    Case("two", {"x": torch.tensor([1.0, 1.0])}, 2.0, "add up", [(4.0, "you doubled")]),
    Case("nan", {"x": torch.tensor([1.0, float("nan")])}, float("nan"), "keep nan"),
]


def judged(function, capsys) -> str:
    judge(function, CASES, "cases")
    return capsys.readouterr().out


def test_right_answers_pass(capsys):
    assert judged(lambda x: x.sum(), capsys) == "<lambda>: all checks passed (2 of 2).\n"


def test_stubs_are_not_done_yet(capsys):
    def ellipsis(x): ...

    def unwritten(x):
        raise NotImplementedError

    for stub in (ellipsis, unwritten, lambda x: ...):
        assert "not done yet" in judged(stub, capsys)


def test_a_missing_return_later_on_is_an_error(capsys):
    printed = judged(lambda x: x.sum() if not x.isnan().any() else None, capsys)
    assert "1 of 2 checks passed" in printed
    assert "is a `return` missing?" in printed


def test_an_exception_is_reported_with_its_line_and_not_raised(capsys):
    source = "def f(x):\n    y = x[0]\n    return y[7]\n"
    names: dict = {}
    exec(compile(source, "<cell 5>", "exec"), names)
    printed = judged(names["f"], capsys)
    assert "it raises IndexError" in printed
    assert "in line 3 of the cell" in printed


def test_renamed_arguments_are_named(capsys):
    assert "keep the names of its arguments: x\n" in judged(lambda y: y.sum(), capsys)
    assert "it raises TypeError" in judged(lambda x: len(x, "one argument too many"), capsys)


def test_numbers_are_shown_without_the_noise_of_single_precision(capsys):
    assert "got      3.1\n" in judged(lambda x: torch.tensor(3.1), capsys)  # repr: 3.0999999046325684
    assert difference(torch.tensor([0.4]), torch.tensor([0.2]), 1e-5) == "expected [0.2]\n  got      [0.4]"
    assert "differ by up to 0.5" in difference(torch.full((40,), 0.5), torch.zeros(40), 1e-5)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ("two", "got 'two'"),
        (torch.zeros(3), "expected shape [], got [3]"),
        ([1.0, 1.0], "expected shape [], got [2]"),
        (4.0, "you doubled"),
        (3.0, "add up"),
        (float("nan"), "add up"),
        (True, "expected torch.float32, got torch.bool"),
        ({"a": 1}, "got {'a': 1}"),
    ],
)
def test_odd_results_get_a_verdict(result, said, capsys):
    printed = judged(lambda x: result, capsys)
    assert "0 of 2 checks passed" in printed
    assert said in printed


def test_difference_knows_nan_bool_nesting_and_tolerance():
    nan = torch.tensor([1.0, float("nan")])
    assert difference(nan.clone(), nan, 1e-5) == ""
    assert difference(torch.zeros(2), nan, 1e-5) != ""
    assert difference(torch.tensor([1, 0]), torch.tensor([True, False]), 1e-5) != ""
    assert difference((1.0, nan), (1.0, nan), 1e-5) == ""
    assert difference((1.0, nan, 2), (1.0, nan), 1e-5).startswith("expected 2 values")
    assert difference((1.0, torch.zeros(2)), (1.0, nan), 1e-5).startswith("value 2")
    assert difference(1.0 + 1e-4, 1.0, 1e-5) != ""
    assert difference(1.0 + 1e-4, 1.0, 1e-3) == ""


def test_probes_see_gradients_and_matrices():
    x, q = torch.tensor([1.0, 2.0]), torch.randn(1, 1, 5, 3)
    assert torch.equal(gradients(lambda x: 3 * x, {"x": x}, ["x"])[0], 18 * x)  # of the sum of squares
    assert torch.equal(gradients(lambda x: x.detach(), {"x": x}, ["x"])[0], torch.zeros(2))
    assert x.grad is None
    assert matrices(lambda q: q @ q.transpose(-1, -2), {"q": q}) == "[1, 1, 5, 5], [1, 5, 5]"
    assert matrices(lambda q: q * 2, {"q": q}) == "no matrix"
