"""The mixture of transformers: a Llama when its experts are equal, two sets of weights when they are not."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import minimal_aia as aia
from minimal_aia.lab import images, models, mot, sequences

CODEBOOK = np.random.default_rng(0).random((images.N_CODES, 48)).astype(np.float32)
TASKS = ("generation", "understanding")


def batch_of(task: str, size: int = 4) -> sequences.Sequences:
    return sequences.draw_batch(task, size, np.random.default_rng(5), CODEBOOK)


@pytest.fixture
def model() -> mot.MotForCausalLM:
    return models.build("mot", seed=1).eval()


@pytest.fixture
def twins() -> tuple[mot.MotForCausalLM, LlamaForCausalLM]:
    """A mixture whose experts both have a Llama's weights (norms too: all ones would hide a mix-up)."""
    llama, mixture = models.build("unified", seed=2).eval(), models.build("mot", seed=3).eval()
    generator = torch.Generator().manual_seed(4)
    weights = {}
    for key, value in llama.state_dict().items():
        if "norm" in key:
            value = value + 0.3 * torch.randn(value.shape, generator=generator)
        weights[key] = value
    llama.load_state_dict(weights)
    mixture.load_state_dict({key: weights[llama_key(key)] for key in mixture.state_dict()})
    return mixture, llama


def llama_key(key: str) -> str:
    """The name of a weight of the mixture in a Llama."""
    if ".norms." in key:
        return "model.norm.weight"
    for expert in mot.EXPERTS:
        key = key.replace(f".{expert}.", ".self_attn." if "_proj" in key and ".mlp." not in key else ".")
    return key


