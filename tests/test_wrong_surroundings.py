"""What goes wrong around a command: a full disk, a folder without permission, a user who presses ^C."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import wrong_cases
import wrong_files

from minimal_aia.cli import main
from minimal_aia.paths import DATA


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = wrong_files.make(tmp_path_factory.mktemp("files"))
    rows = [{**wrong_files.GENEVAL, "filename": f"{i}.png", "tag": f"tag {i}"} for i in range(200)]
    (folder / "many.jsonl").write_text("\n".join(map(wrong_files.json.dumps, rows)))
    (folder / "bad.jsonl").write_text("[]\n" * 200)
    (folder / "many.yaml").write_text(wrong_files.DATA_RECIPE.replace("target.jsonl", "bad.jsonl"))
    return folder


@contextmanager
def files_no_longer_than(n: int):
    """Writing fails after n bytes of a file, as on a full disk (EFBIG for ENOSPC), in C++ and Rust too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", wrong_cases.WRITES)
def test_a_full_disk_is_one_line(name, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(files)
    with files_no_longer_than(4096 if name == "check-data" else 100):  # torch shares memory through files
        code = main(wrong_cases.writing(name, str(tmp_path / "out")))
    error = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert code == 2
    assert len(error) == 1
    assert "no space left to write to; free some, or write elsewhere" in error[0]
    whole = [path for path in tmp_path.rglob("*.safetensors") if path.stat().st_size > 100]
    assert not whole


@contextmanager
def nobody():
    """Root may write anywhere: become a user who may not."""
    if os.getuid() != 0:
        yield
        return
    try:
        os.setresuid(65534, 65534, 0)
    except PermissionError:
        pytest.skip("root without the right to become somebody else")
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.parametrize("name", wrong_cases.WRITES)
def test_a_folder_that_may_not_be_written_is_one_line(name, files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    closed = files / "closed"
    closed.mkdir(exist_ok=True)
    closed.chmod(0o555)
    for folder in (files, *files.parents[:2]):  # pytest's are closed to others
        folder.chmod(folder.stat().st_mode | 0o055)
    with nobody():
        code = main(wrong_cases.writing(name, "closed/out"))
    error = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert code == 2
    assert len(error) == 1
    assert "no permission" in error[0]
    assert "closed" in error[0]
    assert not any(closed.iterdir())


def start(argv: list[str], folder: Path, until: str) -> subprocess.Popen:
    """Start a command and wait until its output, stdout and stderr together, matches a pattern."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "minimal_aia.cli", *argv],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    said, end = b"", time.monotonic() + 300
    while not re.search(until, said.decode(errors="replace")):
        time.sleep(0.02)
        said += process.stdout.read() or b""
        assert process.poll() is None, said.decode()
        assert time.monotonic() < end
    os.set_blocking(process.stdout.fileno(), True)
    return process


@pytest.mark.parametrize(("command", "times"), wrong_cases.INTERRUPTED)
def test_a_command_that_is_interrupted_ends_in_one_line_and_keeps_what_is_done(
    command, times, files, tmp_path
):
    if command == "profile":
        samples = [str(DATA / "understanding.jsonl"), "--batch-size", "1"]
        argv = [*wrong_cases.PROFILE.split(), *samples, "--out", str(tmp_path / "out.csv")]
        process = start(argv, files, until=r" ([3-9]|\d\d)/60")
    else:
        process = start(
            ["train", "good.yaml", "--max-steps", "5000", "--output-dir", str(tmp_path)],
            files,
            until=r" 2/5000 ",
        )
    for _ in range(times):
        os.killpg(process.pid, signal.SIGINT)  # the terminal's ^C reaches every process of the group
        time.sleep(0.02)
    said = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 130 or (times > 1 and process.returncode == -signal.SIGINT)
    assert "Traceback" not in said
    assert said.count("interrupted") <= 1
    if command == "profile":  # its rows so far; the same command goes on from there
        (part,) = tmp_path.iterdir()
        assert part.name != "out.csv"
        assert part.read_text().count("\n") >= 3
    elif times == 1:
        assert "SIGINT: saving and stopping after step" in said
        (saved,) = tmp_path.glob("checkpoint-*")
        assert (saved / "manifest.json").is_file()
