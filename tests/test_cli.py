"""The command line: help, exit codes, one-line errors, and what `profile` passes on."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest

import minimal_aia
from minimal_aia.cli import main

PROFILE = ["profile", "--model", "lab/unified", "--task", "generation", "--samples", "s.jsonl"]


def test_version_and_help_name_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert minimal_aia.__version__ in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "doctor" in out
    assert "profile" in out


def test_help_imports_no_heavy_package():
    code = (
        "import sys; from minimal_aia.cli import main\n"
        "try: main(['profile', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "COMMAND"),
        (["nonsense"], "nonsense"),
        (["profile"], "--model"),
        ([*PROFILE, "--task", "both"], "both"),
        ([*PROFILE, "--batch-size", "0"], "less than 1"),
        ([*PROFILE, "--batch-size", "many"], "many"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(argv, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.count("\n") == 1
    assert said in err


def test_a_missing_sample_file_is_one_line_and_exit_code_2(tmp_path, capsys):
    argv = [
        "profile",
        "--model",
        "lab/unified",
        "--task",
        "generation",
        "--samples",
        str(tmp_path / "no.jsonl"),
    ]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("minimal-aia profile: error: ")
    assert "no.jsonl" in err
    assert "Traceback" not in err
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl"):
        main([*argv, "--debug"])


@pytest.mark.parametrize(("error", "said"), [(KeyError("x"), "KeyError: 'x'"), (ValueError(), "ValueError:")])
def test_an_unforeseen_error_says_its_type_and_how_to_see_more(error, said, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setitem(vars(minimal_aia), "read_samples", fail)
    assert main(PROFILE) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "--debug" in err
    assert err.count("\n") == 1


def test_interrupt_is_no_error_message(monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setitem(vars(minimal_aia), "read_samples", interrupt)
    assert main(PROFILE) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


@pytest.fixture
def calls(monkeypatch):
    """Stand-ins for the three functions that `profile` calls; what they were called with."""
    seen: dict[str, tuple] = {}

    class Samples(list):
        n_skipped = 1
        problems = ("s.jsonl:3: no text",)

    result = SimpleNamespace(
        n_samples=2,
        n_layers=1,
        skipped={"s.jsonl:2": "an unknown word"},
        curve=lambda: pd.DataFrame({"layer": [0], "mean": [0.25]}),
    )
    answers = {"read_samples": Samples(["a", "b"]), "load_adapter": "the adapter", "profile": result}
    for name, answer in answers.items():

        def call(*args, _name=name, _answer=answer, **kwargs):
            seen[_name] = (args, kwargs)
            return _answer

        monkeypatch.setitem(vars(minimal_aia), name, call)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return seen


def test_profile_passes_every_option_on(calls, capsys):
    options = [
        "--out",
        "p.csv",
        "--batch-size",
        "4",
        "--family",
        "janus",
        "--device",
        "cpu",
        "--dtype",
        "bfloat16",
    ]
    assert main([*PROFILE, *options, "--skip-bad", "--trust-remote-code"]) == 0
    assert calls["read_samples"] == (("s.jsonl",), {"on_error": "skip"})
    wanted = {"family": "janus", "device": "cpu", "dtype": "bfloat16", "trust_remote_code": True}
    assert calls["load_adapter"] == (("lab/unified",), wanted)
    args, kwargs = calls["profile"]
    assert args == ("the adapter", ["a", "b"], "generation")
    assert kwargs == {"batch_size": 4, "out": "p.csv"}
    out = capsys.readouterr().out
    for said in ("0.2500", "2 samples, 1 layers -> p.csv", "s.jsonl:3: no text", "an unknown word"):
        assert said in out


def test_profile_trusts_no_remote_code_and_skips_nothing_by_default(calls):
    assert main(PROFILE) == 0
    assert calls["load_adapter"][1]["trust_remote_code"] is False
    assert calls["read_samples"][1] == {"on_error": "raise"}
    assert calls["profile"][1] == {"batch_size": 16, "out": None}


def test_the_console_script_is_installed():
    done = subprocess.run(
        [sys.executable, "-m", "minimal_aia.cli", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout == f"minimal-aia {minimal_aia.__version__}\n"
