"""Recipes and options: what is read is what was written, and every fault is named with its line."""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimal_aia import cli
from minimal_aia.train.config import TASKS, TrainConfig, layer_subset, micro_batch, task_counts, weight_at
from minimal_aia.train.recipe import (
    RANGES,
    add_options,
    check,
    parse_recipe,
    parse_value,
    read_recipe,
    to_yaml,
    types,
)

RECIPES = Path(__file__).parents[2] / "recipes"


def values(key: str) -> st.SearchStrategy:
    """Any value that a key may have."""
    kind, optional = types()[key]
    if get_origin(kind) is not None:
        found = st.sampled_from(get_args(kind))
    elif kind is bool:
        found = st.booleans()
    elif kind is str:
        found = st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=12).map(str.strip)
        if key == "task_ratio":
            found = st.tuples(st.integers(0, 9), st.integers(1, 9)).map(lambda pair: f"{pair[0]}:{pair[1]}")
    elif kind is int:
        found = st.integers(int(RANGES[key][0]), 10**9)
    else:
        found = st.floats(RANGES[key][0], RANGES[key][1] or 1e6, allow_nan=False)
    return st.none() | found if optional else found


def outcome(function, *args):
    """(result, None), or (None, the text of the ValueError)."""
    try:
        return function(*args), None
    except ValueError as error:
        return None, str(error)


configs = st.fixed_dictionaries({f.name: values(f.name) for f in fields(TrainConfig)}).map(
    lambda made: TrainConfig(**made)
)


@given(configs, st.booleans())
def test_yaml_gives_back_what_it_was_made_of(config, everything):
    assert TrainConfig(**parse_recipe(to_yaml(config, everything))) == config


@given(configs)
def test_options_give_back_what_they_were_made_of(config):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_options(parser)
    line = []
    for key, value in asdict(config).items():
        line.append(f"--{key.replace('_', '-')}={'none' if value is None else value}")
    assert TrainConfig(**vars(parser.parse_args(line))) == config
    assert vars(parser.parse_args([])) == {}  # what is not given does not hide the recipe


@given(st.sampled_from([f.name for f in fields(TrainConfig)]), st.text(max_size=20))
def test_any_text_is_a_value_of_the_right_type_or_one_clear_error(key, text):
    kind, optional = types()[key]
    value, complaint = outcome(parse_value, key, text)
    if complaint is not None:
        assert complaint.startswith(key)
    elif get_origin(kind):
        assert value in get_args(kind)
    else:
        assert isinstance(value, kind) or (optional and value is None)


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: raw.decode("latin-1")))
def test_any_text_is_a_recipe_or_a_named_fault(text):
    found, complaint = outcome(parse_recipe, text, "r.yaml")
    assert set(found) <= set(types()) if complaint is None else complaint.startswith("r.yaml")


def test_every_number_has_a_range():
    numbers = {key for key, (kind, _) in types().items() if kind in (int, float)}
    assert numbers == set(RANGES)


def test_values_are_read_as_their_keys_type_not_as_yaml_guesses():
    text = "task_ratio: 1:1\nresume: no\nlearning_rate: 1e-5\nmax_length: null\n"
    text += "use_cpu: yes\nfreeze: on\nmodel: 1.0"
    assert parse_recipe(text) == {
        "task_ratio": "1:1",
        "resume": "no",
        "learning_rate": 1e-5,
        "max_length": None,
        "use_cpu": True,
        "freeze": "on",
        "model": "1.0",
    }


def test_all_faults_are_named_with_their_lines(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(
        "max_step: 3\nlearning_rate: fast\nbf16: maybe\n\naia_kind: l3\nmax_steps: 0\nseed: 1\nseed: 2\n"
        "freeze: [vision]\nprompt_dropout: 1.5\nqqqqqq: 1\nmax_length: 3.5\n"
    )
    with pytest.raises(ValueError, match="max_step") as caught:
        read_recipe(path)
    lines = str(caught.value).splitlines()
    wanted = [
        (1, "unknown key 'max_step'; did you mean max_steps?"),
        (2, "learning_rate is 'fast': expected a number"),
        (3, "bf16 is 'maybe': expected true or false"),
        (5, "aia_kind is 'l3': choose from huber, l1, l2"),
        (6, "max_steps is 0: must be at least 1"),
        (8, "seed stands twice"),
        (9, "freeze: expected one value, not a list or a mapping"),
        (10, "prompt_dropout is 1.5: must be at least 0, at most 1"),
        (11, "unknown key 'qqqqqq' (minimal-aia train --help lists all)"),
        (12, "max_length is '3.5': expected a whole number"),
    ]
    assert lines == [f"{path}:{number}: {text}" for number, text in wanted]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", r"r:1: not YAML"),
        ("just words", r"r:1: a recipe is lines of `key: value`"),
        ("- 1", r"r:1: a recipe is lines"),
        ("model: !!python/name:os.system", r"model|not YAML"),
    ],
)
def test_what_is_no_recipe_is_said_to_be_none(text, message):
    if text.startswith("model"):  # a tag is no code: the text is taken as it stands
        assert parse_recipe(text, "r") == {"model": ""}
        return
    with pytest.raises(ValueError, match=message):
        parse_recipe(text, "r")


