"""The loss of both tasks against the models' own losses, eager attention and sums written out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from eager_reference import assert_same_gradients
from real_models import TARGETS, checkpoint, gradients, module, samples

from minimal_aia.intensity import intensity_from_attention
from minimal_aia.loss import aia_loss
from minimal_aia.models import load_adapter
from minimal_aia.targets import StageTargets
from minimal_aia.train import label_loss as label_loss_file
from minimal_aia.train import module as module_file
from minimal_aia.train.config import TASKS, TrainConfig
from minimal_aia.train.label_loss import label_loss
from minimal_aia.train.module import resolve_targets

NO_AIA = dict.fromkeys(TASKS, 0.0)
CASES = [(family, task) for family in ("janus", "emu3") for task in TASKS]


@pytest.fixture(scope="module", params=["janus", "emu3"])
def made(request):
    """A module without the AIA loss' effects between tests: nobody steps an optimizer on it."""
    return module(request.param)


def batch_of(made, task):
    return made.adapter.collate(samples(task), task)


# ---- next-token loss -----------------------------------------------------------------------------------


def own_loss(made, batch) -> torch.Tensor:
    """What the library's class computes from `labels=`; Janus' generation, which it lacks, by hand."""
    adapter, model = made.adapter, made.model
    labelled = adapter.label_mask(batch)
    if adapter.family == "emu3":
        ids = adapter.token_ids(batch)
        labels = ids.masked_fill(~labelled, -100)
        return model(input_ids=ids, attention_mask=batch.attention_mask, labels=labels).loss
    if batch.task == "understanding":
        return model(**batch.inputs, labels=batch.inputs["input_ids"].masked_fill(~labelled, -100)).loss
    terms = []
    for row, n in enumerate(batch.attention_mask.sum(1).tolist()):  # one by one, without padding or masks
        codes = model.model.vqmodel.encode(batch.inputs["pixel_values"][row : row + 1]).image_tokens.flatten()
        prompt = batch.inputs["input_ids"][row, : n - len(codes)]
        embeds = torch.cat(
            [model.get_input_embeddings()(prompt), model.prepare_embeddings_for_image_generation(codes)]
        )
        hidden = model.model.language_model(inputs_embeds=embeds[None]).last_hidden_state[0]
        logits = model.model.generation_head(hidden[len(prompt) - 1 : -1])
        terms.append(-logits.log_softmax(-1)[torch.arange(len(codes)), codes])
    return torch.cat(terms).mean()


@pytest.mark.parametrize("task", TASKS)
def test_next_token_loss_is_the_models_own(made, task):
    batch = batch_of(made, task)
    loss, logs = made({task: batch}, NO_AIA)
    want = own_loss(made, batch)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    assert logs[task]["ntp"] == loss.detach()
    loss, _ = made({task: batch}, NO_AIA)
    assert_same_gradients(gradients(made, loss), gradients(made, own_loss(made, batch)))


def test_labels_are_the_answers_with_their_ends_and_all_image_tokens(made):
    adapter = made.adapter
    batch = batch_of(made, "understanding")
    ids, labelled = batch.inputs["input_ids"], adapter.label_mask(batch)
    eos = adapter.tokenizer.eos_token
    for row, sample in enumerate(samples("understanding")):
        text = adapter.tokenizer.decode(ids[row][labelled[row]])
        # Emu3's template ends only the whole conversation, DeepSeek's every turn
        ends = [eos if adapter.family == "janus" else ""] * (len(sample.turns) - 1) + [eos]
        want = "".join(answer + end for (_, answer), end in zip(sample.turns, ends, strict=True))
        assert text.replace(" ", "") == want.replace(" ", "")
    generation = batch_of(made, "generation")
    image = generation.inputs["input_ids"] == adapter.image_token_id
    assert torch.equal(adapter.label_mask(generation), image & generation.attention_mask.bool())


def test_profiles_do_not_see_the_end_of_turn_that_training_adds():
    adapter = load_adapter(checkpoint("janus"), device="cpu")
    plain = adapter.collate(samples("understanding"), "understanding")
    adapter.ends_turns = True
    ended = adapter.collate(samples("understanding"), "understanding")
    assert (ended.attention_mask.sum(1) - plain.attention_mask.sum(1)).tolist() == [1, 1, 1]
    assert torch.equal(ended.query_mask.sum(1), plain.query_mask.sum(1))


