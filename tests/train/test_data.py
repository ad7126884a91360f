"""Micro-batches of both tasks: what they hold and leave out, whatever the workers and the processes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_fakes import entries, padding, write_lines, write_pictures
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from real_models import checkpoint
from torch.utils.data import DataLoader

from minimal_aia.data import SampleError, read_samples
from minimal_aia.loss import aia_loss
from minimal_aia.models import load_adapter
from minimal_aia.pictures import open_picture
from minimal_aia.train.config import TrainConfig, micro_batch, task_counts
from minimal_aia.train.data import MixedBatches, data_adapter, open_data
from minimal_aia.train.saving import check_same_files, check_same_run

TASKS = ("generation", "understanding")
FAMILIES = ("janus", "emu3")
LIGHT = {}  # adapters without weights, made once


@pytest.fixture(scope="module")
def models() -> dict[str, Path]:
    return {family: checkpoint(family) for family in FAMILIES}


@pytest.fixture(scope="module")
def adapters(models):
    """With weights, in float32."""
    return {f: load_adapter(models[f], device="cpu", dtype=torch.float32) for f in FAMILIES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    pictures = write_pictures(folder)
    for task, n in (("generation", 11), ("understanding", 8)):
        write_lines(folder / f"{task}.jsonl", entries(task, n, pictures))
    return folder


def config(models, folder, family="janus", **more) -> TrainConfig:
    files = {f"{task}_data": str(folder / f"{task}.jsonl") for task in TASKS}
    return TrainConfig(
        **{"model": str(models[family]), "per_device_train_batch_size": 4, "max_steps": 6, **files, **more}
    )


def same(one, other) -> None:
    assert one.keys() == other.keys()
    for task, batch in one.items():
        assert batch.ids == other[task].ids
        assert batch.inputs.keys() == other[task].inputs.keys()
        for name, tensor in batch.inputs.items():
            assert torch.equal(tensor, other[task].inputs[name]), (task, name)
        for name in ("query_mask", "key_mask", "attention_mask"):
            assert torch.equal(getattr(batch, name), getattr(other[task], name))


# --- without weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_without_weights_makes_the_same_batches(models, adapters, folder, family):
    data = open_data(config(models, folder, family, prompt_dropout=0.5, image_fit="pad"))
    light = data.adapter
    assert all(p.device.type == "meta" for p in light.model.parameters())
    real = adapters[family]
    real.ends_turns = True
    try:
        for task in TASKS:
            samples = data.samples(0)[task]
            same({task: light.collate(samples, task)}, {task: real.collate(samples, task)})
    finally:
        real.ends_turns = False


# --- which samples ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 3])
def test_an_epoch_holds_every_sample_once(models, folder, window):
    data = open_data(config(models, folder, max_steps=11, length_window=window))
    ids = {task: [] for task in TASKS}
    for number in range(len(data)):
        found = data.samples(number)
        assert {task: len(samples) for task, samples in found.items()} == task_counts(data.config, number)
        for task, samples in found.items():
            ids[task] += [sample.id for sample in samples]
    assert len(data) == 11
    for task, n in (("generation", 11), ("understanding", 8)):
        wanted = {sample.id for sample in read_samples(folder / f"{task}.jsonl")}
        if not window:
            assert set(ids[task][:n]) == wanted
        counts = [ids[task].count(i) for i in wanted]
        assert max(counts) - min(counts) <= 1 + (window > 0)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(12)), st.integers(0, 4))
def test_a_number_is_the_same_whenever_it_is_asked_for(models, folder, numbers, window):
    """A resumed run starts anywhere, a worker takes every n-th: nothing depends on what came before."""
    c = config(models, folder, length_window=window, prompt_dropout=0.3)
    light = LIGHT.get("janus") or LIGHT.setdefault("janus", data_adapter(c))
    in_order = open_data(c, 2, light)
    wanted = [in_order.samples(number) for number in range(12)]
    data = open_data(c, 2, light)
    assert [data.samples(number) for number in numbers] == [wanted[number] for number in numbers]


@pytest.mark.parametrize("window", [0, 2])
def test_two_processes_share_the_step_of_one(models, folder, window):
    """4 samples on one process are 2 on each of two, or 2 twice on one; the same ids in the same order."""

    def step(world, accumulation, batch):
        c = config(models, folder, length_window=window, per_device_train_batch_size=batch,
                   gradient_accumulation_steps=accumulation)  # fmt: skip
        data = open_data(c, world)
        numbers = sorted(
            micro_batch(c, 3, micro, rank, world) for micro in range(accumulation) for rank in range(world)
        )
        found = [data.samples(number) for number in numbers]
        return {task: [s.id for part in found for s in part[task]] for task in TASKS}

    assert step(1, 1, 4) == step(2, 1, 2) == step(1, 2, 2)


def test_workers_and_a_fresh_start_give_the_same_batches(models, folder):
    c = config(models, folder, prompt_dropout=0.3, length_window=2, max_steps=4)
    alone = [open_data(c)[number] for number in range(4)]
    loader = DataLoader(
        open_data(c), batch_size=None, sampler=range(4), num_workers=2, multiprocessing_context="fork"
    )
    for one, other in zip(alone, loader, strict=True):
        same(one, other)
    same(open_data(c)[3], alone[3])  # a resumed run asks for what it still needs, and for nothing before


def test_a_stream_gives_whole_batches_and_wants_its_window_in_memory(models, folder):
    import datasets

    rows = [
        {"images": [{"path": None, "bytes": s.images[0].read_bytes()}], "prompt": s.turns[0][0]}
        for s in read_samples(folder / "generation.jsonl")
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "g.parquet"))
    c = config(models, folder, generation_data=f"stream:{folder / 'g.parquet'}", task_ratio="1:0")
    data = open_data(c)
    assert data.sources["generation"].block == 1000
    data.sources["generation"].block = 11
    seen = [s.turns[0][0] for n in range(3) for s in data.samples(n)["generation"]]
    assert len({*seen[:11]}) == 11
    assert open_data(c)[1]["generation"].inputs["pixel_values"].shape == (4, 3, 16, 16)
    with pytest.raises(ValueError, match="length_window 300: 1200 samples, more than the 1000"):
        open_data(replace(c, length_window=300))


# --- padding ------------------------------------------------------------------------------------------------


def test_batches_are_padded_to_their_longest_and_windows_pad_less(models, folder):
    def waste(window):
        data = open_data(config(models, folder, length_window=window, max_steps=12, task_ratio="0:1"))
        counts = np.array([padding(data[number]) for number in range(len(data))])
        for number in range(3):
            for batch in data[number].values():
                assert bool(batch.attention_mask.bool().any(0).all())
        return 1 - counts[:, 0].sum() / counts[:, 1].sum()

    assert waste(12) < 0.6 * waste(0)


def test_emu3_is_sorted_by_the_size_of_its_pictures(models, folder):
    data = open_data(config(models, folder, "emu3", length_window=11, task_ratio="1:0", max_steps=11))
    lengths = [data[number]["generation"].attention_mask.sum(1) for number in range(11)]
    assert all(int(row.max() - row.min()) <= 8 for row in lengths)  # pictures of one size: words differ
    assert len({int(row[0]) // 8 for row in lengths}) > 1


# --- dropped prompts ----------------------------------------------------------------------------------------


def dropped_pair(adapter, folder):
    """The same samples with the first prompt dropped, and with none."""
    samples = list(read_samples(folder / "generation.jsonl"))[:2]
    return adapter.collate([replace(samples[0], dropped=True), samples[1]], "generation"), adapter.collate(
        samples, "generation"
    )


def test_janus_pads_over_a_dropped_prompt_as_its_generate_does(adapters, folder, monkeypatch):
    adapter = adapters["janus"]
    batch, plain = dropped_pair(adapter, folder)
    n = int(plain.attention_mask[0].sum()) - 16  # the prompt with its template, up to begin-of-image
    asked = plain.inputs["input_ids"][:1, :n]
    seen = []
    embed = adapter.model.get_input_embeddings()
    hook = embed.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    settings = adapter.model.generation_config
    settings.generation_kwargs = {
        "boi_token_id": adapter.tokenizer.convert_tokens_to_ids(adapter.processor.image_start_token)
    }
    settings.pad_token_id, settings.bos_token_id = (
        adapter.tokenizer.pad_token_id,
        adapter.tokenizer.bos_token_id,
    )
    try:
        adapter.model.generate(asked, attention_mask=torch.ones_like(asked), generation_mode="image",
                               do_sample=True, guidance_scale=5.0, max_length=n + 16)  # fmt: skip
    finally:
        hook.remove()
    assert seen[0].shape == (2, n)  # guided and unguided row of transformers' own loop
    assert torch.equal(batch.inputs["input_ids"][0, :n], seen[0][1])
    assert torch.equal(batch.attention_mask, plain.attention_mask)  # the padding is attended to
    assert torch.equal(batch.query_mask, plain.query_mask)
    assert torch.equal(batch.inputs["input_ids"][1], plain.inputs["input_ids"][1])
    assert not batch.key_mask[0].any()
    assert torch.equal(batch.key_mask[1], plain.key_mask[1])


def test_emu3_leaves_a_dropped_prompt_empty_as_its_guidance_does(adapters, folder):
    adapter = adapters["emu3"]
    batch, plain = dropped_pair(adapter, folder)
    ids = batch.inputs["input_ids"][0][batch.attention_mask[0].bool()]
    words = plain.key_mask[0].sum()
    whole = plain.inputs["input_ids"][0][plain.attention_mask[0].bool()]
    assert torch.equal(ids, torch.cat([whole[:1], whole[1 + words :]]))
    assert ids[0] == adapter.tokenizer.bos_token_id
    assert not batch.key_mask[0].any()
    assert batch.query_mask[0].sum() == plain.query_mask[0].sum()
    row = torch.nonzero(batch.query_mask[1]).flatten() - torch.nonzero(plain.query_mask[1]).flatten()
    assert not row.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dropped_prompt_adds_nothing_to_the_aia_loss(adapters, folder, family):
    """Neither value nor gradient: as if the sample were not in the batch."""
    adapter = adapters[family]
    samples = list(read_samples(folder / "generation.jsonl"))[:3]
    target, delta = torch.full((3,), 0.4), torch.full((3,), 0.1)

    def run(rows):
        adapter.model.zero_grad()
        batch = adapter.collate(rows, "generation")
        with adapter.capture(batch) as record:
            adapter.forward(batch)
        loss = aia_loss(record.intensity, target, delta)
        loss.backward()
        grads = {n: p.grad.clone() for n, p in adapter.model.named_parameters() if p.grad is not None}
        return loss.detach(), grads, record.intensity

    with_drop, grads, intensity = run([samples[0], replace(samples[1], dropped=True), samples[2]])
    without, wanted, _ = run([samples[0], samples[2]])
    assert intensity[:, 1].isnan().all()
    assert with_drop > 0.01
    assert torch.allclose(with_drop, without, atol=1e-6)
    assert any(float(grad.abs().max()) > 1e-4 for grad in wanted.values())
    for name, grad in wanted.items():
        assert torch.allclose(grads[name], grad, atol=1e-5), name


def test_about_the_asked_share_is_dropped_and_only_in_generation(models, folder):
    data = open_data(config(models, folder, prompt_dropout=0.25, max_steps=100))
    found = [data.samples(number) for number in range(100)]
    assert not any(s.dropped for step in found for s in step["understanding"])
    dropped = [s.dropped for step in found for s in step["generation"]]
    assert 30 <= sum(dropped) <= 70  # of 200; 50 expected, standard deviation 6
    assert len({s.id for step in found for s in step["generation"] if s.dropped}) > 8


def test_a_model_that_cannot_drop_prompts_says_so(models, folder):
    data = Path(__file__).parents[2] / "data_samples"
    c = TrainConfig(**{f"{task}_data": str(data / f"{task}.jsonl") for task in TASKS}, prompt_dropout=0.1)
    with pytest.raises(ValueError, match=r"prompt_dropout: the lab family drops no prompts; set 0"):
        open_data(c)


# --- pictures -----------------------------------------------------------------------------------------------


def test_janus_targets_are_cropped_not_padded(models, folder, tmp_path):
    """A picture with a red left, a green middle and a blue right third: the crop shows green alone."""
    wide = np.zeros((10, 30, 3), np.uint8)
    for third in range(3):
        wide[:, 10 * third : 10 * third + 10, third] = 255
    (tmp_path / "images").mkdir()
    Image.fromarray(wide).save(tmp_path / "images" / "0.png")
    for task in TASKS:
        write_lines(tmp_path / f"{task}.jsonl", entries(task, 1, ["images/0.png"]))
    pixels = {}
    for fit in ("crop", "pad"):
        data = open_data(config(models, tmp_path, image_fit=fit))
        images = data.adapter.processor.image_processor
        mean, std = (torch.tensor(x)[:, None, None] for x in (images.image_mean, images.image_std))
        pixels[fit] = data[0]["generation"].inputs["pixel_values"][0] * std + mean
        looked_at = data[0]["understanding"].inputs["pixel_values"][0] * std + mean
        assert looked_at[2, 8, -1] > 0.9  # understanding sees all of the picture, whatever becomes of targets
    inside = pixels["crop"][:, :, 2:-2]  # at the very edge the filter reaches over the border
    assert (inside[1] > 0.9).all()
    assert (inside[[0, 2]] < 0.1).all()
    grey = torch.tensor([int(x * 255) / 255 for x in images.image_mean])[:, None, None]
    assert torch.allclose(pixels["pad"][:, :5], grey.expand(3, 5, 16), atol=1e-2)  # the processor's bars
    assert pixels["pad"][0, 8, 0] > 0.9


def test_emu3_pictures_keep_their_shape_and_get_the_asked_area(models, folder):
    for area in (0, 64 * 64):
        data = open_data(config(models, folder, "emu3", image_area=area, task_ratio="1:0"))
        samples = data.samples(0)["generation"]
        batch = data.adapter.collate(samples, "generation")
        for sample, size in zip(samples, batch.inputs["image_sizes"].tolist(), strict=True):
            width, height = open_picture(sample.images[0]).size
            assert size[0] % 8 == size[1] % 8 == 0
            assert abs(np.log(size[0] / size[1] / (height / width))) < 0.5
            if area:
                assert 0.7 * area < size[0] * size[1] < 1.3 * area
            tokens = data.adapter.picture_length(sample.images[0])
            assert tokens == size[0] // 8 * (size[1] // 8 + 1)


# --- bad samples --------------------------------------------------------------------------------------------


@pytest.fixture
def bad_folder(folder, tmp_path):
    """Lines 2 to 5 of twelve are bad, each in its own way; the fourth only when its picture is decoded."""
    pictures = write_pictures(tmp_path)
    rows = entries("generation", 12, pictures)
    rows[1] = {"image": pictures[0]}
    rows[2]["image"] = "images/none.png"
    (tmp_path / "images" / "cut.png").write_bytes((tmp_path / pictures[0]).read_bytes()[:200])
    rows[3]["image"] = "images/cut.png"
    rows[4]["conversations"][0]["value"] = "a <begin_of_image> spelled out"
    write_lines(tmp_path / "generation.jsonl", rows)
    write_lines(tmp_path / "understanding.jsonl", entries("understanding", 8, pictures))
    return tmp_path


def test_bad_samples_are_replaced_counted_and_keep_the_ratio(models, bad_folder, caplog):
    c = config(models, bad_folder, max_steps=6, on_bad_sample="skip")
    data = open_data(c)
    batches = [data[number] for number in range(6)]
    assert all({t: len(b) for t, b in batch.items()} == dict.fromkeys(TASKS, 2) for batch in batches)
    ids = [i for batch in batches for i in batch["generation"].ids]
    assert set(ids) == {f"generation.jsonl:{line}" for line in (1, 6, 7, 8, 9, 10, 11, 12)}
    assert data.skipped >= 4
    for reason in (
        "generation.jsonl:2: 'conversations' is missing",
        "generation.jsonl:3: image 'images/none.png' does not exist",
        r"images/cut.png' is unreadable or truncated",
        "generation.jsonl:5: its text spells out the special token '<begin_of_image>'",
    ):
        assert reason in caplog.text
    loader = DataLoader(
        fresh := open_data(c),
        batch_size=None,
        sampler=range(6),
        num_workers=2,
        multiprocessing_context="fork",
    )
    for one, other in zip(batches, loader, strict=True):
        same(one, other)
    assert fresh.skipped == data.skipped  # counted in the workers, read here


def test_fatal_bad_samples_stop_with_their_line(models, bad_folder):
    data = open_data(config(models, bad_folder, on_bad_sample="fatal", seed=3))
    with pytest.raises(SampleError, match=r"generation.jsonl:\d: .*on_bad_sample: skip goes on"):
        list(map(data.__getitem__, range(6)))


def test_samples_that_are_too_long_are_bad_samples(models, folder):
    whole = open_data(config(models, folder, task_ratio="0:1", max_steps=2))
    lengths = {}
    for number in range(2):
        batch = whole[number]["understanding"]
        lengths |= dict(zip(batch.ids, batch.attention_mask.sum(1).tolist()))
    limit = sorted(lengths.values())[5]
    short = open_data(config(models, folder, task_ratio="0:1", max_steps=2, max_length=limit))
    ids = [i for number in range(2) for i in short[number]["understanding"].ids]
    assert set(ids) == {i for i, n in lengths.items() if n <= limit}
    assert short.skipped == 2
    fatal = open_data(replace(short.config, on_bad_sample="fatal"))
    with pytest.raises(SampleError, match=r"understanding.jsonl:\d: \d+ tokens, more than max_length"):
        list(map(fatal.__getitem__, range(2)))


def test_data_without_a_usable_sample_ends_with_the_reason(models, folder, tmp_path):
    rows = entries("generation", 3, ["images/none.png"])
    write_lines(tmp_path / "generation.jsonl", rows)
    data = open_data(config(models, folder, generation_data=str(tmp_path / "generation.jsonl")))
    with pytest.raises(SampleError, match=r"too many bad samples in a row; the last: .*does not exist"):
        data[0]


def test_an_error_that_is_no_samples_fault_comes_through(models, folder, monkeypatch):
    data = open_data(config(models, folder))
    real = data.adapter.collate

    def collate(samples, task):
        if len(samples) > 1:
            raise RuntimeError("not a sample's fault")
        return real(samples, task)

    monkeypatch.setattr(data.adapter, "collate", collate)
    with pytest.raises(RuntimeError, match="not a sample's fault"):
        data[0]


# --- the whole ----------------------------------------------------------------------------------------------


def test_lab_models_train_on_files_too():
    samples = Path(__file__).parents[2] / "data_samples"
    c = TrainConfig(**{f"{task}_data": str(samples / f"{task}.jsonl") for task in TASKS})
    data = open_data(c)
    usable = read_samples(samples / "generation.jsonl")
    assert any(data.adapter.why_not(s, "generation") for s in usable)  # photographs are no lab pictures
    batch = data[0]
    assert {task: len(b) for task, b in batch.items()} == {"generation": 8, "understanding": 8}


def test_settings_that_change_the_order_are_refused_on_resume_and_others_are_not(models, folder):
    c, said = config(models, folder), []
    manifest = {"config": asdict(c), "world_size": 1}
    for change in ({"seed": 1}, {"task_ratio": "2:1"}, {"prompt_dropout": 0.1}, {"length_window": 4}):
        with pytest.raises(ValueError, match=f"{next(iter(change))} was .*in another order"):
            check_same_run(Path("c"), manifest, replace(c, **change), 1, said.append)
    with pytest.raises(ValueError, match="a step had 1 micro-batches"):
        check_same_run(Path("c"), manifest, c, 2, said.append)
    assert said == []
    check_same_run(Path("c"), manifest, replace(c, dataloader_num_workers=3, aia_weight=1), 1, said.append)
    assert said == ["resume c: aia_weight was 40.0, now it is 1"]


def test_lab_scenes_and_files_do_not_mix(models, folder):
    with pytest.raises(ValueError, match="understanding_data lab: endless scenes are for both tasks or none"):
        open_data(config(models, folder, understanding_data="lab"))


def test_sources_of_tasks_outside_the_ratio_are_never_opened(models, folder):
    data = open_data(config(models, folder, task_ratio="1:0", understanding_data="none.jsonl"))
    assert isinstance(data, MixedBatches)
    assert set(data[0]) == {"generation"}


def test_data_adapter_follows_the_recipe(models):
    light = data_adapter(TrainConfig(model=str(models["janus"]), dtype="bfloat16", image_fit="pad"))
    assert (light.dtype, light.image_fit, light.ends_turns) == (torch.bfloat16, "pad", True)


def test_a_run_does_not_go_on_with_other_files(models, folder, tmp_path):
    """Its manifest holds the fingerprints; a line more, and the order would be another."""
    for task in TASKS:
        (tmp_path / f"{task}.jsonl").write_text((folder / f"{task}.jsonl").read_text())
    c = config(models, tmp_path)
    manifest = json.loads(json.dumps({"data": open_data(c).fingerprints()}))
    check_same_files(Path("c"), manifest, open_data(c))
    with (tmp_path / "understanding.jsonl").open("a") as file:
        file.write(json.dumps(entries("understanding", 9, ["images/0.png"])[-1]) + "\n")
    with pytest.raises(ValueError, match="understanding_data holds other samples than when it was written"):
        check_same_files(Path("c"), manifest, open_data(c))
    check_same_files(Path("c"), {"data": {}}, [])  # lab scenes: nothing to compare
