"""Does this machine have what the course needs? One line a requirement, and the remedy where it fails.

Nothing here may break because a package is missing: that is what it is there to say. So packages are looked
up by their metadata, and imported only inside a check, where every error is caught.
"""

from __future__ import annotations

import platform
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from minimal_aia.paths import DATA, ROOT, how_to_get

CLONE = (ROOT / "pyproject.toml").is_file()  # otherwise the package was installed from a wheel
INSTALL = "make install" if CLONE else 'pip install "minimal-aia[course]"'
MIN_DISK_GB = 2.0  # notebooks, checkpoints and a training run of 04; the environment is there already
MIN_MEMORY_GB = 4.0  # the largest notebook peaks below this on the CPU


@dataclass(frozen=True)
class Check:
    """One line of the report. state: "OK", "FAIL" (with a remedy), or "INFO" for what is nice to know."""

    name: str
    state: Literal["OK", "FAIL", "INFO"]
    detail: str
    remedy: str = ""


def checks(root: Path = ROOT) -> list[Check]:
    """All checks, in the order in which one would repair what fails."""
    groups: dict[str, Callable[[], Iterable[Check]]] = {
        "Python": lambda: python(root),
        "packages": lambda: packages(root),
        "torch computes": torch_works,
        "GPU": device,
        "data_samples": data,
        "disk": lambda: disk(root),
        "memory": memory,
        "Jupyter": jupyter,
    }
    results: list[Check] = []
    for name, group in groups.items():
        try:
            results += group()
        except Exception as error:  # a check that breaks is a finding, not the end of the report
            results.append(Check(name, "FAIL", f"{type(error).__name__}: {error}", INSTALL))
    return results


def report(results: list[Check]) -> str:
    """The checks as text: `[OK]   name: detail`, remedies under what failed, a verdict last."""
    lines = []
    for check in results:
        lines.append(f"{f'[{check.state}]':<7}{check.name}: {check.detail}")
        if check.remedy:
            lines.append(f"       -> {check.remedy}")
    failed = sum(check.state == "FAIL" for check in results)
    ready = "everything is ready: make lab" if CLONE else "everything is ready"
    lines.append(f"{failed} to repair, from the top down" if failed else ready)
    return "\n".join(lines)


def python(root: Path = ROOT) -> Iterator[Check]:
    from packaging.specifiers import SpecifierSet

    pyproject = root / "pyproject.toml"
    if pyproject.is_file():
        wanted = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["requires-python"]
    else:
        wanted = metadata.metadata("minimal-aia")["Requires-Python"]
    version = platform.python_version()
    if SpecifierSet(wanted).contains(version, prereleases=True):
        yield Check("Python", "OK", version)
    else:
        remedy = "install Python 3.11, then: make clean install PYTHON=python3.11"
        yield Check("Python", "FAIL", f"{version} does not fit {wanted}", remedy)


def requirements(root: Path = ROOT) -> list[tuple[str, bool]]:
    """(requirement, needed for the course) by pyproject.toml; without a clone, by the installed package."""
    pyproject = root / "pyproject.toml"
    if pyproject.is_file():
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        groups = {"": project["dependencies"], **project["optional-dependencies"]}
        return [(line, extra in ("", "course")) for extra, lines in groups.items() for line in lines]
    found = [line.partition(";") for line in metadata.requires("minimal-aia") or []]
    return [(line.strip(), "extra" not in marker or "course" in marker) for line, _, marker in found]


def packages(root: Path = ROOT) -> Iterator[Check]:
    """Every package of the library and the course against its range; those of other extras if installed."""
    from packaging.requirements import Requirement

    for line, needed in requirements(root):
        wanted = Requirement(line)
        if wanted.name == "minimal-aia":  # an extra that includes another
            continue
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            if needed:
                yield Check(wanted.name, "FAIL", f"not installed, {wanted} is needed", INSTALL)
            continue
        if wanted.specifier.contains(version, prereleases=True):
            yield Check(wanted.name, "OK", version)
        else:
            remedy = f'pip install "{wanted}", or {INSTALL} in a new .venv'
            yield Check(wanted.name, "FAIL", f"{version} does not fit {wanted}", remedy)