def test_logits_in_pieces_give_the_same_loss_and_gradients(monkeypatch):
    torch.manual_seed(0)
    head, states = torch.nn.Linear(6, 11), torch.randn(50, 6, requires_grad=True)
    labels = torch.randint(0, 11, (50,))
    want = F.cross_entropy(head(states), labels)
    wanted = torch.autograd.grad(want, [states, *head.parameters()])
    sizes = []
    head.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    monkeypatch.setattr(label_loss_file, "LOGITS_AT_ONCE", 11 * 16)
    got = label_loss(states, head, labels)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, [states, *head.parameters()]), wanted)
    assert max(sizes) == 16  # and never more, in the backward pass either
    assert label_loss(states[:0], head, labels[:0]) == 0


# ---- AIA -----------------------------------------------------------------------------------------------


def eager_intensity(made, batch, query, key):
    """[L, B] from full attention matrices."""
    model = made.model
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    if made.adapter.family == "emu3":
        out = model.model(
            input_ids=made.adapter.token_ids(batch),
            attention_mask=batch.attention_mask,
            output_attentions=True,
        )
    elif batch.task == "understanding":
        out = model.model(**batch.inputs, output_attentions=True)
    else:
        codes = made.adapter.target_codes(batch)
        out = model.model.language_model(
            inputs_embeds=made.adapter.generation_embeddings(batch, codes),
            attention_mask=batch.attention_mask,
            output_attentions=True,
        )
    model.set_attn_implementation(before)
    return torch.stack([intensity_from_attention(a, query, key) for a in out.attentions])


@pytest.mark.parametrize("task", TASKS)
def test_aia_term_is_that_of_eager_attention(made, task):
    batch = batch_of(made, task)
    weights = {"generation": 40.0, "understanding": 15.0}
    target, delta = TARGETS.tensors(task)

    def want():
        intensity = eager_intensity(made, batch, batch.query_mask, batch.key_mask)
        return own_loss(made, batch) + weights[task] * aia_loss(intensity, target, delta), intensity

    loss, logs = made({task: batch}, weights)
    total, intensity = want()
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logs[task]["curve"], intensity.mean(1).detach(), rtol=1e-5, atol=1e-6)
    away = (intensity - target[:, None]).abs().mean()
    torch.testing.assert_close(logs[task]["distance"], away.detach(), rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients(made, loss), gradients(made, want()[0]), tolerance=1e-4)


def test_layers_and_predicting_positions_can_be_chosen():
    made = module("janus", aia_layers="0,2", spans="predicting", aia_kind="l1")
    batch = batch_of(made, "generation")
    shifted = F.pad(batch.query_mask[:, 1:], (0, 1))
    loss, logs = made({"generation": batch}, dict.fromkeys(TASKS, 7.0))
    intensity = eager_intensity(made, batch, shifted, batch.key_mask)[[0, 2]]
    target, delta = (t[[0, 2]] for t in TARGETS.tensors("generation"))
    want = own_loss(made, batch) + 7.0 * aia_loss(intensity, target, delta, "l1")
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    assert logs["generation"]["curve"].shape == (2,)