def test_values_that_contradict_each_other():
    for options, message in (
        ({"aia_layers": "5-2"}, "runs backwards"),
        ({"aia_layers": "x"}, "expected all"),
        ({"lora_rank": 4, "freeze": "language"}, "LoRA trains"),
        ({"dtype": "bfloat16", "learning_rate": 2e-5}, "would lose updates"),
    ):
        with pytest.raises(ValueError, match=message):
            check(replace(TrainConfig(), **options))
    check(TrainConfig())
    with pytest.raises(ValueError, match="task_ratio"):
        TrainConfig(task_ratio="2-1")


def test_options_win_over_the_recipe_and_are_checked_with_it(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("max_steps: 5\nseed: 1\n")
    assert read_recipe(path, {"seed": 7}) == TrainConfig(max_steps=5, seed=7)
    with pytest.raises(ValueError, match=r"r\.yaml: aia_layers"):
        read_recipe(path, {"aia_layers": "3-1"})
    with pytest.raises(FileNotFoundError, match="no such recipe"):
        read_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--max-step", "3"], "unknown argument --max-step; did you mean --max-steps?"),
        (["--max_steps", "many"], "max_steps is 'many': expected a whole number"),
        (["--aia-kind=l3"], "choose from huber, l1, l2"),
        (["--bf16", "perhaps"], "expected true or false"),
    ],
)
def test_the_command_line_names_faults_in_one_line(line, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", str(RECIPES / "lab.yaml"), *line])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_help_lists_every_key_with_its_default(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for field in fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in shown
        assert len(field.metadata["help"]) > 3
    assert "(default: 40.0)" in shown
    assert "(default: )" not in shown


# ---- schedules -----------------------------------------------------------------------------------------


@given(st.integers(1, 7), st.integers(1, 4), st.integers(0, 5), st.sampled_from([(1, 4), (2, 2), (4, 1)]))
def test_a_step_holds_the_same_micro_batches_however_many_processes_share_it(batch, scale, step, shape):
    world, accumulation = shape[0] * scale, shape[1]
    config = TrainConfig(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    numbers = {
        micro_batch(config, step, micro, rank, world)
        for micro in range(accumulation)
        for rank in range(world)
    }
    assert numbers == set(range(step * 4 * scale, (step + 1) * 4 * scale))


@given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 12), st.integers(1, 60))
def test_the_task_ratio_is_exact_over_the_steps(generation, understanding, batch, steps):
    config = TrainConfig(task_ratio=f"{generation}:{understanding}", per_device_train_batch_size=batch)
    counts = [task_counts(config, step) for step in range(steps)]
    assert all(sum(count.values()) == batch for count in counts)
    drawn = sum(count.get("generation", 0) for count in counts)
    assert abs(drawn - steps * batch * generation / (generation + understanding)) < 1


def test_weights_by_task_and_over_the_run():
    config = TrainConfig(
        aia_weight=10, aia_weight_understanding=4, aia_schedule="decay", max_steps=11, aia_every=2
    )
    assert [weight_at(config, step, "generation") for step in (0, 1, 2, 10)] == [10, 0, 8, 0]
    assert weight_at(config, 0, "understanding") == 4
    assert config.weights() == dict(zip(TASKS, (10, 4), strict=True))


def test_layer_subsets():
    assert layer_subset("all") is None
    assert layer_subset("0-2, 7") == [0, 1, 2, 7]
    assert layer_subset("3,1", 4) == [1, 3]
    for wrong in ("", "1-", "-1", "a", "1.5", "2-1", "1,,2"):
        with pytest.raises(ValueError, match="aia_layers"):
            layer_subset(wrong)
    with pytest.raises(ValueError, match="0 to 3"):
        layer_subset("4", 4)
