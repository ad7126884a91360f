"""HunyuanImage-3.0, DeepSeek-VL2 and BAGEL: the adapters against stand-ins with the authors' calls and
layouts."""

from __future__ import annotations

import json

import pytest
import standins
import torch
from torch.nn import functional as F

from minimal_aia.data import Sample
from minimal_aia.intensity import intensity_from_attention
from minimal_aia.models import AdapterError, load_adapter
from minimal_aia.models.bagel import BagelAdapter, varlen_attention
from minimal_aia.models.deepseek_vl2 import DeepseekVL2Adapter
from minimal_aia.models.hunyuan_image import HunyuanImageAdapter
from minimal_aia.models.loading import authors_code

STEPS = 3


def explicit_attention(seen: list[torch.Tensor]):
    """scaled_dot_product_attention with the softmax written out; the matrices are kept in `seen`."""

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, enable_gqa=False, **kwargs):
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        seen.append((scores if attn_mask is None else scores.masked_fill(~attn_mask, -torch.inf)).softmax(-1))
        return seen[-1] @ value

    return attend


def measured(adapter, batch) -> torch.Tensor:
    with adapter.capture(batch) as record:
        adapter.forward(batch)
    assert record.per_head.std() > 0.02  # far from flat
    return record.per_head


@pytest.mark.parametrize("remote", ["bagel", "hunyuan_image_3_moe", "deepseek_vl_v2"])
def test_remote_code_needs_consent(tmp_path, remote):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": remote}))
    with pytest.raises(AdapterError, match="pass trust_remote_code=True if you trust it"):
        load_adapter(tmp_path)


def test_missing_authors_code_names_the_repository(tmp_path):
    with (
        pytest.raises(AdapterError, match=r"check out github\.com/x/y, install what it asks for"),
        authors_code("model", tmp_path, "surely_not_installed_anywhere", "github.com/x/y"),
    ):
        pass
    with (
        pytest.raises(AdapterError, match=r"is no folder; give a checkout of github\.com/x/y"),
        authors_code("model", tmp_path / "none", "json", "github.com/x/y"),
    ):
        pass


@pytest.mark.parametrize("remote", ["bagel", "deepseek_vl_v2"])
def test_loading_without_the_authors_code_is_one_clear_error(tmp_path, remote):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": remote}))
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(AdapterError, match="needs its authors' code"):
        load_adapter(tmp_path, trust_remote_code=True, code=tmp_path, device="cpu")


# HunyuanImage-3.0


@pytest.fixture
def hunyuan():
    model = standins.sharp(standins.HunyuanImage3ForCausalMM(system="User: draw."))
    return HunyuanImageAdapter("tiny", model, steps=STEPS)


def test_hunyuan_spans(hunyuan, samples):
    batch = hunyuan.collate(samples["generation"], "generation")
    tokenizer = hunyuan.model._tkwrapper.tokenizer
    for row, sample in enumerate(samples["generation"]):
        ids = batch.inputs["input_ids"][row]
        assert tokenizer.decode(ids[batch.key_mask[row]]) == sample.turns[0][0]
        assert set(tokenizer.convert_ids_to_tokens(ids[batch.query_mask[row]])) == {"<img>"}
        assert int(batch.query_mask[row].sum()) == 6
    assert batch.attention_mask.sum(1).tolist() == [
        hunyuan.length(s, "generation") for s in samples["generation"]
    ]


def test_hunyuan_intensity_is_the_mean_over_steps_of_the_conditional_pass(hunyuan, samples, monkeypatch):
    batch = hunyuan.collate(samples["generation"], "generation")
    got = measured(hunyuan, batch)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", explicit_attention(seen))
    hunyuan.forward(batch)
    assert len(seen) == 2 * STEPS * 3
    for row in range(2):
        length = int(batch.attention_mask[row].sum())
        key = batch.key_mask[row, :length]
        steps = []
        for step in range(STEPS):
            layers = seen[(row * STEPS + step) * 3 :][:3]
            queries = batch.query_mask[row, :length].nonzero().flatten() if step == 0 else torch.arange(1, 7)
            steps.append(torch.stack([w[0][:, queries][..., key].sum(-1).mean(-1) for w in layers]))
        torch.testing.assert_close(got[:, row], torch.stack(steps).mean(0), atol=1e-6, rtol=1e-5)