@pytest.mark.parametrize("task", TASKS)
def test_with_equal_experts_values_and_gradients_are_a_llama_s(twins, task):
    mixture, llama = twins
    batch = batch_of(task)
    outputs = [model(input_ids=batch.ids, output_hidden_states=True) for model in twins]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(outputs[0].hidden_states, outputs[1].hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for model in twins:
        models.next_token_loss(model, batch, task).backward()
    summed = {key: torch.zeros_like(p) for key, p in llama.named_parameters()}
    for key, p in mixture.named_parameters():  # what the Llama's one weight gets, the two experts share
        summed[llama_key(key)] += p.grad
    for key, p in llama.named_parameters():
        torch.testing.assert_close(summed[key], p.grad, atol=1e-6, rtol=1e-4, msg=key)


@pytest.mark.parametrize("task", TASKS)
def test_with_equal_experts_generate_is_a_llama_s(twins, task):
    ids = batch_of(task).ids[:, :44]
    if task == "generation":
        ids = torch.tensor([[sequences.BOS, *sequences.word_ids("a red circle"), sequences.BOI]])
    for keywords in ({"do_sample": False}, {"do_sample": True}, {"num_beams": 3, "do_sample": False}):
        drawn = []
        for model in twins:
            torch.manual_seed(0)
            drawn.append(model.generate(ids, max_new_tokens=12, min_new_tokens=12, **keywords))
        assert torch.equal(*drawn), keywords


def touched(model: Any, batch: sequences.Sequences, task: str) -> dict[str, bool]:
    """Which weights a task's loss gives a gradient that is not zero."""
    model.zero_grad()
    models.next_token_loss(model, batch, task).backward()
    return {key: bool(p.grad is not None and p.grad.any()) for key, p in model.named_parameters()}


def test_answering_trains_the_understanding_experts_and_drawing_trains_both(model):
    """Exactly: answers leave every weight of the generation experts alone and reach all others.

    Drawing reaches all weights. The understanding experts get their share through the prompt that the codes
    attend to, and through <boi>, which predicts the first code and runs through their last layer.
    """
    answers = touched(model, batch_of("understanding"), "understanding")
    assert {key for key, yes in answers.items() if not yes} == {k for k in answers if ".generation" in k or
                                                                "norms.generation" in k}  # fmt: skip
    drawing = touched(model, batch_of("generation"), "generation")
    assert all(drawing.values())


def test_without_the_first_code_s_loss_the_last_understanding_expert_only_serves_keys_and_values(model):
    batch = batch_of("generation")
    batch.label_mask &= mot.drawn_codes(batch.ids, model.config).cumsum(-1) > 1
    drawing = touched(model, batch, "generation")
    last = f"model.layers.{models.SCALES['laptop'][1] - 1}.understanding."
    untouched = {key for key, yes in drawing.items() if not yes}
    only = ("q_proj", "o_proj", "post_attention_layernorm", "mlp")
    assert untouched == {k for k in drawing if k.startswith(last) and any(part in k for part in only)} | {
        "model.norms.understanding.weight"
    }


def test_a_token_passes_through_one_expert(model):
    """Changing an expert changes the layer's output of its own tokens, and of others only by attention."""
    batch = batch_of("generation")
    mask = mot.drawn_codes(batch.ids, model.config)
    before = model(input_ids=batch.ids, output_hidden_states=True).hidden_states
    with torch.no_grad():
        model.model.layers[0].generation.mlp.up_proj.weight.mul_(2)
    after = model(input_ids=batch.ids, output_hidden_states=True).hidden_states
    changed = (before[1] != after[1]).any(-1)
    assert torch.equal(changed, mask)
    assert (before[2] != after[2]).any(-1)[:, -8:].any(), "the next layer's attention must see the change"


def test_active_weights_of_a_token_are_as_many_as_in_the_unified_model(model):
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    idle = sum(p.numel() for key, p in model.named_parameters() if ".generation" in key)
    assert count(model) - idle == count(models.build("unified"))
    assert idle == sum(p.numel() for key, p in model.named_parameters() if ".understanding" in key)


def test_the_tokens_alone_say_what_is_drawn(model):
    """The rule on ids gives what the task gives; an opening picture is given even if pads come first."""
    for task in TASKS:
        batch = batch_of(task)
        is_code = batch.ids >= sequences.FIRST_CODE
        assert torch.equal(mot.drawn_codes(batch.ids, model.config), is_code & (task == "generation"))
        padded = torch.nn.functional.pad(batch.ids, (3, 0), value=sequences.PAD)
        assert torch.equal(mot.drawn_codes(padded, model.config)[:, 3:], is_code & (task == "generation"))
        with torch.no_grad():
            ours = models.label_logits(model, batch, task)[0]
            theirs = model(input_ids=batch.ids).logits[:, :-1][batch.label_mask[:, 1:]]
        torch.testing.assert_close(ours, theirs)


def test_what_the_tokens_cannot_say_is_asked_for(model):
    batch = batch_of("generation")
    embeds = model.get_input_embeddings()(batch.ids)
    with pytest.raises(
        ValueError, match="embeddings do not say which tokens are drawn: give generation_mask"
    ):
        model(inputs_embeds=embeds)
    cache = model(input_ids=batch.ids[:, :12], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="image codes continue a cache: give generation_mask"):
        model(input_ids=batch.ids[:, 12:20], past_key_values=cache)
    mask = mot.drawn_codes(batch.ids, model.config)
    with torch.no_grad():
        whole = model(input_ids=batch.ids).logits
        torch.testing.assert_close(model(inputs_embeds=embeds, generation_mask=mask).logits, whole)
        reading = model(input_ids=batch.ids, generation_mask=torch.zeros_like(mask)).logits
    assert (reading - whole)[mask].abs().max() > 0.1, "the experts must differ"


@pytest.mark.parametrize("task", TASKS)
def test_pieces_through_the_cache_equal_the_whole(model, task):
    batch = batch_of(task)
    mask = mot.drawn_codes(batch.ids, model.config)
    cache, pieces = None, []
    with torch.no_grad():
        for ids, drawn in zip(batch.ids.split(9, dim=1), mask.split(9, dim=1), strict=True):
            out = model(input_ids=ids, generation_mask=drawn, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
        torch.testing.assert_close(
            torch.cat(pieces, 1), model(input_ids=batch.ids).logits, atol=1e-5, rtol=1e-4
        )


def test_drawing_with_the_cache_equals_teacher_forcing(model):
    """At temperature 0+ the sampler takes the most likely code; one teacher-forced pass must agree."""
    prompts = ["a red circle", "two blue squares", "a red circle above a blue square"]
    codes = models.draw(model, prompts, temperature=1e-4)
    rows = [sequences.generation_tokens(p, c) for p, c in zip(prompts, codes.tolist())]
    batch = sequences.pad(rows, images.decode(codes, CODEBOOK))
    logits, labels = models.label_logits(model, batch, "generation")
    assert torch.equal(logits[:, sequences.FIRST_CODE :].argmax(-1), labels - sequences.FIRST_CODE)
    assert len(set(labels.tolist())) > 3


@pytest.mark.parametrize("given", [False, True])
def test_generate_routes_what_it_adds(model, given):
    """With and without cache, and as one pass over the finished sequence; `given` routes the prompt."""
    ids = torch.tensor([[sequences.BOS, *sequences.word_ids("a red circle"), sequences.BOI]])
    prompt = {"generation_mask": torch.ones_like(ids, dtype=torch.bool)} if given else {}
    force = {"max_new_tokens": 20, "do_sample": False, "suppress_tokens": list(range(sequences.FIRST_CODE))}
    out = model.generate(ids, **force, **prompt)
    assert torch.equal(out, model.generate(ids, use_cache=False, **force, **prompt))
    mask = mot.drawn_codes(out, model.config)
    mask[:, : ids.shape[1]] |= given
    assert mask[:, ids.shape[1] :].all()
    logits = model(input_ids=out, generation_mask=mask).logits[:, ids.shape[1] - 1 : -1]
    greedy = logits[..., sequences.FIRST_CODE :].argmax(-1) + sequences.FIRST_CODE
    assert torch.equal(greedy, out[:, ids.shape[1] :])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_capture_equals_eager_attention_with_its_gradient(model, task, checkpointing):
    batch = batch_of(task)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    with aia.capture(model, batch.query_mask, batch.key_mask) as record:
        captured = model(input_ids=batch.ids, use_cache=False).logits
    record.intensity.sum().backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    plain = models.build("mot", seed=1).eval()
    plain.set_attn_implementation("eager")
    out = plain(input_ids=batch.ids, output_attentions=True)
    torch.testing.assert_close(captured, out.logits, atol=1e-5, rtol=1e-4)
    eager = torch.stack(
        [aia.intensity_from_attention(a, batch.query_mask, batch.key_mask) for a in out.attentions]
    )
    assert record.intensity.shape == (models.SCALES["laptop"][1], len(batch.ids))
    torch.testing.assert_close(record.intensity, eager, atol=1e-6, rtol=0)
    eager.sum().backward()
    for key, p in plain.named_parameters():
        if p.grad is not None and p.grad.any():
            torch.testing.assert_close(gradients[key], p.grad, atol=1e-5, rtol=1e-3, msg=key)


def test_a_saved_model_comes_back_through_the_auto_classes(model, tmp_path):
    models.save(model, CODEBOOK, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, mot.MotConfig)
    assert (config.first_word_id, config.first_code_id) == (len(sequences.SPECIAL), sequences.FIRST_CODE)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(again, mot.MotForCausalLM)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    loaded, codebook = models.load(tmp_path)
    np.testing.assert_array_equal(codebook, CODEBOOK)
    for task in TASKS:
        batch = batch_of(task)
        with torch.no_grad():
            ours = models.label_logits(model, batch, task)[0]
            for other in (again, loaded):
                assert torch.equal(models.label_logits(other, batch, task)[0], ours)
    words = AutoTokenizer.from_pretrained(tmp_path)
    assert words("<code_0>")["input_ids"] == [config.first_code_id]


def test_grouped_keys_and_values_work_as_in_llama():
    """Fewer key than query heads, a head size of its own, biases: the configuration gives the shapes."""
    sizes = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    odd = {**sizes, **heads, "vocab_size": sequences.VOCABULARY, "pad_token_id": sequences.PAD}
    llama = LlamaForCausalLM(models.LlamaConfig(**odd)).eval()
    marks = {"first_word_id": len(sequences.SPECIAL), "first_code_id": sequences.FIRST_CODE}
    mixture = mot.MotForCausalLM(mot.MotConfig(**odd, **marks)).eval()
    weights = llama.state_dict()
    mixture.load_state_dict({key: weights[llama_key(key)] for key in mixture.state_dict()})
    batch = batch_of("generation")
    with torch.no_grad():
        torch.testing.assert_close(mixture(input_ids=batch.ids).logits, llama(input_ids=batch.ids).logits)
