"""`minimal-aia doctor`: right on this machine, and each kind of trouble is found and comes with a remedy."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minimal_aia import doctor
from minimal_aia.cli import main


def one(checks, name):
    found = [check for check in checks if check.name == name]
    assert len(found) == 1, f"{name} is reported {len(found)} times"
    return found[0]


def clone(tmp_path, dependencies, extras="", requires_python=">=3.11"):
    """A folder with nothing but a pyproject.toml."""
    text = f'[project]\nname = "x"\nrequires-python = "{requires_python}"\ndependencies = {dependencies!r}\n'
    (tmp_path / "pyproject.toml").write_text(f"{text}[project.optional-dependencies]\n{extras}")
    return tmp_path


def test_python_and_packages_of_this_environment_fit():
    for check in [*doctor.python(), *doctor.packages()]:
        assert check.state == "OK", f"{check.name}: {check.detail}"


@pytest.mark.parametrize(("wanted", "state"), [(">=3.11", "OK"), (">=3.99", "FAIL"), ("<3", "FAIL")])
def test_python_is_held_against_the_range(tmp_path, wanted, state):
    (check,) = doctor.python(clone(tmp_path, [], requires_python=wanted))
    assert check.state == state
    assert bool(check.remedy) == (state == "FAIL")


def test_packages_missing_too_old_or_optional(tmp_path):
    extras = 'course = ["no-such-course-package"]\ndev = ["x[course]", "no-such-dev-package"]\n'
    root = clone(tmp_path, ["no-such-package>=2", "torch>=999", "numpy<1,>=0", "pillow"], extras)
    extras_fixed = (root / "pyproject.toml").read_text().replace("x[course]", "minimal-aia[course]")
    (root / "pyproject.toml").write_text(extras_fixed)
    found = list(doctor.packages(root))
    assert [(check.name, check.state) for check in found] == [
        ("no-such-package", "FAIL"),
        ("torch", "FAIL"),
        ("numpy", "FAIL"),
        ("pillow", "OK"),
        ("no-such-course-package", "FAIL"),
    ]
    assert one(found, "no-such-package").remedy == "make install"
    assert "torch>=999" in one(found, "torch").remedy
    assert metadata.version("torch") in one(found, "torch").detail


def test_without_a_clone_the_installed_package_tells_the_ranges(tmp_path):
    by_metadata = doctor.requirements(tmp_path)
    by_pyproject = doctor.requirements()

    def normal(rows):
        return {
            (re.split(r"[<>=\[ ]", line)[0], needed) for line, needed in rows if "minimal-aia" not in line
        }

    assert normal(by_metadata) == normal(by_pyproject)
    (check,) = doctor.python(tmp_path)
    assert check.state == "OK"


def test_torch_computes_here_and_wrong_numbers_are_seen(monkeypatch):
    (check,) = doctor.torch_works()
    assert check.state == "OK"
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v: v + 0 * q)
    (check,) = doctor.torch_works()
    assert check.state == "FAIL"


def test_no_gpu_is_no_failure():
    (check,) = doctor.device()
    assert check.state == "INFO"


def test_an_empty_clone_lacks_all_data(tmp_path):
    found = list(doctor.data(tmp_path / "data_samples"))
    assert [check.state for check in found] == ["FAIL"] * 4
    assert all(check.remedy for check in found)
    assert not any(str(tmp_path) in check.detail for check in found)


def test_checkpoints_must_be_whole_files(tmp_path):
    folder = tmp_path / "data_samples/checkpoints/unified"
    folder.mkdir(parents=True)
    save_file({"w": torch.zeros(64, 64)}, folder / "model.safetensors")
    name = "data_samples/checkpoints"
    assert one(doctor.data(tmp_path / "data_samples"), name).state == "OK"
    whole = (folder / "model.safetensors").read_bytes()
    for damaged in (whole[:-1], whole[:4], b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0"):
        (folder / "model.safetensors").write_bytes(damaged)
        check = one(doctor.data(tmp_path / "data_samples"), name)
        assert check.state == "FAIL"
        assert "checkpoints/unified/model.safetensors" in check.detail


def test_little_disk_and_memory_fail(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(0, 0, 5e8))
    (check,) = doctor.disk()
    assert (check.state, check.detail) == ("FAIL", "0.5 GB free")
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: namedtuple("m", "available")(1e9))
    (check,) = doctor.memory()
    assert (check.state, check.detail) == ("FAIL", "1.0 GB available")


def test_kernel_and_widgets_of_this_environment():
    assert [check.state for check in doctor.jupyter()] == ["OK", "OK"]


def test_a_kernel_of_another_python_and_no_front_end_fail(monkeypatch, tmp_path):
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager

    other = tmp_path / "python"
    other.write_text("")
    monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", lambda *a: KernelSpec(argv=[str(other)]))
    monkeypatch.setattr("jupyter_core.paths.jupyter_path", lambda *parts: [str(tmp_path.joinpath(*parts))])
    kernel, widgets = doctor.jupyter()
    assert kernel.state == "FAIL"
    assert "ipykernel install" in kernel.remedy
    assert widgets.state == "FAIL"


def test_a_check_that_breaks_is_reported_and_the_others_still_run(monkeypatch):
    def broken():
        raise RuntimeError("no driver")

    monkeypatch.setattr(doctor, "torch_works", broken)
    found = doctor.checks()
    check = one(found, "torch computes")
    assert (check.state, check.detail) == ("FAIL", "RuntimeError: no driver")
    assert one(found, "Jupyter kernel").state == "OK"


def test_report_and_exit_code(monkeypatch, capsys):
    good = doctor.Check("disk", "OK", "9 GB free")
    bad = doctor.Check("torch", "FAIL", "not installed", "make install")
    monkeypatch.setattr(doctor, "checks", lambda: [good])
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == "[OK]   disk: 9 GB free\neverything is ready: make lab\n"
    monkeypatch.setattr(doctor, "checks", lambda: [bad, good])
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "[FAIL] torch: not installed",
        "       -> make install",
        "[OK]   disk: 9 GB free",
        "1 to repair, from the top down",
    ]


def test_doctor_runs_where_nothing_is_installed():
    """-S hides site-packages: a Python with the standard library only, as before `make install`."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "minimal_aia.cli", "doctor"],
        capture_output=True,
        text=True,
        cwd=Path(doctor.__file__).parents[1],
        env={"PATH": ""},
    )
    assert done.returncode == 1, done.stderr
    assert "[FAIL] torch computes: ModuleNotFoundError" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