def test_hunyuan_prompt_that_is_not_in_its_sequence_is_refused(hunyuan, samples, monkeypatch):
    prepare = hunyuan.model.prepare_model_inputs
    monkeypatch.setattr(
        hunyuan.model, "prepare_model_inputs", lambda prompt, **kw: prepare(["something else"], **kw)
    )
    with pytest.raises(AdapterError, match="holds the prompt 0 times"):
        hunyuan.collate(samples["generation"], "generation")


# DeepSeek-VL2


@pytest.fixture
def deepseek():
    return DeepseekVL2Adapter(
        "tiny", standins.sharp(standins.DeepseekVLV2ForCausalLM()), standins.DeepseekVLV2Processor()
    )


def test_deepseek_vl2_spans(deepseek, samples):
    from test_transformers import runs

    batch = deepseek.collate(samples["understanding"], "understanding")
    tokenizer = deepseek.processor.tokenizer
    for row, sample in enumerate(samples["understanding"]):
        ids = batch.inputs["input_ids"][row]
        texts = [tokenizer.decode(ids[run]).strip() for run in runs(batch.query_mask[row])]
        assert texts == [answer for _, answer in sample.turns]
        assert set(tokenizer.convert_ids_to_tokens(ids[batch.key_mask[row]])) == {"<image>"}
        assert len(runs(batch.key_mask[row])) == len(sample.images)
        assert not ((batch.query_mask[row] | batch.key_mask[row]) & (batch.attention_mask[row] == 0)).any()
    spelled = Sample("x", "understanding", (("q", "see <image>"),), samples["understanding"][0].images)
    assert "special token '<image>'" in deepseek.why_not(spelled, "understanding")


def test_deepseek_vl2_intensity_equals_its_own_attentions(deepseek, samples):
    batch = deepseek.collate(samples["understanding"], "understanding")
    got = measured(deepseek, batch)
    with torch.no_grad():
        weights = deepseek.model(**batch.inputs, output_attentions=True).attentions
    want = torch.stack(
        [intensity_from_attention(w, batch.query_mask, batch.key_mask, per_head=True) for w in weights]
    )
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    with deepseek.capture(batch):  # the matrices go no further than their layer
        assert deepseek.forward(batch).attentions == [None] * 3


# BAGEL


@pytest.fixture
def bagel(monkeypatch):
    monkeypatch.setattr(standins, "flash_attn_varlen_func", varlen_attention)
    return BagelAdapter("tiny", standins.InterleaveInferencer(), steps=STEPS, image_shape=(16, 24))