def test_spans_as_the_released_code_counts_them():
    made = module("janus", spans="code")
    adapter = made.adapter
    asked, text = samples("generation")[:2], samples("understanding")[:1]
    batch = adapter.collate([asked[0], replace(asked[1], dropped=True)], "generation")
    query, key = adapter.spans(batch, "code")
    ids = batch.inputs["input_ids"]
    assert query.sum(1).tolist() == [15, 15]  # of 16: the last image token is left out
    assert not (query & ~batch.query_mask).any()
    image_start = adapter.tokenizer.convert_tokens_to_ids(adapter.processor.image_start_token)
    prompt = ids[0].tolist()[: ids[0].tolist().index(image_start)]
    assert ids[0][key[0]].tolist() == prompt  # from begin-of-sentence on, with the roles
    assert prompt[0] == adapter.tokenizer.bos_token_id
    assert not key[1].any()
    batch = adapter.collate(text, "understanding")  # two turns
    query, key = adapter.spans(batch, "code")
    ids = batch.inputs["input_ids"]
    assert ids[key].tolist() == [image_start] + 15 * [adapter.image_token_id]
    added = query & ~batch.query_mask
    assert ids[added].tolist() == [adapter.tokenizer.eos_token_id]
    assert int(added.nonzero()[0, 1]) == int(batch.attention_mask.sum()) - 1
    _, logs = made({"understanding": batch}, dict.fromkeys(TASKS, 1.0))
    intensity = eager_intensity(made, batch, query, key)
    torch.testing.assert_close(
        logs["understanding"]["curve"], intensity.mean(1).detach(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Liger's kernels need a CUDA GPU")
def test_ligers_fused_loss_is_the_same():
    pytest.importorskip("liger_kernel")
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 1000, bias=False, device="cuda")
    states = torch.randn(300, 64, device="cuda", requires_grad=True)
    labels = torch.randint(0, 1000, (300,), device="cuda")
    found = []
    for liger in (False, True):
        loss = label_loss(states, head, labels, liger)
        found.append((loss, *torch.autograd.grad(loss, [states, head.weight])))
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(plain, fused, rtol=1e-3, atol=1e-5)


def test_autocast_changes_the_loss_by_rounding_only():
    made = module("janus")
    batches = {task: batch_of(made, task) for task in TASKS}
    weights = dict.fromkeys(TASKS, 40.0)
    want, logs = made(batches, weights)
    with torch.autocast("cpu", torch.bfloat16):
        loss, rounded = made(batches, weights)
    assert loss.dtype == torch.float32
    assert loss != want
    torch.testing.assert_close(loss, want, rtol=0.02, atol=0)
    for task in TASKS:  # intensities are reduced in float32: errors far below the targets' tolerance of .05
        torch.testing.assert_close(rounded[task]["curve"], logs[task]["curve"], rtol=0, atol=0.01)
    assert all(g.isfinite().all() for g in gradients(made, loss).values())


def test_without_a_weight_nothing_is_captured(monkeypatch):
    made = module("janus")
    monkeypatch.setattr(module_file, "capture", None)  # calling it would raise
    batches = {task: batch_of(made, task) for task in TASKS}
    _, logs = made(batches, NO_AIA)
    assert set(logs["generation"]) == {"ntp"}
    with pytest.raises(TypeError):
        made(batches, {"generation": 0.0, "understanding": 1.0})


def test_measuring_neither_trains_nor_draws_random_numbers():
    made = module("janus")
    for layer in made.adapter.layers():
        layer.self_attn.attention_dropout = 0.5
    batch = batch_of(made, "generation")
    state = torch.get_rng_state()
    _, first = made({"generation": batch}, None)
    _, again = made({"generation": batch}, None)
    assert torch.equal(first["generation"]["curve"], again["generation"]["curve"])
    assert not first["generation"]["curve"].requires_grad
    assert torch.equal(state, torch.get_rng_state())
    assert made.training


# ---- averaging -----------------------------------------------------------------------------------------


def pick(batch, rows):
    """Some rows of a batch, with its padding."""
    inputs = {name: tensor[rows] for name, tensor in batch.inputs.items()}
    masks = {name: getattr(batch, name)[rows] for name in ("query_mask", "key_mask", "attention_mask")}
    return replace(batch, inputs=inputs, ids=[batch.ids[row] for row in rows], **masks)


@pytest.mark.parametrize("reduction", ["per-sample", "authors-code"])
def test_a_step_does_not_depend_on_how_it_is_cut(reduction):
    made = module("janus", aia_reduction=reduction)
    whole = {
        "generation": made.adapter.collate(
            [replace(samples("generation")[0], dropped=True), *samples("generation")[1:]], "generation"
        ),
        "understanding": batch_of(made, "understanding"),
    }
    weights = {"generation": 40.0, "understanding": 3.0}
    loss, _ = made(whole, weights)
    totals = {task: made.counts(batch) for task, batch in whole.items()}
    assert totals["generation"]["used"] == (2 if reduction == "per-sample" else 3)  # one prompt is dropped
    parts = [
        {"generation": pick(whole["generation"], [0])},  # nothing for the AIA loss in here
        {"generation": pick(whole["generation"], [1, 2]), "understanding": pick(whole["understanding"], [2])},
        {"understanding": pick(whole["understanding"], [0, 1])},
    ]
    cut = [made(part, weights, totals)[0] for part in parts]
    torch.testing.assert_close(sum(cut), loss, rtol=1e-6, atol=1e-6)
    assert_same_gradients(gradients(made, sum(cut)), gradients(made, made(whole, weights)[0]))


def test_every_sample_weighs_the_same_between_tasks():
    made = module("janus")
    batches = {
        "generation": batch_of(made, "generation"),
        "understanding": pick(batch_of(made, "understanding"), [1]),
    }
    loss, logs = made(batches, NO_AIA)
    torch.testing.assert_close(
        loss.detach(), 0.75 * logs["generation"]["ntp"] + 0.25 * logs["understanding"]["ntp"]
    )


# ---- what is trained -----------------------------------------------------------------------------------


def trained(made) -> set[str]:
    batches = {task: batch_of(made, task) for task in TASKS}
    return set(gradients(made, made(batches, dict.fromkeys(TASKS, 40.0))[0]))


def test_vision_encoder_and_vq_tokenizer_stay_as_they_are():
    made = module("janus")
    got = trained(made)
    assert not [name for name in got if "vqmodel" in name or "vision_model" in name]
    everything = {name for name, _ in made.named_parameters()}
    frozen = everything - got
    assert all("vqmodel" in name or "vision_model" in name for name in frozen)
    assert not made.model.model.vqmodel.training  # also after train()
    assert not made.model.model.vision_model.training
    assert made.model.model.language_model.training


def test_other_parts_can_be_frozen():
    got = trained(module("janus", freeze="vision,aligner,generation"))
    assert all("language_model" in name or "lm_head" in name for name in got)
    got = trained(module("janus", freeze="language"))
    assert got
    assert not any("language_model" in name or "lm_head" in name for name in got)
    with pytest.raises(ValueError, match="'visoin'"):
        module("janus", freeze="visoin")
    with pytest.raises(ValueError, match="nothing is left"):
        module("emu3", freeze="language")


def test_a_run_of_one_task_leaves_the_other_tasks_heads_alone():
    made = module("janus", task_ratio="1:0")
    open_weights = [name for name, p in made.named_parameters() if p.requires_grad]
    batches = {"generation": batch_of(made, "generation")}
    assert set(gradients(made, made(batches, NO_AIA)[0])) == set(open_weights)
    assert not [name for name in open_weights if ".aligner." in name or "lm_head" in name]


@pytest.mark.parametrize("family", ["janus", "emu3"])
def test_gradient_checkpointing_changes_no_number(family):
    found = []
    for on in (False, True):
        made = module(family, gradient_checkpointing=on)
        runs = []
        for layer in made.adapter.layers():
            layer.mlp.register_forward_pre_hook(lambda *_, seen=runs: seen.append(1))
        batches = {task: batch_of(made, task) for task in TASKS}
        loss, _ = made(batches, dict.fromkeys(TASKS, 40.0))
        found.append((loss.detach(), gradients(made, loss), len(runs)))
    (plain, want, once), (again, got, twice) = found
    assert torch.equal(plain, again)
    assert twice == 2 * once  # it did recompute
    assert_same_gradients(got, want)


# ---- targets -------------------------------------------------------------------------------------------


def test_targets_by_name_depth_and_file(tmp_path):
    assert resolve_targets(TrainConfig(targets="janus-pro"), 30) == StageTargets.paper("janus-pro")
    with pytest.raises(ValueError, match=r'30 layers, the model has 24: write "janus-pro:rescaled"'):
        resolve_targets(TrainConfig(targets="janus-pro"), 24)
    assert resolve_targets(TrainConfig(targets="janus-pro:rescaled"), 24) == StageTargets.paper(
        "janus-pro", 24
    )
    assert resolve_targets(TrainConfig(targets="lab"), 8).n_layers == 8
    TARGETS.save(tmp_path / "t.yaml")
    assert resolve_targets(TrainConfig(targets=str(tmp_path / "t.yaml")), 3) == TARGETS
    for wrong in ("janus", "janus-pro:rescale", str(tmp_path / "none.yaml")):
        with pytest.raises(ValueError, match="no such file"):
            resolve_targets(TrainConfig(targets=wrong), 30)


def test_targets_must_cover_the_tasks_that_aim_at_them(tmp_path):
    one = StageTargets.constant(3, generation=0.4)
    one.save(tmp_path / "one.yaml")
    spec = str(tmp_path / "one.yaml")
    with pytest.raises(ValueError, match="no stages for understanding"):
        resolve_targets(TrainConfig(targets=spec), 3)
    assert resolve_targets(TrainConfig(targets=spec, task_ratio="1:0"), 3) == one
    assert resolve_targets(TrainConfig(targets=spec, aia_weight_understanding=0.0), 3) == one
    assert resolve_targets(TrainConfig(targets="none", aia_weight=0.0), 3) is None
    with pytest.raises(ValueError, match="targets none"):
        resolve_targets(TrainConfig(targets="none"), 3)
