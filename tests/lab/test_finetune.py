"""The bare loop: λ = 0 is plain fine-tuning to the last bit, and with AIA the curves move to the targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minimal_aia.lab import finetune, models, references
from minimal_aia.loss import AIALoss
from minimal_aia.models.lab import load_lab
from minimal_aia.targets import TASKS
from minimal_aia.train.config import TrainConfig, task_counts, weight_at
from minimal_aia.train.sft import LabBatches

SMALL = {"model": "lab/unified", "per_device_train_batch_size": 4}


def plain_sft(config: TrainConfig) -> dict[str, torch.Tensor]:
    """Fine-tuning as one would write it who never heard of AIA."""
    adapter = load_lab(config.model)
    model = adapter.model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.05
    )
    warm, steps = config.warmup_steps, config.max_steps

    def rate(step):
        if step < warm:
            return step / warm
        return 0.5 * (1 + np.cos(np.pi * (step - warm) / (steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in range(steps):
        batches = finetune.step_batches(config, step, adapter.codebook)
        loss = sum(0.5 * models.next_token_loss(model, batch, task) for task, batch in batches.items())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.state_dict()


def test_without_aia_it_is_plain_fine_tuning_bit_for_bit():
    config = TrainConfig(**SMALL, max_steps=14, aia_weight=0.0)
    model, _, log = finetune.finetune(config, progress=False)
    for name, value in plain_sft(config).items():
        assert torch.equal(model.state_dict()[name], value), name
    assert not any(key.startswith("aia/") for row in log for key in row)


def test_with_aia_the_curves_move_to_the_targets():
    targets = references.lab_targets()
    start = load_lab("lab/unified")
    before = finetune.distance(start.model, start.codebook, targets, count=64)
    model, codebook, log = finetune.finetune(TrainConfig(**SMALL, max_steps=30, learning_rate=3e-3), False)
    after = finetune.distance(model, codebook, targets, count=64)
    for task in TASKS:
        assert after[task] < 0.6 * before[task]
        assert log[0][f"distance/{task}"] == pytest.approx(before[task], abs=1e-6)


@pytest.mark.parametrize("spans", references.DEFINITIONS)
def test_the_aia_term_is_eq_2_of_the_chosen_layers(spans):
    config = TrainConfig(**SMALL, spans=spans, aia_layers="1-2,6")
    adapter, targets = load_lab("lab/unified"), references.lab_targets("lab", spans)
    batch = finetune.step_batches(config, 0, adapter.codebook)["understanding"]
    ntp, aia = finetune.task_losses(adapter.model, batch, "understanding", config, targets)
    from minimal_aia.capture import capture

    query, key = finetune.spans(batch, "understanding", spans)
    with torch.no_grad(), capture(adapter.model, query, key) as record:
        expected = models.next_token_loss(adapter.model, batch, "understanding")
    T, delta = targets.tensors("understanding")
    x = (record.intensity - T[:, None])[[1, 2, 6]]
    d = delta[[1, 2, 6], None]
    huber = torch.where(x.abs() <= d, x**2 / 2, d * (x.abs() - d / 2)).mean()
    torch.testing.assert_close(aia.detach(), huber)
    torch.testing.assert_close(ntp.detach(), expected)
    everything, _ = AIALoss(targets)(record.intensity, "understanding"), None
    assert everything != huber


@given(
    st.integers(0, 5), st.integers(0, 5), st.integers(1, 40), st.integers(1, 200)
)  # fmt: skip
def test_the_ratio_is_exact_over_any_number_of_steps(generation, understanding, size, steps):
    if generation + understanding == 0:
        return
    config = TrainConfig(task_ratio=f"{generation}:{understanding}", per_device_train_batch_size=size)
    counts = [task_counts(config, step) for step in range(steps)]
    assert all(sum(c.values()) == size and min(c.values()) > 0 for c in counts)
    total = sum(c.get("generation", 0) for c in counts)
    assert total == steps * size * generation // (generation + understanding)
    share = size * generation / (generation + understanding)
    assert all(abs(c.get("generation", 0) - share) < 1 for c in counts)


def test_schedules_start_and_end_where_they_say():
    config = TrainConfig(aia_weight=40.0, max_steps=101)
    ends = {
        name: [weight_at(TrainConfig(**{**vars(config), "aia_schedule": name}), s) for s in (0, 50, 100)]
        for name in ("constant", "warmup", "decay")
    }
    assert ends == {"constant": [40, 40, 40], "warmup": [0, 20, 40], "decay": [40, 20, 0]}
    every = TrainConfig(**{**vars(config), "aia_every": 4})
    assert [weight_at(every, s) for s in range(6)] == [40, 0, 0, 0, 40, 0]


def test_targets_by_name_differ_as_their_names_say():
    lab = references.lab_targets("lab")
    assert len(lab.stages("generation")) == 4
    assert len(references.lab_targets("lab-raw").stages("generation")) == lab.n_layers
    assert len(references.lab_targets("lab-2").stages("understanding")) == 2
    swapped = references.lab_targets("lab-wrong")
    assert swapped.stages("generation") == lab.stages("understanding")
    assert references.lab_targets("lab-constant").stages("generation")[0].target == pytest.approx(
        references.reference_curve("generation").mean()
    )
    assert references.lab_targets("lab-single") != lab != references.lab_targets("lab-janus")
    for wrong in ("paper", "lab-wring"):
        with pytest.raises(ValueError, match="unknown lab targets"):
            references.lab_targets(wrong)


@pytest.mark.parametrize("ratio", ["1:1", "2:1", "1:0"])
@pytest.mark.parametrize("parts", [2, 4])
def test_processes_share_the_scenes_that_one_process_sees(ratio, parts):
    codebook = load_lab("lab/unified").codebook
    one = LabBatches(TrainConfig(per_device_train_batch_size=8, task_ratio=ratio), codebook)
    some = LabBatches(
        TrainConfig(per_device_train_batch_size=8 // parts, task_ratio=ratio), codebook, world_size=parts
    )
    for step in range(3):
        shares = [some[step * parts + i] for i in range(parts)]
        for task, whole in one[step].items():
            rows = [row for share in shares if task in share for row in real_tokens(share[task])]
            assert rows == real_tokens(whole)


def real_tokens(batch):
    return [r[m.bool()].tolist() for r, m in zip(batch.inputs["ids"], batch.attention_mask, strict=True)]
