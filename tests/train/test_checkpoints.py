"""Checkpoints: every way of breaking one is found and named, and nothing ever costs the last good one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minimal_aia.train import checkpoints as ck

FILES = {"model.safetensors": b"w" * 5000, "optimizer/__0_0.distcp": bytes(range(256)) * 9, ".metadata": b"m"}


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk():
    """Tens of thousands of real fsyncs take minutes; one test checks that they are made, and in order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def write(output_dir, step, files=FILES, **facts):
    """A sealed and published checkpoint."""
    staged = output_dir / ck.STAGING / f"checkpoint-{step}"
    for name, content in files.items():
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).write_bytes(content)
    ck.seal(staged, step=step, **facts)
    ck.publish(staged, output_dir / staged.name)
    return output_dir / staged.name


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints 5, 10 and 100: numbers sort, names would not."""
    for step in (5, 10, 100):
        write(tmp_path, step)
    return tmp_path


def flip(path, position, bit=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(bytes(content))


def test_the_manifest_holds_what_standard_tools_compute(tmp_path):
    folder = write(tmp_path, 3, world_size=2)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 3
    assert manifest["world_size"] == 2
    assert set(manifest["files"]) == set(FILES)
    for name, content in FILES.items():
        assert manifest["files"][name] == {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    assert ck.problems(folder) == []
    if shutil.which("sha256sum"):
        lines = "".join(f"{entry['sha256']}  {name}\n" for name, entry in manifest["files"].items())
        subprocess.run(["sha256sum", "--check", "--quiet"], cwd=folder, input=lines.encode(), check=True)


def test_a_run_without_checkpoints_has_none_and_that_is_no_error(tmp_path):
    assert ck.last_good(tmp_path) is None
    assert ck.last_good(tmp_path / "absent") is None
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert ck.last_good(tmp_path) is None


def test_the_newest_is_used_by_number(run, capsys):
    assert ck.last_good(run) == run / "checkpoint-100"
    assert capsys.readouterr().out == ""


def truncate(folder):
    os.truncate(folder / "model.safetensors", 4999)


def truncate_manifest(folder):
    os.truncate(folder / "manifest.json", 40)


def change_manifest(folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"bytes": 5000', '"bytes": "5000"'))


BREAKAGES = {
    "truncated": (truncate, r"model\.safetensors has 4999 bytes instead of 5000"),
    "flipped bit": (lambda f: flip(f / "optimizer/__0_0.distcp", 77), "other bytes than were written"),
    "lost file": (lambda f: (f / ".metadata").unlink(), r"\.metadata is missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"manifest\.json is missing \(half-written"),
    "half a manifest": (truncate_manifest, r"manifest\.json cannot be read"),
    "changed manifest": (change_manifest, r"manifest\.json cannot be read"),
    "empty folder": (lambda f: [shutil.rmtree(f), f.mkdir()], r"manifest\.json is missing"),
}


@pytest.mark.parametrize("kind", BREAKAGES)
def test_a_broken_checkpoint_is_named_and_the_one_before_is_used(kind, run):
    damage, why = BREAKAGES[kind]
    damage(run / "checkpoint-100")
    heard: list[str] = []
    assert ck.last_good(run, say=heard.append) == run / "checkpoint-10"
    assert len(heard) == 1
    assert heard[0].startswith(f"{run / 'checkpoint-100'} is broken: ")
    assert heard[0].endswith("; using checkpoint-10 instead")
    assert re.search(why, heard[0])


def test_two_broken_ones_are_both_named(run):
    truncate(run / "checkpoint-100")
    flip(run / "checkpoint-10" / "model.safetensors", 0)
    heard: list[str] = []
    assert ck.last_good(run, say=heard.append) == run / "checkpoint-5"
    assert ["checkpoint-100 is" in heard[0], "checkpoint-10 is" in heard[1]] == [True, True]


def test_when_all_are_broken_the_run_does_not_start_over(run):
    for checkpoint in ck.checkpoints(run):
        truncate(checkpoint)
    with pytest.raises(OSError, match=r"no checkpoint in .* is whole: .*checkpoint-5 is broken.*delete"):
        ck.last_good(run)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_flipped_bit_in_any_file_is_found(tmp_path_factory, data):
    run = tmp_path_factory.mktemp("run")
    folder = write(run, 1)
    name = data.draw(st.sampled_from(sorted(FILES)))
    position = data.draw(st.integers(0, len(FILES[name]) - 1))
    flip(folder / name, position, data.draw(st.integers(0, 7)))
    assert ck.problems(folder) == [f"{name} has other bytes than were written (SHA-256 differs)"]


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(0, 7))
def test_a_flipped_bit_in_the_manifest_never_makes_a_broken_checkpoint_good(tmp_path_factory, where, bit):
    folder = write(tmp_path_factory.mktemp("run"), 1)
    truncate(folder)
    flip(folder / "manifest.json", where % (folder / "manifest.json").stat().st_size, bit)
    assert ck.problems(folder)


def test_sizes_alone_find_what_is_half_written_but_no_flipped_bit(tmp_path):
    folder = tmp_path / ck.STAGING / "checkpoint-2"
    folder.mkdir(parents=True)
    (folder / "a").write_bytes(b"abc")
    ck.seal(folder)
    flip(folder / "a", 1)
    assert ck.problems(folder, hashes=False) == []
    os.truncate(folder / "a", 2)
    assert ck.problems(folder, hashes=False) == ["a has 2 bytes instead of 3"]


# --- writing ------------------------------------------------------------------------------------------------


def test_a_folder_gets_its_name_only_when_it_is_sealed(tmp_path):
    staged = tmp_path / ck.STAGING / "checkpoint-1"
    staged.mkdir(parents=True)
    (staged / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="not sealed"):
        ck.publish(staged, tmp_path / "checkpoint-1")
    assert ck.last_good(tmp_path) is None
    ck.clear_staging(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_all_bytes_are_on_the_disk_before_the_name_is_given(tmp_path, monkeypatch):
    """A power cut after the rename must not find empty files: files, manifest and folders first."""
    events: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: events.append(os.readlink(f"/proc/self/fd/{handle}")))
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda *paths: [events.append("rename"), rename(*paths)])
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc to ask which file was synchronised")
    write(tmp_path, 4)
    staged = tmp_path / ck.STAGING / "checkpoint-4"
    before = events[: events.index("rename")]
    for name in (*FILES, ".manifest.json", "optimizer", ""):  # the manifest is written aside, then named
        assert str(staged / name) in before, name
    assert events[-1] == str(tmp_path)  # and then the name itself


def test_a_broken_checkpoint_is_replaced_when_the_run_comes_by_again(run):
    truncate(run / "checkpoint-100")
    (run / "checkpoint-100" / "left over").write_text("x")
    write(run, 100)
    assert ck.problems(run / "checkpoint-100") == []
    assert not (run / "checkpoint-100" / "left over").exists()


def test_a_name_without_a_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="checkpoint-N"):
        ck.step_of(tmp_path / "checkpoint-last")


# --- retention ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "left"), [(1, [100]), (2, [10, 100]), (9, [5, 10, 100])])
def test_the_newest_are_kept(run, limit, left):
    gone = ck.retain(run, limit)
    assert [ck.step_of(path) for path in ck.checkpoints(run)] == left
    assert sorted(map(ck.step_of, gone)) == sorted({5, 10, 100} - set(left))


@pytest.mark.parametrize("limit", [None, 0, -1])
def test_without_a_limit_all_are_kept(run, limit):
    assert ck.retain(run, limit) == []
    assert len(ck.checkpoints(run)) == 3


@pytest.mark.parametrize("kind", BREAKAGES)
@pytest.mark.parametrize("limit", [1, 2])
def test_retention_never_removes_the_last_good_one(kind, limit, run):
    for step in (10, 100):
        BREAKAGES[kind][0](run / f"checkpoint-{step}")
    ck.retain(run, limit)
    assert ck.last_good(run, say=lambda line: None) == run / "checkpoint-5"


def test_broken_ones_do_not_count_and_go_when_they_are_old(run):
    truncate(run / "checkpoint-10")
    ck.retain(run, 2, sealed=run / "checkpoint-100")
    assert [path.name for path in ck.checkpoints(run)] == ["checkpoint-5", "checkpoint-100"]


def test_nothing_goes_when_nothing_is_good(run):
    for checkpoint in ck.checkpoints(run):
        truncate(checkpoint)
    assert ck.retain(run, 1) == []


@pytest.mark.parametrize("stop_at", range(8))
def test_a_kill_during_retention_leaves_no_half_checkpoint(stop_at, run, monkeypatch):
    """Deleting stops after `stop_at` file-system operations, wherever that is."""
    left = [stop_at]

    class Killed(BaseException):
        pass

    def limited(operation):
        def call(*args, **kwargs):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return operation(*args, **kwargs)

        return call

    for name in ("unlink", "rmdir", "rename", "mkdir"):
        monkeypatch.setattr(os, name, limited(getattr(os, name)))
    with contextlib.suppress(Killed):
        ck.retain(run, 1)
    monkeypatch.undo()
    for checkpoint in ck.checkpoints(run):
        assert ck.problems(checkpoint) == [], checkpoint
    assert ck.last_good(run) == run / "checkpoint-100"


# --- a full disk --------------------------------------------------------------------------------------------


def test_every_writers_way_of_saying_that_the_disk_is_full():
    assert ck.is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
    assert ck.is_disk_full(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"))
    behind = RuntimeError("checkpoint failed")
    behind.__cause__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert ck.is_disk_full(behind)
    assert not ck.is_disk_full(OSError(errno.EACCES, "Permission denied"))
    assert not ck.is_disk_full(RuntimeError("shapes differ"))
