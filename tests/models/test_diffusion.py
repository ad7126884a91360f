"""FLUX and Qwen-Image: joint attention, averaged over denoising steps, against explicit softmax."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from minimal_aia.data import Sample
from minimal_aia.models import AdapterError, load_adapter, loading
from minimal_aia.models.records import StepRecord, capture_sdpa
from minimal_aia.profiles import profile

pytest.importorskip("diffusers", reason="the optional extra `diffusers` is not installed")
from pipelines import PIPELINES

SAMPLES = [
    Sample("g:1", "generation", (("user: a red circle, assistant", ""),), ()),
    Sample("g:2", "generation", (("the sign says hello world and two blue squares", ""),), ()),
]
STEPS = 3


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    loaded = {}

    def load(family: str):
        if family not in loaded:
            folder = PIPELINES[family](tmp_path_factory.mktemp(family) / "tiny")
            call = {"max_sequence_length": 24} if family == "flux" else {}
            loaded[family] = load_adapter(folder, device="cpu", steps=STEPS, height=16, width=8, call=call)
        return loaded[family]

    return load


def measured(adapter, samples) -> torch.Tensor:
    batch = adapter.collate(samples, "generation")
    with adapter.capture(batch) as record:
        adapter.forward(batch)
    return record.per_head


@pytest.mark.parametrize("family", list(PIPELINES))
def test_keys_are_exactly_the_prompt_and_queries_the_image(pipeline, family):
    adapter = pipeline(family)
    batch = adapter.collate(SAMPLES, "generation")
    ids = batch.inputs["input_ids"]
    text = ids.shape[1]
    for row, sample in enumerate(SAMPLES):
        assert adapter.prompt_tokenizer.decode(ids[row][batch.key_mask[row, :text]]) == sample.turns[0][0]
        assert not batch.query_mask[row, :text].any()
        assert batch.query_mask[row, text:].all()
        assert not batch.key_mask[row, text:].any()
    tokens_a_picture = {"flux": 32, "qwen-image": 8}[family]  # their tiny VAEs halve the side 0 and 1 times
    assert batch.query_mask.sum(1).tolist() == [tokens_a_picture] * 2
    assert not (batch.key_mask & (batch.attention_mask == 0)).any()


@pytest.mark.parametrize("family", list(PIPELINES))
def test_intensity_equals_explicit_softmax_over_all_steps(pipeline, family, monkeypatch):
    adapter = pipeline(family)
    batch = adapter.collate(SAMPLES, "generation")
    got = measured(adapter, SAMPLES)

    stock, length, seen = F.scaled_dot_product_attention, batch.attention_mask.shape[1], []

    def explicit(query, key, value, attn_mask=None, **kwargs):
        if (
            query.shape[2] == length
        ):  # calls of the text encoders and of the negative prompt have other lengths
            scores = query @ key.transpose(2, 3) * (kwargs.get("scale") or query.shape[-1] ** -0.5)
            if attn_mask is not None:
                scores = (
                    scores.masked_fill(~attn_mask, -torch.inf)
                    if attn_mask.dtype == torch.bool
                    else scores + attn_mask
                )
            seen.append(scores.softmax(-1))
            return seen[-1] @ value
        return stock(query, key, value, attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", explicit)
    adapter.forward(batch)
    n_layers = len(adapter.layers())
    assert len(seen) == n_layers * STEPS
    weights = torch.stack(seen).unflatten(0, (STEPS, n_layers))  # [T, L, B, H, S, S]
    mass = (weights * batch.key_mask[None, None, :, None, None, :]).sum(-1)
    query = batch.query_mask[None, None, :, None, :]
    want = ((mass * query).sum(-1) / query.sum(-1)).mean(0)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert want.std() > 0.01


@pytest.mark.parametrize("family", list(PIPELINES))
def test_capture_does_not_change_the_picture(pipeline, family):
    adapter = pipeline(family)
    batch = adapter.collate(SAMPLES, "generation")
    stock = F.scaled_dot_product_attention
    plain = adapter.forward(batch)
    with adapter.capture(batch):
        watched = adapter.forward(batch)
    torch.testing.assert_close(plain, watched, atol=1e-5, rtol=1e-4)
    assert F.scaled_dot_product_attention is stock


@pytest.mark.parametrize("family", list(PIPELINES))
def test_neighbours_in_the_batch_change_nothing(pipeline, family):
    adapter = pipeline(family)
    both = measured(adapter, SAMPLES)
    for row, sample in enumerate(SAMPLES):
        torch.testing.assert_close(measured(adapter, [sample])[:, 0], both[:, row], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("family", list(PIPELINES))
def test_profile_takes_a_pipeline(pipeline, family):
    table = profile(pipeline(family), SAMPLES, "generation", batch_size=2, progress=False).table
    n_layers = len(pipeline(family).layers())
    assert len(table) == n_layers * 2 * 2
    assert table["value"].between(0, 1).all()
    batch = pipeline(family).collate(SAMPLES, "generation")
    flat = (batch.key_mask.sum(1) / batch.attention_mask.sum(1)).tolist()
    uniform = table.groupby("sample")["uniform"].first()
    assert uniform.loc[["g:1", "g:2"]].tolist() == pytest.approx(flat)


def test_diffusion_does_not_understand(pipeline):
    with pytest.raises(AdapterError, match="does not do understanding"):
        pipeline("flux").collate(SAMPLES, "understanding")


def test_diffusers_missing_is_one_clear_error(pipeline, tmp_path, monkeypatch):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    real = loading.importlib.util.find_spec
    monkeypatch.setattr(
        loading.importlib.util, "find_spec", lambda name: None if name == "diffusers" else real(name)
    )
    with pytest.raises(AdapterError, match=r"pip install diffusers"):
        load_adapter(tmp_path)


def test_layers_that_never_report_are_named():
    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
    mask = torch.ones(1, 3, dtype=torch.bool)
    record = StepRecord(2, mask, mask)
    with (
        pytest.raises(RuntimeError, match=r"layers \[0, 1\] reported no intensity"),
        capture_sdpa(layers, record, lambda q, k: (torch.zeros(1, dtype=torch.long), mask, mask)),
    ):
        layers[0](torch.zeros(1, 2))


class OneHead(nn.Module):
    def forward(self, x):
        if x.isnan().any():
            raise FloatingPointError
        return F.scaled_dot_product_attention(x, x, x)


def test_a_layout_that_does_not_fit_is_refused_and_everything_is_put_back():
    stock, layer, mask = F.scaled_dot_product_attention, OneHead(), torch.ones(1, 3, dtype=torch.bool)
    with (
        pytest.raises(ValueError, match="lays its sequence out differently"),
        capture_sdpa(
            [layer], StepRecord(1, mask, mask), lambda q, k: (torch.zeros(1, dtype=torch.long), mask, mask)
        ),
    ):
        layer(torch.zeros(1, 1, 4, 8))
    record = StepRecord(1, mask, mask)
    with capture_sdpa([layer], record, lambda q, k: (torch.zeros(1, dtype=torch.long), mask, mask)):
        with pytest.raises(FloatingPointError):
            layer(torch.full((1, 1, 3, 8), torch.nan))
        F.scaled_dot_product_attention(*[torch.zeros(1, 1, 5, 8)] * 3)  # outside of every layer: not recorded
        layer(torch.randn(1, 1, 3, 8))
    assert F.scaled_dot_product_attention is stock
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    torch.testing.assert_close(record.per_head, torch.ones(1, 1, 1))