def torch_works() -> Iterator[Check]:
    """A gradient whose value is known, through the attention call that everything here uses."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    q = torch.zeros(1, 1, 2, 4, requires_grad=True)
    v = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])[None, None]
    out = scaled_dot_product_attention(
        q, torch.ones(1, 1, 2, 4), v
    )  # equal keys: every value gets weight 1/2
    out.sum().backward()
    grad = q.grad
    if torch.allclose(out[..., :2], torch.full((1, 1, 2, 2), 0.5)) and grad is not None and not grad.any():
        yield Check(
            "torch computes", "OK", f"attention and its gradient, {torch.get_num_threads()} thread(s)"
        )
    else:
        yield Check(
            "torch computes", "FAIL", f"wrong attention: {out.tolist()}", "reinstall: make clean install"
        )


def device() -> Iterator[Check]:
    """No GPU is needed for the course, so none is no failure."""
    import torch

    if torch.cuda.is_available():
        size = torch.cuda.get_device_properties(0).total_memory / 1e9
        yield Check("GPU", "INFO", f"{torch.cuda.get_device_name(0)}, {size:.0f} GB")
    elif torch.backends.mps.is_available():
        yield Check("GPU", "INFO", "Apple MPS")
    else:
        yield Check("GPU", "INFO", "none: the course runs on the CPU, 7B models do not")


def data(folder: Path = DATA) -> Iterator[Check]:
    """Samples can be read, published curves are there, the lab's checkpoints are complete files."""
    remedy = how_to_get()
    for name in ("generation.jsonl", "understanding.jsonl"):
        path = folder / name
        try:
            from minimal_aia.data import read_samples

            yield Check(f"data_samples/{name}", "OK", f"{len(read_samples(path))} samples")
        except (OSError, ValueError, ImportError) as error:
            detail = str(error).replace(str(folder), "data_samples").splitlines()[0]
            yield Check(f"data_samples/{name}", "FAIL", detail, remedy)
    curves = sorted(folder.glob("published/*.csv"))
    yield Check(
        "data_samples/published",
        "OK" if curves else "FAIL",
        f"{len(curves)} files",
        "" if curves else remedy,
    )
    weights = sorted(folder.glob("checkpoints/**/*.safetensors"))
    broken = [path.relative_to(folder).as_posix() for path in weights if not _complete(path)]
    if weights and not broken:
        size = sum(path.stat().st_size for path in weights) / 1e6
        yield Check("data_samples/checkpoints", "OK", f"{len(weights)} weight files, {size:.1f} MB")
    else:
        detail = f"damaged: {', '.join(broken)}" if broken else "no weight files"
        yield Check("data_samples/checkpoints", "FAIL", detail, remedy)


def _complete(path: Path) -> bool:
    """A safetensors file begins with the length of its header and reads to its last tensor."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as tensors:
            return len(tensors.keys()) > 0
    except (SafetensorError, OSError):
        return False


def disk(root: Path = ROOT) -> Iterator[Check]:
    free = shutil.disk_usage(root).free / 1e9
    if free >= MIN_DISK_GB:
        yield Check("disk", "OK", f"{free:.0f} GB free")
    else:
        yield Check("disk", "FAIL", f"{free:.1f} GB free", f"free {MIN_DISK_GB:.0f} GB where the clone lies")


def memory() -> Iterator[Check]:
    import psutil

    free = psutil.virtual_memory().available / 1e9
    if free >= MIN_MEMORY_GB:
        yield Check("memory", "OK", f"{free:.0f} GB available")
    else:
        yield Check(
            "memory",
            "FAIL",
            f"{free:.1f} GB available",
            f"close programs until {MIN_MEMORY_GB:.0f} GB are free",
        )


def jupyter() -> Iterator[Check]:
    """The kernel that notebooks name starts this Python; JupyterLab finds the front end of the widgets."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
    from jupyter_core.paths import jupyter_path

    remedy = f"{sys.executable} -m ipykernel install --sys-prefix"
    try:
        command = KernelSpecManager().get_kernel_spec("python3").argv[0]
        # A bare "python" is replaced by the running one when the kernel starts.
        ours = not Path(command).is_absolute() or Path(command).samefile(sys.executable)
        detail = "python3 starts this Python" if ours else f"python3 starts {command}, not this Python"
        yield Check("Jupyter kernel", "OK" if ours else "FAIL", detail, "" if ours else remedy)
    except (NoSuchKernel, OSError) as error:
        yield Check("Jupyter kernel", "FAIL", str(error), remedy)
    front_ends = jupyter_path("labextensions", "@jupyter-widgets", "jupyterlab-manager", "package.json")
    if any(Path(path).is_file() for path in front_ends):
        yield Check("widgets in JupyterLab", "OK", "front end installed")
    else:
        yield Check(
            "widgets in JupyterLab",
            "FAIL",
            "no front end",
            "pip install --force-reinstall jupyterlab_widgets",
        )
