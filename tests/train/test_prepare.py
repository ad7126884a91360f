"""Image codes on disk: the same training as from pictures, whole after any kill, never used when damaged."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from data_fakes import entries, write_lines, write_pictures
from real_models import checkpoint
from safetensors.numpy import load_file

from minimal_aia.data import SampleError
from minimal_aia.models import load_adapter
from minimal_aia.pictures import PictureCodes
from minimal_aia.train import codes as storage
from minimal_aia.train.codes import CodeStore, write_shard
from minimal_aia.train.config import TrainConfig
from minimal_aia.train.data import open_data
from minimal_aia.train.open_source import open_source
from minimal_aia.train.prepare import prepare

TASKS = ("generation", "understanding")
FAMILIES = ("janus", "emu3")
N = {"generation": 11, "understanding": 8}
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def adapters():
    made = {}
    for family in FAMILIES:
        folder = checkpoint(family)
        made[family] = load_adapter(folder, device="cpu", dtype=torch.float32)
        made[family].set_pictures("crop")
        made[family].ends_turns = True
        made[family].folder = str(folder)
        use_many_codes(made[family])
    return made


def use_many_codes(adapter) -> None:
    """A random encoder maps all it sees to two or three codes: put the codebook where its output is."""
    vq, seen = adapter.model.model.vqmodel, []
    hook = vq.quantize.register_forward_pre_hook(lambda _, args: seen.append(args[0].movedim(-3, -1)))
    noise = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if adapter.family == "janus":
            vq.encode(noise)
        else:
            adapter.model.model.get_image_tokens(noise, torch.tensor([[16, 16]] * 8))
        latents = seen[0].reshape(-1, seen[0].shape[-1])
        vq.quantize.embedding.weight.copy_(latents[:: len(latents) // 32][:32])
    hook.remove()


@pytest.fixture
def folder(tmp_path):
    pictures = write_pictures(tmp_path)
    for task in TASKS:
        write_lines(tmp_path / f"{task}.jsonl", entries(task, N[task], pictures))
    return tmp_path


def sources(folder):
    return {task: open_source(str(folder / f"{task}.jsonl"), task) for task in TASKS}


def run(adapter, folder, **more):
    options = {"batch_size": 2, "shard_size": 3, "progress": False, **more}
    return prepare(adapter, sources(folder), folder / "codes", **options)


def config(adapter, folder, **more):
    files = {f"{task}_data": str(folder / f"{task}.jsonl") for task in TASKS}
    return TrainConfig(
        **{"model": adapter.folder, "per_device_train_batch_size": 4, "max_steps": 4, **files, **more}
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_training_from_codes_is_training_from_pictures(adapters, folder, family):
    """Same tokens, spans, labels and hidden states, in both tasks, with a dropped prompt among them."""
    adapter = adapters[family]
    run(adapter, folder)
    c = config(adapter, folder, prompt_dropout=0.3)
    plain, coded = open_data(c), open_data(replace(c, codes=str(folder / "codes")))
    wanted = [plain[number] for number in range(4)]
    for name in ("generation", "understanding") if family == "emu3" else ("generation",):
        assert "codes" in coded[0][name].inputs
        assert "pixel_values" not in coded[0][name].inputs
    if family == "emu3":
        shutil.rmtree(folder / "images")  # nobody needs the pictures any more
    found = [coded[number] for number in range(4)]
    assert any(s.dropped for number in range(4) for s in coded.samples(number)["generation"])
    for task in TASKS:
        for one, other in zip(wanted, found, strict=True):
            assert one[task].ids == other[task].ids
            for mask in ("query_mask", "key_mask", "attention_mask"):
                assert torch.equal(getattr(one[task], mask), getattr(other[task], mask)), mask
            assert torch.equal(one[task].inputs["input_ids"], other[task].inputs["input_ids"])
            with torch.no_grad():
                states, _, labels = adapter.label_states(one[task])
                from_codes, _, same_labels = adapter.label_states(other[task])
            assert torch.equal(labels, same_labels)
            assert torch.equal(states, from_codes)
    assert coded.codes.length("generation", 0) > 0
    coded.codes.check_model(adapter)


def test_janus_codes_are_those_of_its_vq_encoder(adapters, folder):
    """Read with plain safetensors and compared with the library's encoder on the processor's pixels."""
    adapter = adapters["janus"]
    index = run(adapter, folder)
    shards = index["tasks"]["generation"]["shards"]
    assert [shard["pictures"] for shard in shards] == [3, 3, 3, 2]
    assert "understanding" not in index["tasks"]  # Janus looks at pixels there
    stored = [load_file(folder / "codes" / shard["file"]) for shard in shards]
    assert stored[0]["codes"].dtype == np.uint16
    codes = np.concatenate([s["codes"].astype(int) + e["base"] for s, e in zip(stored, shards)])
    codes = codes.reshape(11, 16)
    samples = [sources(folder)["generation"][i] for i in range(11)]
    with torch.no_grad():
        encoded = adapter.model.model.vqmodel.encode(adapter.pixels(samples)).image_tokens.view(11, -1)
    assert (codes == encoded.numpy()).all()
    assert len(np.unique(codes)) > 8


def test_emu3_has_codes_for_every_picture_of_every_sample(adapters, folder):
    adapter = adapters["emu3"]
    run(adapter, folder)
    store = CodeStore(folder / "codes", adapter)
    source = sources(folder)["understanding"]
    for i in range(len(source)):
        pictures = store.pictures("understanding", i)
        assert len(pictures) == len(source[i].images) == (2 if i % 3 == 2 else 1)
        assert store.length("understanding", i) == sum(len(p.codes) for p in pictures)
        assert all(len(p.codes) == p.height * (p.width + 1) for p in pictures)
    found = [p.codes for i in range(len(source)) for p in store.pictures("understanding", i)]
    assert len(torch.cat(found).unique()) > 8


# --- kills --------------------------------------------------------------------------------------------------


def in_a_child(work) -> int:
    """Run `work` in a forked process; its exit code, negative for a signal."""
    child = FORK.Process(target=work)
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_while_saving(n):
    """The n-th shard gets half its bytes, then the process is gone."""
    calls, save = [], storage.save_file

    def save_half(tensors, path):
        save(tensors, path)
        calls.append(path)
        if len(calls) == n:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            die()

    storage.save_file = save_half


def kill_after_renaming(n):
    calls, rename = [], os.replace

    def replace_and_die(*paths):
        rename(*paths)
        calls.append(paths)
        if len(calls) == n:
            die()

    os.replace = replace_and_die


def kill_in_the_middle_of_a_line(n):
    from minimal_aia.resume import PartFile

    calls, append = [], PartFile.append

    def append_half(self, record):
        append(self, record)
        calls.append(record)
        if len(calls) == n:
            self.path.write_bytes(self.path.read_bytes()[:-9])
            die()

    PartFile.append = append_half


@pytest.mark.parametrize("kill", [kill_while_saving, kill_after_renaming, kill_in_the_middle_of_a_line])
@pytest.mark.parametrize("n", [1, 3])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(adapters, folder, kill, n):
    adapter = adapters["janus"]
    whole = run(adapter, folder)
    files = {p.name: p.read_bytes() for p in (folder / "codes").iterdir()}
    shutil.rmtree(folder / "codes")

    def killed():
        kill(n)
        run(adapter, folder)

    assert in_a_child(killed) == -signal.SIGKILL
    with pytest.raises(ValueError, match=r"no finished image codes \(index.json is missing\)"):
        CodeStore(folder / "codes", adapter)
    finished = {p.name: p.stat().st_mtime_ns for p in (folder / "codes").glob("gen*")}
    assert run(adapter, folder) == whole
    after = {p.name: p for p in (folder / "codes").iterdir() if not p.name.startswith(".")}
    assert {name: path.read_bytes() for name, path in after.items()} == files
    kept = [name for name, time in finished.items() if after[name].stat().st_mtime_ns == time]
    assert len(kept) >= n - 1 - (kill is kill_in_the_middle_of_a_line)  # finished shards are not made again


def test_two_processes_share_the_shards(adapters, folder):
    adapter = adapters["janus"]
    whole = run(adapter, folder)
    files = {p.name: p.read_bytes() for p in (folder / "codes").iterdir()}
    shutil.rmtree(folder / "codes")

    def worker(rank):
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
        )
        made = run(adapter, folder)
        (folder / f"made-{rank}.json").write_text(json.dumps(made))
        torch.distributed.destroy_process_group()

    children = [FORK.Process(target=worker, args=(rank,)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert {p.name: p.read_bytes() for p in (folder / "codes").iterdir()} == files
    assert [json.loads((folder / f"made-{r}.json").read_text()) for r in range(2)] == [whole, whole]


def test_a_full_disk_is_one_clear_error_and_the_run_can_go_on(adapters, folder):
    adapter = adapters["janus"]

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        try:
            run(adapter, folder)
        except OSError as error:
            os._exit(7 if "the disk is full; make room and run the same command again" in str(error) else 1)

    assert in_a_child(full) == 7
    assert not list((folder / "codes").glob("generation-*"))
    assert run(adapter, folder)["tasks"]["generation"]["shards"][3]["pictures"] == 2


# --- damage and change --------------------------------------------------------------------------------------


def test_a_damaged_shard_is_never_used_and_can_be_repaired(adapters, folder):
    adapter = adapters["janus"]
    index = run(adapter, folder)
    path = folder / "codes" / index["tasks"]["generation"]["shards"][1]["file"]
    good = path.read_bytes()
    for bad in (good[:-1] + bytes([good[-1] ^ 1]), good[:-7], None):
        path.unlink() if bad is None else path.write_bytes(bad)
        store = CodeStore(folder / "codes", adapter)
        assert store.pictures("generation", 0)
        with pytest.raises(ValueError, match=f"{path.name}: the file is (damaged|missing).*prepare` again"):
            store.pictures("generation", 3)
        before = {p.name: p.stat().st_mtime_ns for p in path.parent.iterdir()}
        assert run(adapter, folder) == index
        after = {p.name: p.stat().st_mtime_ns for p in path.parent.iterdir()}
        assert path.read_bytes() == good
        assert {name for name in after if after[name] != before.get(name)} == {path.name, "index.json"}
    assert run(adapter, folder) == index  # nothing to do


def test_codes_of_other_data_models_or_pictures_are_refused(adapters, folder):
    adapter = adapters["janus"]
    run(adapter, folder)
    c = config(adapter, folder, codes=str(folder / "codes"))
    assert open_data(c)[0]["generation"].inputs["codes"].shape == (2, 16)
    with pytest.raises(ValueError, match="made with another picture processing"):
        open_data(replace(c, image_fit="pad"))
    with pytest.raises(ValueError, match="made with another dtype"):
        open_data(replace(c, dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"another picture processing and VQ configuration"):
        CodeStore(folder / "codes", adapters["emu3"])
    store = CodeStore(folder / "codes", adapter)
    weight = next(adapter.model.model.vqmodel.parameters())
    with torch.no_grad():
        weight.mul_(2)
    try:
        with pytest.raises(ValueError, match="from another VQ tokenizer than tiny's"):
            store.check_model(adapter)
        with pytest.raises(ValueError, match="codes of other data, another model"):
            run(adapter, folder)
    finally:
        with torch.no_grad():
            weight.div_(2)
    with pytest.raises(ValueError, match="another model or shard size; choose a new folder"):
        run(adapter, folder, shard_size=4)
    lines = folder / "generation.jsonl"
    lines.write_text(lines.read_text().replace("circle", "square"))
    with pytest.raises(ValueError, match=r"made from other data than generation.jsonl is now"):
        open_data(c)
    (folder / "codes" / "index.json").write_text('{"format": 2}')
    with pytest.raises(ValueError, match="not an index of image codes that this version reads"):
        open_data(c)


def test_bad_samples_are_listed_left_out_and_replaced(adapters, folder):
    adapter = adapters["janus"]
    rows = [json.loads(line) for line in (folder / "generation.jsonl").read_text().splitlines()]
    rows[1]["image"] = "images/none.png"
    (folder / "images" / "cut.png").write_bytes((folder / "images" / "0.png").read_bytes()[:200])
    rows[4]["image"] = "images/cut.png"
    rows[7]["conversations"][0]["value"] = "<begin_of_image>"
    write_lines(folder / "generation.jsonl", rows)
    index = run(adapter, folder)
    skipped = {k: v for shard in index["tasks"]["generation"]["shards"] for k, v in shard["skipped"].items()}
    assert list(skipped) == ["1", "4", "7"]
    assert "none.png' does not exist" in skipped["1"]
    assert "cut.png' is unreadable or truncated" in skipped["4"]
    assert "special token" in skipped["7"]
    c = config(adapter, folder, codes=str(folder / "codes"), max_steps=6)
    data = open_data(c)
    ids = [i for number in range(6) for i in data[number]["generation"].ids]
    assert set(ids) == {f"generation.jsonl:{line}" for line in (1, 3, 4, 6, 7, 9, 10, 11)}
    shutil.rmtree(folder / "codes")
    with pytest.raises(SampleError, match=r"generation.jsonl:2: .*on_bad_sample: skip goes on"):
        run(adapter, folder, on_bad_sample="fatal")


def test_streams_and_models_without_codes_are_refused(adapters, folder):
    with pytest.raises(ValueError, match="the janus family reads no image codes for these tasks"):
        prepare(adapters["janus"], {"understanding": sources(folder)["understanding"]}, folder / "x")
    stream = sources(folder)
    stream["generation"].endless = True
    with pytest.raises(ValueError, match="a stream has no end"):
        prepare(adapters["janus"], stream, folder / "x")


def test_large_and_empty_codes_survive_a_shard(tmp_path, adapters):
    """Vocabulary ids far apart do not fit 16 bits; a shard may hold no picture at all."""
    far = PictureCodes(torch.tensor([3, 200_000]), 1, 2)
    assert write_shard(tmp_path / "far.safetensors", [[far], []])["base"] == 3
    stored = load_file(tmp_path / "far.safetensors")
    assert (stored["codes"] + 3).tolist() == [3, 200_000]
    assert stored["first"].tolist() == [0, 1, 1]
    assert write_shard(tmp_path / "none.safetensors", [[], []])["pictures"] == 0
    assert load_file(tmp_path / "none.safetensors")["sizes"].shape == (0, 2)
