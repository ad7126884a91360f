"""The command line: help, exit codes, one-line errors. What `profile` does is in test_profile_cli.py."""

from __future__ import annotations

import signal
import subprocess
import sys

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
        ([*PROFILE, "--batch-size", "0"], "from 1 on"),
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
    before = signal.getsignal(signal.SIGINT)
    try:
        assert main(PROFILE) == 130
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # a second ^C needs no message of its own
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_the_console_script_is_installed():
    done = subprocess.run(
        [sys.executable, "-m", "minimal_aia.cli", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout == f"minimal-aia {minimal_aia.__version__}\n"
