"""Imports point one way: the tensor core knows nothing of models, those nothing of training or widgets."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import minimal_aia

PACKAGE = Path(minimal_aia.__file__).parent
CORE = ("intensity", "record", "segments", "targets", "capture", "loss", "stats")


def modules() -> dict[str, ast.Module]:
    """Dotted name below the package -> syntax tree."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(name: str, tree: ast.Module, known: set[str]) -> set[str]:
    """Modules of the package that loading this one loads."""
    found = set()
    for node in tree.body:  # top level only: neither functions nor `if TYPE_CHECKING`
        if not isinstance(node, ast.ImportFrom | ast.Import):
            continue
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            base = "minimal_aia" if node.level else node.module or ""
            if node.level and node.module:
                parent = name.rsplit(".", 1)[0] if "." in name else ""
                base = ".".join(
                    part for part in ("minimal_aia", parent if node.level == 1 else "", node.module) if part
                )
            targets = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for target in targets:
            short = target.removeprefix("minimal_aia.")
            if target.startswith("minimal_aia.") and short in known and short != name:
                found.add(short)
    return found


TREES = modules()
GRAPH = {name: imports(name, tree, set(TREES)) for name, tree in TREES.items() if name}


def test_no_module_needs_itself():
    order = list(TopologicalSorter(GRAPH).static_order())  # raises CycleError
    assert order.index("intensity") < order.index("capture") < order.index("lab.finetune")


def test_the_core_needs_torch_numpy_and_yaml_only():
    allowed = {"torch", "numpy", "yaml", "minimal_aia"}
    import sys

    for name in CORE[:-1]:
        for node in TREES[name].body:
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            for module in modules:
                top = module.split(".")[0]
                assert top in allowed or top in sys.stdlib_module_names, f"{name} imports {module}"


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_the_core_only(name):
    assert GRAPH[name] <= set(CORE)


@pytest.mark.parametrize("room", ["models", "train", "lab", "evaluation"])
def test_rooms_do_not_reach_up(room):
    above = {"evaluation", "exercises", "cli", "widgets", "course", "doctor"} - {room}
    if room == "models":
        above |= {"train", "lab"}
    if room == "train":
        above |= {"lab"}
    for name, needs in GRAPH.items():
        if name.split(".")[0] == room and not name.endswith("command"):
            reached = {other for other in needs if other.split(".")[0] in above}
            assert not reached, f"{name} imports {sorted(reached)}"