@pytest.mark.parametrize("causal", [True, False])
def test_varlen_attention_is_what_flash_attn_defines(causal):
    """Ragged samples, fewer queries than keys, grouped heads; causal means that the last query sees the
    last key."""
    torch.manual_seed(0)
    n_q, n_k = [3, 1, 5], [3, 4, 7]
    q = torch.randn(sum(n_q), 4, 8)
    k, v = torch.randn(2, sum(n_k), 2, 8)
    bounds = [torch.tensor([0, *n]).cumsum(0).int() for n in (n_q, n_k)]
    got = varlen_attention(q=q, k=k, v=v, cu_seqlens_q=bounds[0], cu_seqlens_k=bounds[1], causal=causal)
    for a, b, c, d in zip(bounds[0], bounds[0][1:], bounds[1], bounds[1][1:]):
        for i in range(int(b - a)):
            last = int(d) - (int(b - a) - 1 - i) if causal else int(d)
            for head in range(4):
                scores = k[c:last, head // 2] @ q[int(a) + i, head] / 8**0.5
                want = scores.softmax(0) @ v[c:last, head // 2]
                torch.testing.assert_close(got[int(a) + i, head], want, atol=1e-5, rtol=1e-4)


def test_bagel_spans(bagel, samples):
    from test_transformers import runs

    for task in bagel.tasks:
        batch = bagel.collate(samples[task], task)
        words, image = (
            (batch.query_mask, batch.key_mask)
            if task == "understanding"
            else (batch.key_mask, batch.query_mask)
        )
        for row, sample in enumerate(samples[task]):
            ids = batch.inputs["input_ids"][row]
            texts = [bagel.inferencer.tokenizer.decode(ids[run]) for run in runs(words[row])]
            want = [a for _, a in sample.turns] if task == "understanding" else [sample.turns[0][0]]
            assert texts == want
            for run in runs(image[row]):
                assert ids[run[0] - 1] == 3
                assert ids[run[-1] + 1] == 4
                assert len(run) == {"understanding": 24, "generation": 6}[task]
            assert len(runs(image[row])) == (len(sample.images) if task == "understanding" else 1)


def full_pass(bagel, pieces: list[tuple[torch.Tensor, bool]]) -> list[torch.Tensor]:
    """Attention [H, S, S] of every layer over the whole sequence at once. pieces: embeddings [T, D], is a
    text."""
    x = torch.cat([p for p, _ in pieces])
    allowed = torch.ones(len(x), len(x), dtype=torch.bool).tril()
    start = 0
    for piece, is_text in pieces:
        end = start + len(piece)
        if not is_text:
            allowed[start:end, start:end] = True
        start = end
    weights = []
    for layer in bagel.layers():
        attention, h = layer.self_attn, F.layer_norm(x, x.shape[-1:])
        q = attention.q_proj(h).view(len(x), 4, 8)
        k, v = (p(h).view(len(x), 2, 8).repeat_interleave(2, 1) for p in (attention.k_proj, attention.v_proj))
        scores = torch.einsum("qhd,khd->hqk", q, k) / 8**0.5
        weights.append(scores.masked_fill(~allowed, -torch.inf).softmax(-1))
        x = x + attention.o_proj(torch.einsum("hqk,khd->qhd", weights[-1], v).reshape(len(x), -1))
    return weights


def text_piece(bagel, text: str) -> tuple[torch.Tensor, bool]:
    return bagel.model.embed(torch.tensor(bagel.text_ids(text))), True


def reference(batch, row: int, weights: list[torch.Tensor]) -> torch.Tensor:
    n = weights[0].shape[-1]
    query, key = batch.query_mask[row : row + 1, :n], batch.key_mask[row : row + 1, :n]
    return torch.stack([intensity_from_attention(w[None], query, key, per_head=True)[0] for w in weights])


@torch.no_grad()
def test_bagel_reads_in_pieces_what_one_pass_would_read(bagel, samples):
    batch = bagel.collate(samples["understanding"], "understanding")
    got = measured(bagel, batch)
    for row, sample in enumerate(samples["understanding"]):
        pieces = [(bagel.inferencer.picture_embeddings(p), False) for p in batch.extra[row]["pictures"]]
        pieces += [text_piece(bagel, text) for turn in sample.turns for text in turn]
        want = reference(batch, row, full_pass(bagel, pieces))
        torch.testing.assert_close(got[:, row], want, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_bagel_draws_with_the_mean_over_steps(bagel, samples):
    # A prompt shorter than the picture: a guidance pass counted by mistake would have marked queries.
    short = Sample("g:0", "generation", (("a", ""),), ())
    for sample in [short, *samples["generation"]]:
        batch = bagel.collate([sample], "generation")
        got = measured(bagel, batch)
        prompt = text_piece(bagel, sample.turns[0][0])
        assert len(bagel.inferencer.read) == STEPS
        steps = [reference(batch, 0, full_pass(bagel, [prompt, (x, False)])) for x in bagel.inferencer.read]
        torch.testing.assert_close(got[:, 0], torch.stack(steps).mean(0), atol=1e-5, rtol=1e-4)
    both = measured(bagel, bagel.collate(samples["generation"], "generation"))
    torch.testing.assert_close(both[:, 1], got[:, 0], atol=1e-6, rtol=1e-5)  # its noise comes from its own id


def test_bagel_that_counts_other_tokens_is_refused(bagel, samples):
    batch = bagel.collate(samples["understanding"], "understanding")
    bagel.inferencer.vit_transform = lambda picture: torch.zeros(3, 8, 8)
    with pytest.raises(AdapterError, match="its code made"):
        bagel.forward(batch)
