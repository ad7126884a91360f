"""Training: interrupted equals uninterrupted, Muon against its one-matrix formula, schedules."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minimal_aia.lab import finetune, images, models, train
from minimal_aia.lab.muon import Muon, orthogonalize
from minimal_aia.lab.references import lab_targets
from minimal_aia.targets import StageTargets
from minimal_aia.train.config import TrainConfig

CODEBOOK = np.random.default_rng(0).random((images.N_CODES, 48)).astype(np.float32)
SHORT = train.Settings(steps=6, batch=2, warmup=2, save_every=2)


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("name", ["unified", "janus"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(name, tmp_path, monkeypatch):
    whole = train.train(name, 3, tmp_path / "whole", CODEBOOK, SHORT, progress=False)
    draw = train.draw_batch
    calls = []

    def stop_at_step_five(*args, **kwargs):
        calls.append(1)
        if len(calls) > 2 * 4:  # two tasks a step
            raise Interrupt
        return draw(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train, "draw_batch", stop_at_step_five)
        with pytest.raises(Interrupt):
            train.train(name, 3, tmp_path / "cut", CODEBOOK, SHORT, progress=False)
    assert (tmp_path / "cut" / "state.pt").exists()
    resumed = train.train(name, 3, tmp_path / "cut", CODEBOOK, SHORT, progress=False)
    for (key, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    logs = [json.loads((tmp_path / part / "training.json").read_text())["log"] for part in ("whole", "cut")]
    assert logs[0] == logs[1]
    assert not (tmp_path / "cut" / "state.pt").exists()


def test_a_state_of_other_settings_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "save", lambda *a: (_ for _ in ()).throw(Interrupt))
    with pytest.raises(Interrupt):
        train.train("generation", 0, tmp_path, CODEBOOK, SHORT, progress=False)
    longer = train.Settings(steps=8, batch=2, warmup=2, save_every=2)
    with pytest.raises(ValueError, match="other settings"):
        train.train("generation", 0, tmp_path, CODEBOOK, longer, progress=False)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    bad = lambda model, batch, task: next(model.parameters()).sum() * float("nan")  # noqa: E731
    monkeypatch.setattr(models, "next_token_loss", bad)
    with pytest.raises(FloatingPointError, match=r"understanding seed 0: loss .* at step 0"):
        train.train("understanding", 0, tmp_path, CODEBOOK, SHORT, progress=False)


def test_training_learns_and_the_pretrained_parts_stay_frozen(tmp_path):
    settings = train.Settings(steps=12, batch=4, warmup=2)
    before = models.build("janus", 0).state_dict()
    after = train.train("janus", 0, tmp_path, CODEBOOK, settings, progress=False).state_dict()
    same = {key for key, value in before.items() if torch.equal(value, after[key])}
    frozen = {key for key in before if any(f".{part}." in key for part in models.FROZEN)}
    assert len(frozen) > 50
    assert same == frozen
    log = json.loads((tmp_path / "training.json").read_text())["log"]
    assert log[-1]["generation"] < log[0]["generation"]
    assert log[-1]["understanding"] < log[0]["understanding"]


def test_aia_from_the_first_step_pulls_curves_to_the_targets_named(tmp_path):
    """Each of two runs ends nearer to its own targets than the other does."""
    away = {}
    for aimed in ("lab", "lab-constant"):
        settings = train.Settings(steps=30, batch=4, warmup=2, aia_weight=100.0, targets=aimed)
        model = train.train("unified", 0, tmp_path / aimed, CODEBOOK, settings, progress=False)
        for measured in ("lab", "lab-constant"):
            found = finetune.distance(model, CODEBOOK, lab_targets(measured), count=16)
            away[aimed, measured] = sum(found.values())
    assert away["lab", "lab"] < away["lab-constant", "lab"]
    assert away["lab-constant", "lab-constant"] < away["lab", "lab-constant"]


def test_models_of_one_seed_see_the_same_data():
    a, b = (train.data_rng(4, "generation", 7).integers(0, 10**9, 5) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    for other in ((5, "generation", 7), (4, "understanding", 7), (4, "generation", 8)):
        assert not np.array_equal(a, train.data_rng(*other).integers(0, 10**9, 5))


@given(st.integers(1, 500), st.integers(0, 60))
def test_the_rate_rises_then_falls_to_zero(steps, warmup):
    settings = train.Settings(steps=steps + warmup, warmup=warmup)
    rates = np.array([train.rate(step, settings) for step in range(settings.steps + 1)])
    assert (rates > -1e-9).all()
    assert rates.max() <= 1
    assert (np.diff(rates[:warmup]) > 0).all()
    assert (np.diff(rates[warmup:]) <= 0).all()
    assert rates[-1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("shape", [(8, 8), (16, 8), (8, 16)])
def test_orthogonalize_flattens_singular_values_and_keeps_the_axes(shape):
    matrix = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    ortho = orthogonalize(matrix)
    values = torch.linalg.svdvals(ortho)
    # Five steps leave small singular values behind; the large ones end near 1.
    assert values.max() < 1.3
    assert (torch.linalg.svdvals(ortho)[:, : min(shape) // 2] > 0.6).all()
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.mT @ ortho @ vt.mT
    off = inner - torch.diag_embed(torch.diagonal(inner, dim1=1, dim2=2))
    assert off.abs().max() < 1e-4


def test_muon_equals_the_update_written_out_for_one_matrix():
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(6, 4, generator=generator)) for _ in range(3)]
    mine = [p.detach().clone() for p in params]
    buffers = [torch.zeros(6, 4) for _ in params]
    optimizer = Muon(params, lr=0.1)
    for _ in range(3):
        for p, buffer, value in zip(params, buffers, mine):
            p.grad = torch.randn(6, 4, generator=generator)
            buffer.mul_(0.95).add_(0.05 * p.grad)
            update = 0.05 * p.grad + 0.95 * buffer
            value -= 0.1 * (6 / 4) ** 0.5 * orthogonalize(update[None])[0]
        optimizer.step()
    for p, value in zip(params, mine):
        torch.testing.assert_close(p.detach(), value, atol=1e-5, rtol=1e-4)


def test_command_line_names_an_unknown_model(capsys):
    with pytest.raises(SystemExit):
        train.main(["emu3"])
    assert "unknown model emu3" in capsys.readouterr().err


def test_models_for_a_gpu_train_and_fine_tune_with_the_same_commands(tmp_path, monkeypatch, capsys):
    command = ["unified", "--scale", "small", "--steps", "1", "--batch", "1", "--out", str(tmp_path)]
    train.main(command)
    folder = tmp_path / "unified-seed0"
    model, _ = models.load(folder)
    assert 20e6 < sum(p.numel() for p in model.parameters()) < 60e6
    monkeypatch.setattr(finetune, "PROBE_SIZE", 2)
    targets = StageTargets.constant(12, generation=0.4, understanding=0.2)
    monkeypatch.setattr(finetune, "lab_targets", lambda *spec: targets)
    config = TrainConfig(model=str(folder), max_steps=2, per_device_train_batch_size=2, warmup_steps=0)
    after, _, log = finetune.finetune(config, progress=False)
    assert log[1]["aia/generation"] > 0
    assert not torch.equal(after.lm_head.weight, model.lm_head.weight)
    with pytest.raises(SystemExit):
        train.main(["janus", *command[1:]])
    assert "janus comes in laptop scale only" in capsys.readouterr().err
