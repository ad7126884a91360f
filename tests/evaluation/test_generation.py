"""The exporter against the scorers' documented reading, its seeds, its resuming, and two real processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from checkpoints import MAKERS

import minimal_aia.models.draw as drawing
from minimal_aia.cli import main
from minimal_aia.evaluation.generation import export
from minimal_aia.evaluation.prompts import Prompt, grid, read_prompts
from minimal_aia.models import load_adapter

torch.set_num_threads(1)
TEXTS = ["a red circle", "a green cross above a cyan cross", "a purple circle right of a purple triangle"]


@pytest.fixture(scope="module")
def lab():
    return load_adapter("lab/unified", device="cpu")


@pytest.fixture
def geneval(tmp_path):
    """GenEval's prompt file with the lab's words; the key order and a non-ASCII value are to survive."""
    path = tmp_path / "evaluation_metadata.jsonl"
    entries = [
        {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": text, "note": "é"}
        for text in TEXTS
    ]
    path.write_text("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in entries), encoding="utf-8")
    return path


@pytest.fixture
def dpg(tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name, text in zip(("0", "10", "partiprompts2"), TEXTS, strict=True):
        (folder / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
    return folder


def as_geneval_reads(out: Path) -> dict[str, tuple[dict, dict[str, bytes]]]:
    """What evaluate_images.py finds: numbered folders, one JSON object, numbered .png files in samples."""
    found = {}
    for name in os.listdir(out):
        if (out / name).is_dir() and name.isdigit():
            with (out / name / "metadata.jsonl").open(encoding="utf-8") as file:
                metadata = json.load(file)
            pictures = {}
            for file_name in os.listdir(out / name / "samples"):
                assert re.fullmatch(r"\d+\.png", file_name)
                with Image.open(out / name / "samples" / file_name) as image:
                    pictures[file_name] = image.convert("RGB").tobytes()
            found[name] = (metadata, pictures)
    return found


def test_geneval_finds_every_prompt_with_four_pictures(lab, geneval, tmp_path):
    layout, prompts = read_prompts(geneval)
    out = tmp_path / "images"
    assert export(lab, prompts, layout, out, batch_size=5, progress=False) == 12
    found = as_geneval_reads(out)
    assert sorted(found) == ["00000", "00001", "00002"]  # the line numbers, from 0
    for number, line in enumerate(geneval.read_text(encoding="utf-8").splitlines()):
        metadata, pictures = found[f"{number:05d}"]
        assert metadata == json.loads(line)
        assert sorted(pictures) == [f"{i:04d}.png" for i in range(4)]
        assert len(set(pictures.values())) > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [geneval.name, "images", "images.run.json"]
    kept = json.loads((tmp_path / "images.run.json").read_text())
    assert (kept["model"], kept["guidance"], kept["top_k"], kept["seed"]) == ("lab/unified", 1.0, 0, 0)


def test_dpg_finds_grids_named_as_the_prompts_and_nothing_else(lab, dpg, tmp_path):
    layout, prompts = read_prompts(dpg)
    out = tmp_path / "images"
    export(lab, prompts, layout, out, batch_size=5, progress=False)
    assert sorted(os.listdir(out)) == ["0.png", "10.png", "partiprompts2.png"]  # it takes all for pictures
    mine, resolution = lab.drawer(), 24
    for prompt in prompts:
        with Image.open(out / f"{prompt.id}.png") as whole:
            crops = [
                whole.crop((left, top, left + resolution, top + resolution)).tobytes()
                for top in (0, resolution)
                for left in (0, resolution)
            ]
        seeds = [drawing.image_seed(0, prompt.id, i) for i in range(4)]
        assert crops == [p.tobytes() for p in drawing.draw(mine, [prompt.text] * 4, seeds)]


def test_a_subset_is_part_of_the_whole_whatever_the_batch(lab, geneval, tmp_path):
    layout, prompts = read_prompts(geneval)
    export(lab, prompts, layout, tmp_path / "all", images=2, batch_size=6, progress=False)
    export(lab, prompts, layout, tmp_path / "two", images=2, batch_size=1, limit=2, progress=False)
    export(lab, prompts, layout, tmp_path / "other", images=2, seed=1, limit=2, progress=False)
    everything, part = as_geneval_reads(tmp_path / "all"), as_geneval_reads(tmp_path / "two")
    assert part == {name: everything[name] for name in ("00000", "00001")}
    assert as_geneval_reads(tmp_path / "other") != part


@pytest.mark.parametrize("layout_of", ["geneval", "dpg"])
def test_a_killed_run_goes_on_where_it_stopped(lab, geneval, dpg, tmp_path, monkeypatch, layout_of):
    layout, prompts = read_prompts(geneval if layout_of == "geneval" else dpg)
    whole, out = tmp_path / "whole", tmp_path / "out"
    export(lab, prompts, layout, whole, batch_size=5, progress=False)
    draw, calls = drawing.draw, []

    def killed(*args, **settings):
        calls.append(len(args[1]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(*args, **settings)

    monkeypatch.setattr(drawing, "draw", killed)
    with pytest.raises(KeyboardInterrupt):
        export(lab, prompts, layout, out, batch_size=5, progress=False)
    finished = {p: p.stat().st_mtime_ns for p in out.rglob("*.png")}
    assert len(finished) == (5 if layout == "geneval" else 1)
    monkeypatch.setattr(drawing, "draw", draw)
    rest = export(lab, prompts, layout, out, batch_size=3, progress=False)
    assert rest == (7 if layout == "geneval" else 8)  # a grid is drawn as a whole
    assert {p: p.stat().st_mtime_ns for p in finished} == finished
    names = sorted(p.relative_to(whole) for p in whole.rglob("*.*"))
    assert sorted(p.relative_to(out) for p in out.rglob("*.*")) == names
    assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in names)
    assert export(lab, prompts, layout, out, batch_size=3, progress=False) == 0
    assert not list(tmp_path.glob(".*"))  # no half file is left


def test_pictures_of_two_runs_are_never_mixed(lab, geneval, tmp_path):
    layout, prompts = read_prompts(geneval)
    out = tmp_path / "images"
    export(lab, prompts, layout, out, images=1, limit=1, progress=False)
    with pytest.raises(ValueError, match=r"drawn with another temperature .* says temperature 1.0, now 0.5"):
        export(lab, prompts, layout, out, images=1, temperature=0.5, progress=False)
    with pytest.raises(ValueError, match="another prompts"):
        export(lab, prompts[1:], layout, out, images=1, progress=False)
    other = load_adapter("lab/unified", device="cpu")
    with torch.no_grad():
        next(iter(other.model.parameters())).mul_(1.001)
    with pytest.raises(ValueError, match="another weights"):
        export(other, prompts, layout, out, images=1, progress=False)
    (tmp_path / "images.run.json").unlink()
    with pytest.raises(ValueError, match=r"is not empty and .*images.run.json is missing"):
        export(lab, prompts, layout, out, images=1, progress=False)
    (tmp_path / "images.run.json").write_text("[]")
    with pytest.raises(ValueError, match="not a settings file"):
        export(lab, prompts, layout, out, images=1, progress=False)


def test_janus_and_emu3_go_the_same_way(geneval, tmp_path):
    layout, prompts = read_prompts(geneval)
    for family, size, options in [("janus", 16, {}), ("emu3", 24, {"image_area": 24 * 24})]:
        adapter = load_adapter(MAKERS[family](tmp_path / family), device="cpu", **options)
        out = tmp_path / f"{family}_images"
        assert export(adapter, prompts, layout, out, images=1, limit=2, batch_size=2, progress=False) == 2
        with Image.open(out / "00001" / "samples" / "0000.png") as image:
            assert (image.size, image.mode) == ((size, size), "RGB")


def test_prompts_that_the_model_cannot_take_are_named_before_anything_is_drawn(lab, tmp_path):
    prompts = [Prompt("00000", "a red circle"), Prompt("00001", "a red dog"), Prompt("00002", "two cats")]
    with pytest.raises(ValueError, match=r"(?s)cannot draw these prompts.*00001: .*'dog'.*00002: .*'cats'"):
        export(lab, prompts, "geneval", tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="temperature is 0"):
        export(lab, prompts[:1], "geneval", tmp_path / "out", temperature=0, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.distributed
def test_two_processes_draw_what_one_draws(lab, geneval, tmp_path):
    layout, prompts = read_prompts(geneval)
    export(lab, prompts, layout, tmp_path / "one", images=2, progress=False)
    arguments = [
        "evaluate",
        "generation",
        "--model",
        "lab/unified",
        "--prompts",
        str(geneval),
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *("-m", "minimal_aia.cli", *arguments, "--images", "2", "--processes", "2"),
            *("--out", str(tmp_path / "two")),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert as_geneval_reads(tmp_path / "two") == as_geneval_reads(tmp_path / "one")
    assert done.stdout.count("is complete") == 1  # the first process alone speaks


# --- prompt files -------------------------------------------------------------------------------------------


BAD_LINES = [
    ("{", r"metadata.jsonl:2: not JSON"),
    ("[]", r"metadata.jsonl:2: not a JSON object"),
    ("", r"metadata.jsonl:2: not JSON .* no line may be blank"),
    ('{"tag": "colors"}', r"metadata.jsonl:2: no text 'prompt'"),
    ('{"prompt": " ", "tag": "colors"}', r"metadata.jsonl:2: no text 'prompt'"),
    ('{"prompt": "a"}', r"metadata.jsonl:2: no text 'tag'"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_LINES)
def test_a_bad_line_is_named(tmp_path, bad, message):
    path = tmp_path / "metadata.jsonl"
    good = '{"prompt": "a", "tag": "colors"}'
    path.write_text(f"{good}\n{bad}\n{good}\n")
    with pytest.raises(ValueError, match=message):
        read_prompts(path)
    path.write_bytes(good.encode() + b"\n\xff\n")
    with pytest.raises(ValueError, match=r"metadata.jsonl:2: not UTF-8"):
        read_prompts(path)


def test_bad_text_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file; give GenEval's"):
        read_prompts(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"no \.txt file"):
        read_prompts(tmp_path)
    (tmp_path / "1.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"1\.txt: the file is empty"):
        read_prompts(tmp_path)
    (tmp_path / "1.txt").rename(tmp_path / "v1.2.txt")
    with pytest.raises(ValueError, match=r"v1\.2\.txt: .* cuts names at the first dot"):
        read_prompts(tmp_path)


@given(
    st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=4), st.sampled_from(["\n", "\r\n"])
)
@settings(max_examples=50)
def test_geneval_lines_keep_number_text_and_content(tmp_path_factory, texts, newline):
    path = tmp_path_factory.mktemp("p") / "m.jsonl"
    entries = [{"prompt": text, "tag": "counting", "include": []} for text in texts]
    path.write_bytes(newline.join(json.dumps(e) for e in entries).encode() + newline.encode())
    layout, prompts = read_prompts(path)
    assert layout == "geneval"
    assert [p.id for p in prompts] == [f"{i:05d}" for i in range(len(texts))]
    assert [p.text for p in prompts] == texts
    assert [json.loads(p.line) for p in prompts] == entries


def test_a_grid_reads_from_left_to_right_and_down():
    pictures = [Image.new("RGB", (3, 2), color) for color in ("red", "green", "blue", "white")]
    pixels = np.asarray(grid(pictures))
    assert pixels.shape == (4, 6, 3)
    corners = [pixels[y, x] for y in (0, 3) for x in (0, 5)]
    assert [tuple(c) for c in corners] == [p.getpixel((0, 0)) for p in pictures]
    assert grid(pictures[:1]) is pictures[0]


# --- the command --------------------------------------------------------------------------------------------


def test_the_command_draws_and_says_how_to_score(dpg, geneval, tmp_path, capsys):
    command = ["evaluate", "generation", "--model", "lab/generation", "--device", "cpu", "--dtype", "float32"]
    out = tmp_path / "images"
    assert main([*command, "--prompts", str(dpg), "--out", str(out), "--limit", "1"]) == 0
    said = capsys.readouterr().out
    assert f"PIC_NUM=4 bash dpg_bench/dist_eval.sh {out} 24\n" in said
    assert main([*command, "--prompts", str(geneval), "--out", str(tmp_path / "g"), "--images", "1"]) == 0
    assert f"evaluate_images.py {tmp_path / 'g'} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "lab/unified", "--images", "3"], "1 or 4 pictures a prompt"),
        (["--model", "lab/understanding"], "cannot draw pictures for a benchmark"),
        (["--model", "lab/nothing"], "there is no lab model"),
        (["--model", "lab/unified", "--processes", "2"], "2 processes were asked for, 1 came up"),
    ],
)
def test_errors_are_one_line_and_leave_nothing_behind(dpg, tmp_path, capsys, arguments, message):
    out = tmp_path / "images"
    command = ["evaluate", "generation", "--prompts", str(dpg), "--out", str(out), "--device", "cpu"]
    assert main([*command, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("minimal-aia evaluate: error: ")
    assert message in error
    assert not out.exists()
