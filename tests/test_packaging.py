"""pyproject.toml, requirements.lock, environment.yml, Makefile and the public names say the same thing."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import minimal_aia

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
LINES = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
LOCK = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in LINES}
EXTRAS = PROJECT["optional-dependencies"]
DIRECT = [
    Requirement(line)
    for group in (
        PYPROJECT["build-system"]["requires"],
        PROJECT["dependencies"],
        *(EXTRAS[name] for name in EXTRAS if name not in ("browser", "docs", "eval")),
    )
    for line in group
    if not line.startswith("minimal-aia")
]


def _pins(file: str) -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}


BROWSER = _pins("tests/browser/requirements.txt")  # `make test-browser` alone installs these
EVAL = _pins(
    "tests/evaluation/requirements.txt"
)  # and `make test-eval` these, without what else they ask for
DOCS = _pins("docs/requirements.txt")  # and `make docs` and `make dist` these
NOT_WRITTEN = [
    module
    for override in PYPROJECT["tool"]["mypy"]["overrides"]
    for module in override["module"]
    if module.startswith("minimal_aia.")
]
# A CUDA build of torch brings these along; the lock is of the CPU build.
CUDA = re.compile(r"nvidia-|cuda-|triton")


# --- the lock -----------------------------------------------------------------------------------------------


def test_lock_pins_every_line_exactly_and_names_no_index():
    for line in LINES:
        # A name and a release: no URL, no local version (+cpu), no option.
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line), line
    assert len(LOCK) == len(LINES), "a package is pinned twice"
    assert sorted(LINES, key=str.casefold) == LINES
    assert LOCK["torch"] == "2.13.0"


@pytest.mark.parametrize("wanted", DIRECT, ids=str)
def test_every_requirement_is_pinned_within_its_range(wanted):
    assert wanted.specifier.contains(LOCK[canonicalize_name(wanted.name)])


def test_lock_is_what_is_installed():
    """Stored outputs and this test run come from the same versions (+cpu is the same release)."""
    differ = {n: metadata.version(n) for n in LOCK if Version(metadata.version(n)).public != LOCK[n]}
    assert not differ, f"installed differs from requirements.lock: {differ}"


def test_every_pin_installs_on_the_first_python_that_we_promise():
    """A later 3.11 hides it: Debian 12 has 3.11.2, and pip there refuses what asks for 3.11.5."""
    for name in LOCK:
        asked = metadata.metadata(name)["Requires-Python"] or ""
        assert SpecifierSet(asked).contains("3.11.0"), f"{name} {LOCK[name]} needs Python {asked}"


def _needs(name: str, extras: frozenset[str] = frozenset()) -> list[Requirement]:
    """What an installed package requires here."""
    wanted = [Requirement(line) for line in metadata.requires(name) or []]
    return [
        r
        for r in wanted
        if not CUDA.match(r.name)
        and (r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in ("", *extras)))
    ]


def test_lock_is_complete_without_strays_and_consistent():
    """Requirements followed from pyproject.toml down reach exactly the pinned packages, all in range."""
    seen: set[tuple[str, frozenset[str]]] = set()
    queue = [(r, "pyproject.toml") for r in DIRECT]
    while queue:
        wanted, by = queue.pop()
        name, extras = canonicalize_name(wanted.name), frozenset(wanted.extras)
        assert name in LOCK, f"{by} needs {wanted}, which requirements.lock lacks"
        fits = wanted.specifier.contains(LOCK[name], prereleases=True)
        assert fits, f"{by} needs {wanted}, requirements.lock has {LOCK[name]}"
        if (name, extras) not in seen:
            seen.add((name, extras))
            queue += [(r, name) for r in _needs(name, extras)]
    assert {name for name, _ in seen} == set(LOCK)


def test_browser_pins_add_to_the_lock_what_the_extra_needs():
    assert not set(BROWSER) & set(LOCK), "pinned twice"
    for wanted in map(Requirement, EXTRAS["browser"]):
        assert wanted.specifier.contains(BROWSER[canonicalize_name(wanted.name)])
    if find_spec("playwright") is None:
        pytest.skip("playwright is not installed: what it needs is not known here")
    assert {name: metadata.version(name) for name in BROWSER} == BROWSER
    reached = {canonicalize_name(wanted.name) for wanted in map(Requirement, EXTRAS["browser"])}
    for name in BROWSER:
        for wanted in _needs(name):
            version = (LOCK | BROWSER)[canonicalize_name(wanted.name)]
            assert wanted.specifier.contains(version), f"{name} needs {wanted}, pinned is {version}"
            reached.add(canonicalize_name(wanted.name))
    assert set(BROWSER) <= reached, "a pin that nobody needs"


def test_eval_pins_add_the_extra_to_the_lock_without_torchvision():
    assert not set(EVAL) & set(LOCK), "pinned twice"
    for wanted in map(Requirement, EXTRAS["eval"]):
        assert wanted.specifier.contains(EVAL[canonicalize_name(wanted.name)])
    assert "torchvision" not in EVAL
    if find_spec("lmms_eval") is None:
        pytest.skip("lmms-eval is not installed: what it needs is not known here")
    assert {name: metadata.version(name) for name in EVAL} == EVAL
    for name in EVAL:
        for wanted in _needs(name):
            pinned = (LOCK | EVAL).get(canonicalize_name(wanted.name))
            # lmms-eval's own list is why --no-deps is there; all others get what they need.
            assert (pinned and wanted.specifier.contains(pinned)) or name == "lmms-eval", f"{name}: {wanted}"


def test_docs_pins_add_to_the_lock_what_the_extra_needs():
    assert not set(DOCS) & set(LOCK), "pinned twice"
    if find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: what it needs is not known here")
    assert {name: metadata.version(name) for name in DOCS} == DOCS
    reached: set[str] = set()
    queue = [(wanted, "the extra docs") for wanted in map(Requirement, EXTRAS["docs"])]
    while queue:
        wanted, by = queue.pop()
        name, pins = canonicalize_name(wanted.name), LOCK | DOCS
        assert name in pins, f"{by} needs {wanted}, which is not pinned"
        assert wanted.specifier.contains(pins[name]), f"{by} needs {wanted}, pinned is {pins[name]}"
        if name in DOCS and (name not in reached or wanted.extras):
            queue += [(need, name) for need in _needs(name, frozenset(wanted.extras))]
        reached.add(name)
    assert set(DOCS) <= reached, "a pin that nobody needs"


# --- conda, make, CI ----------------------------------------------------------------------------------------


def test_conda_installs_the_same_lock_through_pip():
    env = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert env["name"] == PROJECT["name"]
    *plain, pip = env["dependencies"]
    assert plain == ["python=3.11", "pip"]  # every other version comes from the lock
    assert pip == {"pip": ["-r requirements.lock", "-e ."]}
    assert PROJECT["requires-python"] == ">=3.11"
    assert sys.version_info[:2] == (3, 11) or Version(sys.version.split()[0]) > Version("3.11")


def make(*args: str) -> str:
    """What make would run."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    # Under `make test`, make's own variables would reach this one.
    env = {
        key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "ARGS", "PORT")
    }
    done = subprocess.run(["make", "-n", "-B", *args], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_lab_opens_notebook_00_and_passes_port_and_args_through():
    plan = make("lab", "PORT=8899", "ARGS=--no-browser")
    assert "--port 8899" in plan
    assert "--no-browser" in plan
    assert "notebooks/00_start_here.ipynb" in plan
    assert ("--allow-root" in plan) == (os.geteuid() == 0)
    assert "--port 8888" in make("lab")


def test_make_installs_torch_first_then_the_lock_then_the_package_alone():
    plan = make("install")
    steps = [
        plan.index(step)
        for step in ("grep '^torch==' requirements.lock", "-r requirements.lock", "--no-deps")
    ]
    assert steps == sorted(steps)


def test_make_test_and_ci_run_everything():
    plan = make("test")
    for tool in ("ruff check", "ruff format --check", "mypy minimal_aia", "pytest -q -n 2"):
        assert tool in plan
    assert re.search(r"^make test$", (ROOT / ".ci/run").read_text(), re.MULTILINE)


def test_the_workflow_has_a_job_for_every_part_and_every_notebook():
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["make"]
    assert job["steps"][-1] == {"run": "make ${{ matrix.target }}"}
    targets = job["strategy"]["matrix"]["target"]
    named = {
        target for words in targets for target in re.findall(r"(?:^| )([a-z][a-z0-9-]*)(?![\w=/.])", words)
    }
    assert {"lint", "types", "unit", "test-eval", "test-zero3", "test-browser", "docs", "dist"} <= named
    for target in targets:  # each is something that make knows
        subprocess.run(["sh", "-c", f"make -n {target}"], cwd=ROOT, check=True, capture_output=True)
    stored = {path.name for path in ROOT.glob("notebooks/*.ipynb")}
    assert {Path(t.split("/")[-1]).name for t in targets if "nbval" in t and "*" not in t} == stored


def test_only_make_test_browser_needs_a_browser(tmp_path):
    assert "tests/browser" not in make("test", "unit")
    plan = make("test-browser")
    assert "-r tests/browser/requirements.txt" in plan
    assert "pytest -q tests/browser" in plan
    assert re.search(r"^ *make test-browser$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    shutil.copy(
        ROOT / "pyproject.toml", tmp_path
    )  # our settings over a small tree: collecting ours takes long
    (tmp_path / "tests/browser").mkdir(parents=True)
    for name in ("test_here.py", "browser/test_there.py"):
        (tmp_path / "tests" / name).write_text("def test_nothing(): pass\n")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    for arguments, found in (
        ((), "test_here"),
        (("tests",), "test_here"),
        (("tests/browser",), "test_there"),
    ):
        done = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert re.findall(r"(test_\w+)\.py::test_nothing", done.stdout) == [found], done.stdout


def test_only_make_test_eval_needs_lmms_eval():
    assert "tests/evaluation/requirements.txt" not in make("test", "unit")
    plan = make("test-eval")
    assert "--no-deps -r tests/evaluation/requirements.txt" in plan
    assert "pytest -q tests/evaluation/test_understanding.py" in plan
    assert re.search(r"^ *make test-eval$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert PROJECT["entry-points"] == {
        "lmms_eval.models": {"minimal_aia": "minimal_aia.evaluation.understanding:manifest"}
    }


def test_only_make_test_zero3_needs_deepspeed():
    assert "tests/distributed/requirements.txt" not in make("test", "unit")
    plan = make("test-zero3")
    assert re.search(
        r"--no-deps --no-build-isolation\s.*-r tests/distributed/requirements.txt", plan, re.DOTALL
    )
    assert "pytest -q tests/distributed/test_zero3.py" in plan
    assert re.search(r"^ *make test-zero3$", (ROOT / ".ci/run").read_text(), re.MULTILINE)


def test_docs_and_dist_have_an_environment_of_their_own():
    assert "docs/requirements.txt" not in make("test", "unit")
    for target, command in (
        ("docs", "mkdocs build --strict"),
        ("dist", "python -m build --no-isolation"),
    ):
        plan = make(target)
        assert plan.index("-r docs/requirements.txt") < plan.index(command)
    # --quiet drops the warnings that --strict counts
    assert not re.search("mkdocs build.*(-q|--quiet)", make("docs"))


def test_wheel_holds_code_and_its_data_only(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(
        ROOT / "minimal_aia", source / "minimal_aia", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for stray in ("tests", "data_samples", "notebooks"):
        (source / stray).mkdir()
        (source / stray / "stray.py").touch()
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        source,
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert "minimal_aia/py.typed" in names
    assert "minimal_aia/lab/__init__.py" in names
    assert "minimal_aia/lab/model_card.md" in names  # minimal_aia.lab.release reads it
    names.remove("minimal_aia/lab/model_card.md")
    assert all(re.fullmatch(r"minimal_aia/[\w/]+\.(py|typed)", name) for name in names)


# --- the public names ---------------------------------------------------------------------------------------


def test_version_is_told_once():
    assert minimal_aia.__version__ == PROJECT["version"] == metadata.version("minimal-aia")
    assert PROJECT["scripts"] == {"minimal-aia": "minimal_aia.cli:main"}


def test_names_for_type_checkers_are_the_lazy_ones():
    tree = ast.parse((ROOT / "minimal_aia/__init__.py").read_text())
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == minimal_aia._WHERE
    assert set(minimal_aia.__all__) == set(minimal_aia._WHERE)
    assert set(minimal_aia.__all__) <= set(dir(minimal_aia))


@pytest.mark.parametrize("name", minimal_aia.__all__)
def test_every_public_name_resolves_and_stays_itself(name):
    module = f"minimal_aia.{minimal_aia._WHERE[name]}"
    if module in NOT_WRITTEN and find_spec(module) is None:
        with pytest.raises(ModuleNotFoundError, match=module):
            getattr(minimal_aia, name)
        pytest.xfail(f"{module} is not written yet")
    assert module not in NOT_WRITTEN, f"{module} is here: take it out of pyproject.toml's mypy override"
    held = getattr(import_module(module), name)
    # Importing a module called like the name (capture, published) must not put the module in its place.
    assert getattr(minimal_aia, name) is held
    assert callable(held)


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(minimal_aia, "no_such_name")
    with pytest.raises(AttributeError, match="no_such_name"):
        minimal_aia.no_such_name  # noqa: B018


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import minimal_aia; dir(minimal_aia)", "torch transformers matplotlib pandas seaborn ipywidgets"),
        ("import minimal_aia as aia; aia.intensity_from_attention", "transformers matplotlib pandas"),
        ("import minimal_aia as aia; aia.StageTargets, aia.AIALoss", "transformers matplotlib pandas"),
    ],
)
def test_importing_is_light(code, heavy):
    code = f"{code}\nimport sys; print(sorted(set({heavy!r}.split()) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def _imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def test_every_import_of_the_package_is_declared():
    """A package that is here only because another one needs it may be gone tomorrow."""
    groups = [PROJECT["dependencies"], *(EXTRAS[name] for name in ("course", "diffusers", "train", "eval"))]
    declared = {canonicalize_name(Requirement(line).name) for group in groups for line in group}
    providers = metadata.packages_distributions()
    for path in sorted((ROOT / "minimal_aia").rglob("*.py")):
        for module in _imported(path) - sys.stdlib_module_names - {"minimal_aia"}:
            names = {canonicalize_name(name) for name in providers.get(module, [module])}
            assert names & declared, (
                f"{path.relative_to(ROOT)} imports {module}: declare it in pyproject.toml"
            )
