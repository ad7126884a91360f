"""Whatever bytes a file holds, its reader gives a result or one error that begins with the file's name."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import wrong_files
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minimal_aia import course
from minimal_aia.data import read_samples
from minimal_aia.evaluation.imported import import_scores
from minimal_aia.evaluation.prompts import read_prompts
from minimal_aia.lab.sweep import read_sweep
from minimal_aia.models.tensor_files import read_json
from minimal_aia.targets import StageTargets
from minimal_aia.train.config import layer_subset
from minimal_aia.train.layout import read_layout
from minimal_aia.train.recipe import read_recipe

DPG = "a.png, 0.5, 1.0, 0.75\nModel: m\nDPG-Bench score: 75.0\n"
LMMS = json.dumps({"results": {"pope": {"acc,none": 0.8}}, "n-samples": {"pope": {"effective": 9}}})
METADATA = '{"tag": "counting", "prompt": "two cats"}\n'
NOTEBOOK = '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
ACCELERATE = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 2\n"
SAMPLE = json.dumps(wrong_files.GENERATION) + "\n"
# name of the file -> a right text of it, and its reader
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "recipe.yaml": (wrong_files.RECIPE, read_recipe),
    "stages.yaml": (wrong_files.STAGES, StageTargets.load),
    "sweep.yaml": (wrong_files.SWEEP, read_sweep),
    "accelerate.yaml": (ACCELERATE, read_layout),
    "samples.jsonl": (SAMPLE, read_samples),
    "samples.json": (f"[{SAMPLE}]", read_samples),
    "geneval.jsonl": (json.dumps(wrong_files.GENEVAL), lambda path: import_scores(path, model="m")),
    "dpg.txt": (DPG, import_scores),
    "lmms.json": (LMMS, lambda path: import_scores(path, model="m")),
    "metadata.jsonl": (METADATA, read_prompts),
    "config.json": ('{"model_type": "janus"}', read_json),
    "notebook.ipynb": (NOTEBOOK, course.read),
}
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
WORDS = st.text(max_size=6) | st.sampled_from(
    "model seed generation first_layer target name results correct conversations prompt cells".split()
)
documents = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=8,
)


@st.composite
def contents(draw: Any, right: str) -> bytes:
    """Any bytes, any document, or the right text with a piece of it replaced."""
    kind = draw(st.sampled_from(["bytes", "document", "change"]))
    if kind == "bytes":
        return draw(st.binary(max_size=60))
    if kind == "document":
        document = draw(documents)
        as_yaml = draw(st.booleans())
        return (yaml.safe_dump(document) if as_yaml else json.dumps(document)).encode(
            "utf-8", "surrogatepass"
        )
    raw = right.encode()
    first = draw(st.integers(0, len(raw)))
    last = draw(st.integers(first, min(len(raw), first + 12)))
    new = draw(
        st.binary(max_size=4) | st.sampled_from([b"[]", b"{}", b"-1", b".nan", b"1e999", b"null", b"*a"])
    )
    return raw[:first] + new + raw[last:]


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_content_is_read_or_is_one_error_that_names_the_file(name, data, tmp_path):
    right, read = READERS[name]
    path = tmp_path / name
    path.write_bytes(data.draw(contents(right)))
    said = fault(read, path)
    assert said.startswith((str(path), "(nothing)"))
    for line in said.splitlines()[1:]:  # several faults: one line each
        assert line.startswith(("  ", str(path)))


def fault(read: Callable[[Any], Any], of: Any) -> str:
    """What a reader says is wrong."""
    try:
        read(of)
    except (ValueError, OSError) as error:
        return str(error)
    return "(nothing)"


@pytest.mark.parametrize("name", READERS)
def test_the_right_content_is_read_with_a_bom_and_windows_newlines_too(name, tmp_path):
    right, read = READERS[name]
    found = []
    for content in (right.encode(), wrong_files.BOM + right.replace("\n", "\r\n").encode()):
        (tmp_path / name).write_bytes(content)
        found.append(repr(read(tmp_path / name)))
    assert found[0] == found[1]


@given(st.text(st.sampled_from("0123456789-, al²٣"), max_size=12))
def test_any_text_names_layers_or_is_one_clear_error(text):
    assert fault(partial(layer_subset, n_layers=30), text).startswith(("aia_layers", "(nothing)"))
