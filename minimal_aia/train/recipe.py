"""Recipes: a `TrainConfig` as YAML and as command-line options, both read by the same rules.

A value is read as its key's type, not as YAML guesses: `1:1` stays a ratio (to YAML 1.1 it is 61), `no` stays
a word where a word is due, and 1e-5 is a number. Every fault is reported with its line, all of them at once.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import cache, partial
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from minimal_aia.console import nearest
from minimal_aia.train.config import TrainConfig, layer_subset

BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NOTHING = ("null", "none", "~", "")
# key -> (least, most) of a number; most is None where there is no limit
RANGES: dict[str, tuple[float, float | None]] = {
    **dict.fromkeys("per_device_train_batch_size gradient_accumulation_steps max_steps".split(), (1, None)),
    **dict.fromkeys("max_length aia_every num_processes save_total_limit logging_steps".split(), (1, None)),
    **dict.fromkeys("seed dataloader_num_workers length_window image_area warmup_steps".split(), (0, None)),
    **dict.fromkeys("save_steps curve_steps lora_rank aia_weight aia_weight_generation".split(), (0, None)),
    **dict.fromkeys("aia_weight_understanding learning_rate weight_decay max_grad_norm".split(), (0, None)),
    **dict.fromkeys("adam_epsilon lora_alpha".split(), (0, None)),
    **dict.fromkeys("prompt_dropout lora_dropout attention_dropout adam_beta1 adam_beta2".split(), (0, 1)),
}


@cache
def types() -> dict[str, tuple[Any, bool]]:
    """By key: the type of a value (or a Literal), and whether it may be left empty."""
    found = {}
    for key, hint in get_type_hints(TrainConfig).items():
        parts = [part for part in get_args(hint) if part is not NoneType]
        optional = NoneType in get_args(hint)
        found[key] = (parts[0] if optional else hint), optional
    return found


def parse_value(key: str, text: str) -> Any:
    """The value of a key, from its text. ValueError says what was expected."""
    kind, optional = types()[key]
    text = text.strip()
    if optional and text.lower() in NOTHING:
        return None
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise ValueError(
                f"{key} is {text!r}: choose from {', '.join(get_args(kind))}{nearest(text, get_args(kind))}"
            )
        return text
    if kind is bool:
        if text.lower() not in BOOLEANS:
            raise ValueError(f"{key} is {text!r}: expected true or false")
        return BOOLEANS[text.lower()]
    if kind is str:
        return text
    number = _number(text, whole=kind is int)
    if number is None:
        raise ValueError(f"{key} is {text!r}: expected a {'whole ' if kind is int else ''}number")
    least, most = RANGES[key]
    if number < least or (most is not None and number > most):
        raise ValueError(
            f"{key} is {text}: must be at least {least:g}" + ("" if most is None else f", at most {most:g}")
        )
    return number


def _number(text: str, whole: bool) -> float | int | None:
    if whole:
        return int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else None
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def check(config: TrainConfig) -> None:
    """ValueError with everything that the values of a configuration contradict."""
    faults = []
    for run in (config.shares, partial(layer_subset, config.aia_layers)):
        try:
            run()
        except ValueError as error:
            faults.append(str(error))
    if config.lora_rank and "language" in config.freeze:
        faults.append("lora_rank: LoRA trains the language model, which freeze leaves as it is")
    if config.dtype == "bfloat16" and not config.lora_rank and config.learning_rate < 1e-4:
        faults.append(
            f"dtype bfloat16 with learning_rate {config.learning_rate:g}: full fine-tuning would lose updates"
            " that are smaller than a bfloat16 step; use dtype float32 with bf16 true"
        )
    if faults:
        raise ValueError("; ".join(faults))


def read_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """A recipe file with some values replaced.

    Raises:
        ValueError: every fault, one a line, as "file:line: what is wrong".
        OSError: there is no such file.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such recipe (see the folder recipes/)") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start + 1})") from None
    values = parse_recipe(text, str(path))
    try:
        config = TrainConfig(**{**values, **(overrides or {})})
        check(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return config


def parse_recipe(text: str, name: str = "recipe") -> dict[str, Any]:
    """The keys and values of a recipe's text. ValueError as for `read_recipe`."""
    import yaml  # here: the command line needs this module's options, and `doctor` must do without packages

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ValueError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{name}:{root.start_mark.line + 1}: a recipe is lines of `key: value`")
    keys = {str(node.value) for node, _ in root.value}
    if "distributed_type" in keys:
        raise ValueError(f"{name}: is for `accelerate launch --config_file`, not a training recipe")
    if "arms" in keys:
        raise ValueError(f"{name}: is a sweep, not a training recipe: minimal-aia sweep {name}")
    values: dict[str, Any] = {}
    faults = []
    for node, value in root.value:
        where = f"{name}:{node.start_mark.line + 1}"
        try:
            key = _key(node.value)
            if key in values:
                raise ValueError(f"{key} stands twice")
            if not isinstance(value, yaml.ScalarNode):
                raise ValueError(f"{key}: expected one value, not a list or a mapping")
            values[key] = parse_value(key, value.value)
        except ValueError as error:
            faults.append(f"{where}: {error}")
    if faults:
        raise ValueError("\n".join(faults))
    return values


def _key(value: object) -> str:
    key = value if isinstance(value, str) else ""  # the value of a list or a mapping is a list of nodes
    if key not in types():
        hint = nearest(key.strip().strip("-").replace("-", "_").lower(), types())
        raise ValueError(f"unknown key {key!r}{hint or ' (minimal-aia train --help lists all)'}")
    return key


def to_yaml(config: TrainConfig, everything: bool = False) -> str:
    """A recipe's text: the values that are not the default, or everything."""
    import yaml

    plain, mine = asdict(TrainConfig()), asdict(config)
    kept = {key: value for key, value in mine.items() if everything or value != plain[key]}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True) if kept else ""


def add_options(parser: argparse.ArgumentParser) -> None:
    """One option a key, `--max-steps 20` or `--max_steps 20`; only those that are given are in the result."""
    for field in fields(TrainConfig):
        kind = types()[field.name][0]
        choices = get_args(kind) if get_origin(kind) is Literal else ("true", "false") if kind is bool else ()
        default = "none" if field.default in (None, "") else field.default
        options: dict[str, Any] = {
            "dest": field.name,
            "type": partial(_argument, field.name),
            "metavar": "{" + ",".join(choices) + "}" if choices else "X",
            "default": argparse.SUPPRESS,
        }
        dashed = "--" + field.name.replace("_", "-")
        parser.add_argument(
            dashed, help=f"{field.metadata['help']} (default: {default})".replace("%", "%%"), **options
        )
        if "_" in field.name:
            parser.add_argument(f"--{field.name}", help=argparse.SUPPRESS, **options)


def recipe_of(args: argparse.Namespace) -> TrainConfig:
    """The recipe that a command line names, with the options that it gives."""
    return read_recipe(args.recipe, {key: value for key, value in vars(args).items() if key in types()})


def _argument(key: str, text: str) -> Any:
    try:
        return parse_value(key, text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
