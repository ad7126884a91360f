"""LoRA: what it trains, what a checkpoint of it holds, and that merging it changes no answer."""

from __future__ import annotations

import pytest
import torch
from real_models import checkpoint, gradients, module, samples
from safetensors.torch import load_file

from minimal_aia.models import load_adapter
from minimal_aia.train.config import TASKS, TrainConfig
from minimal_aia.train.module import TRAINED, SFTModule
from minimal_aia.train.parts import merged

pytest.importorskip("peft")
WEIGHTS = dict.fromkeys(TASKS, 40.0)
LORA = {"lora_rank": 2, "lora_alpha": 6.0}


def batches(made):
    return {task: made.adapter.collate(samples(task), task) for task in TASKS}


def shaken(family: str, **options):
    """A module whose LoRA is no longer zero."""
    made = module(family, **{**LORA, **options})
    torch.manual_seed(3)
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    return made


@pytest.mark.parametrize("family", ["janus", "emu3"])
def test_a_merged_model_gives_the_same_losses_and_is_an_ordinary_folder(tmp_path, family):
    made = shaken(family).eval()
    made.export(tmp_path)
    plain = load_adapter(tmp_path, device="cpu")
    plain.ends_turns = True
    for task, batch in batches(made).items():
        states, head, labels = made.adapter.label_states(batch)
        want = head(states)
        states, head, same = plain.label_states(batch)
        got = head(states)
        assert torch.equal(labels, same)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        states, head, _ = module(family).eval().adapter.label_states(batch)
        base = head(states)
        assert (base - want).abs().max() > 1e-2, task  # or the comparison says nothing
    names = set(load_file(tmp_path / "model.safetensors"))
    assert not [name for name in names if "lora" in name or "base_layer" in name]


def test_merging_is_what_peft_does():
    from peft.tuners.lora import LoraLayer

    made = shaken("emu3").eval()
    got = merged(made.model.state_dict(), scale=3.0)
    layers = {n: m for n, m in made.model.named_modules() if isinstance(m, LoraLayer)}
    assert len(layers) == 3 * 7  # all linear modules of the decoder layers, none of the VQ model or the head
    for name, layer in layers.items():
        layer.merge()
        torch.testing.assert_close(got[f"{name}.weight"], layer.base_layer.weight)


def test_lora_trains_itself_and_the_whole_parts_that_are_not_frozen():
    made = shaken("janus")
    loss, _ = made(batches(made), WEIGHTS)
    got = set(gradients(made, loss))
    assert got == {name for name, p in made.named_parameters() if p.requires_grad}
    inside = {name for name in got if "language_model" in name}
    assert inside
    assert all("lora_" in name for name in inside)
    parts = {name.split(".")[2] for name in got - inside}
    assert parts == {"aligner", "generation_aligner", "generation_embeddings", "generation_head"}
    only = shaken("janus", freeze="vision,aligner,generation")
    assert all("lora_" in name for name, p in only.named_parameters() if p.requires_grad)


def test_modules_can_be_named():
    made = module("janus", **LORA, lora_target_modules="q_proj, v_proj")
    names = {n.split(".lora_")[0].rpartition(".")[2] for n, _ in made.named_parameters() if "lora_" in n}
    assert names == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match=r"'c_attn'.*choose all-linear or some of q_proj"):
        module("janus", **LORA, lora_target_modules="c_attn")


def test_a_fresh_lora_changes_nothing_and_a_checkpoint_holds_only_what_is_trained(tmp_path):
    plain, made = module("janus"), module("janus", **LORA)
    given = batches(plain)
    torch.testing.assert_close(made(given, WEIGHTS)[0], plain(given, WEIGHTS)[0])
    trained = shaken("janus")
    trained.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [TRAINED]
    assert set(load_file(tmp_path / TRAINED)) == {n for n, p in trained.named_parameters() if p.requires_grad}
    made.load(tmp_path)
    for name, value in trained.state_dict().items():
        assert torch.equal(made.state_dict()[name], value), name
    with pytest.raises(ValueError, match="another model's checkpoint"):
        module("janus", lora_rank=3).load(tmp_path)


@pytest.mark.parametrize("bf16", [True, False])
def test_what_lora_trains_is_float32_beside_bfloat16_weights(bf16):
    adapter = load_adapter(checkpoint("janus"), device="cpu", dtype=torch.bfloat16)
    config = TrainConfig(dtype="bfloat16", bf16=bf16, targets="none", aia_weight=0, **LORA)
    made = SFTModule(adapter, config, None)
    own = {p.dtype for name, p in made.named_parameters() if ".lora_" in name}
    whole = {p.dtype for name, p in made.named_parameters() if p.requires_grad and ".lora_" not in name}
    frozen = {p.dtype for p in made.parameters() if not p.requires_grad}
    assert own == {torch.float32}
    assert whole == {torch.float32 if bf16 else torch.bfloat16}
    assert frozen == {torch.bfloat16}
