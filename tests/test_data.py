"""read_samples: what it accepts, what it refuses, and how it says so."""

from __future__ import annotations

import json
import os
import struct
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from minimal_aia.data import Sample, SampleError, read_samples
from minimal_aia.pictures import MAX_PIXELS


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    Image.new("RGB", (8, 6), (200, 30, 30)).save(path)
    return path.read_bytes()


@pytest.fixture
def folder(tmp_path, picture):
    """An empty data folder with two images in it."""
    (tmp_path / "data" / "images").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        (tmp_path / "data" / "images" / name).write_bytes(picture)
    return tmp_path / "data"


def entry(*values, image="images/a.png", **more):
    """A line's object: human and gpt take turns over ``values``."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]
    return {"image": image, "conversations": turns, **more}


UND = entry("<image>\nWhat is it?", "A square.")
GEN = entry("a red square", "<image>")


def write(folder, *lines, newline="\n"):
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    (folder / "s.jsonl").write_bytes(newline.join(texts).encode("utf-8") + newline.encode())
    return folder / "s.jsonl"


def test_both_tasks(folder):
    path = write(folder, {**UND, "type": "open", "source": "lab"}, {**GEN, "image": "images/b.png"})
    image = folder / "images"
    assert read_samples(path) == [
        Sample(
            "s.jsonl:1", "understanding", (("What is it?", "A square."),), (image / "a.png",), "open", "lab"
        ),
        Sample("s.jsonl:2", "generation", (("a red square", ""),), (image / "b.png",)),
    ]
    assert read_samples(path).n_skipped == 0


def test_several_turns_and_images(folder):
    both = ["images/a.png", "images/b.png"]
    path = write(
        folder,
        entry("<image> <image>\nSame?", "Yes.", "Sure?", "Quite.", image=both),
        entry("Same?\n<image><image>", "No.", image=both),
    )
    first, second = read_samples(path)
    assert first.turns == (("Same?", "Yes."), ("Sure?", "Quite."))
    assert second.turns == (("Same?", "No."),)
    assert [p.name for p in first.images] == ["a.png", "b.png"]


def test_generation_needs_no_image(folder):
    (sample,) = read_samples(write(folder, {"conversations": GEN["conversations"]}))
    assert (sample.task, sample.images) == ("generation", ())


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_newlines_bom_and_other_scripts(folder, newline):
    text = "日本 – ночь\u2028🙂"  # U+2028 is a line end to str.splitlines, not to JSON lines
    path = write(folder, "", entry(text, "<image>"), "", UND, newline=newline)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    samples = read_samples(path)
    assert [s.id for s in samples] == ["s.jsonl:2", "s.jsonl:4"]
    assert samples[0].turns[0][0] == text


def test_json_list(folder):
    (folder / "s.json").write_text(json.dumps([GEN, UND]), encoding="utf-8")
    assert [s.id for s in read_samples(folder / "s.json")] == ["s.json:1", "s.json:2"]
    (folder / "s.json").write_text(json.dumps(GEN), encoding="utf-8")
    with pytest.raises(SampleError, match="list of samples"):
        read_samples(folder / "s.json")


BAD = {  # reason as it must be said -> a line that deserves it
    "malformed JSON, column": '{"image": ',
    "malformed JSON": "[" * 100_000,
    "a key stands twice": '{"image": "images/a.png", "image": "images/b.png"}',
    "not a JSON object": "[1, 2]",
    "'conversations' is missing": {"image": "images/a.png"},
    "turn 2 is not an object": {"conversations": [UND["conversations"][0], "A square."]},
    "turn 1 is from 'gpt', expected 'human'": {"conversations": UND["conversations"][::-1]},
    "turn 2 is from 'human', expected 'gpt'": {"conversations": UND["conversations"][:1] * 2},
    "turn 1 is from 'system'": {"conversations": [{"from": "system", "value": "x"}]},
    "the gpt answer is missing": entry("<image>\nWhat?", "A.", "And?"),
    "turn 2 (gpt) is empty": entry("<image>\nWhat?", " \n"),
    "empty but for the image": entry("<image>\n", "A square."),
    "half a surrogate pair": '{"conversations": [{"from": "human", "value": "\\ud800"}]}',
    "no '<image>' in the first human value": entry("What is it?", "A square."),
    "'<image>' in a later question": entry("<image>\nWhat?", "A.", "<image>\nAnd?", "B."),
    "'<image>' in the middle": entry("Is <image> red?", "Yes."),
    "2 '<image>' in the text, but 1 paths": entry("<image><image>\nWhat?", "A."),
    "1 '<image>' in the text, but 0 paths": entry("<image>\nWhat?", "A.", image=[]),
    "gpt value is exactly '<image>'": entry("a red square", "<image> there"),
    "one prompt whose gpt value": entry("a red square", "<image>", "again", "<image>"),
    "both the human and the gpt": entry("<image>\nmake it blue", "<image>"),
    "one target image (or none), found 2": entry("a", "<image>", image=["images/a.png", "images/b.png"]),
    "'image' is neither": entry("a", "<image>", image=7),
    "must be strings": {**UND, "type": 3},
    "an image path is empty": {**UND, "image": " "},
    "does not exist": {**UND, "image": "images/none.png"},
    "'/etc/passwd' leaves the folder": {**UND, "image": "/etc/passwd"},
    "'../outside.png' leaves the folder": {**UND, "image": "../outside.png"},
    "'images/../../outside.png' leaves": {**UND, "image": "images/../../outside.png"},
    "'C:\\\\x.png' leaves the folder": {**UND, "image": "C:\\x.png"},
    "'..\\\\outside.png' leaves the folder": {**UND, "image": "..\\outside.png"},
    "through a link": {**UND, "image": "images/link.png"},
    "'images' does not exist": {**UND, "image": "images"},
    "cannot be opened": {**UND, "image": "x" * 5000},
    "'images/cut.png' is unreadable or truncated": {**UND, "image": "images/cut.png"},
    "'images/text.png' is unreadable": {**UND, "image": "images/text.png"},
    "'images/bomb.png' has": {**UND, "image": "images/bomb.png"},
    "'images/huge.png' has far more": {**UND, "image": "images/huge.png"},
    "duplicate of s.jsonl:1": GEN,
}


def png_header(width, height):
    """A PNG that claims a size, without the pixels: what a decompression bomb looks like from outside."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9))


@pytest.fixture
def traps(folder, picture):
    images = folder / "images"
    (folder.parent / "outside.png").write_bytes(picture)
    os.symlink(folder.parent / "outside.png", images / "link.png")
    (images / "text.png").write_text("no image")
    noise = Image.frombytes("RGB", (64, 64), bytes(i * 7919 % 251 for i in range(64 * 64 * 3)))
    noise.save(images / "cut.png")
    whole = (images / "cut.png").read_bytes()
    (images / "cut.png").write_bytes(whole[: len(whole) // 2])
    (images / "bomb.png").write_bytes(png_header(10_000, MAX_PIXELS // 10_000 + 1))
    (images / "huge.png").write_bytes(png_header(100_000, 100_000))
    return folder


@pytest.mark.parametrize("reason", BAD)
def test_each_bad_line_is_refused(traps, reason):
    path = write(traps, GEN, UND, BAD[reason])
    with pytest.raises(SampleError) as error:
        read_samples(path)
    (problem,) = error.value.problems
    assert problem.startswith("s.jsonl:3: ")
    assert reason in problem
    samples = read_samples(path, on_error="skip")
    assert [s.id for s in samples] == ["s.jsonl:1", "s.jsonl:2"]
    assert samples.n_skipped == 1
    assert samples.problems == (problem,)


def test_one_error_lists_every_bad_line(traps):
    path = write(traps, GEN, *BAD.values(), UND)
    with pytest.raises(SampleError, match=f"{len(BAD)} bad of {len(BAD) + 2} samples") as error:
        read_samples(path)
    for line, reason in enumerate(BAD, 2):
        (said,) = [text for text in str(error.value).splitlines() if f"s.jsonl:{line}: " in text]
        assert reason in said
    assert "on_error='skip'" in str(error.value)


def test_bytes_that_are_not_utf8(folder):
    path = write(folder, GEN)
    path.write_bytes(path.read_bytes() + b'{"image": "\xff"}\n')
    with pytest.raises(SampleError, match=r"s\.jsonl:2: not UTF-8"):
        read_samples(path)


def test_link_inside_the_folder_is_fine_and_loops_are_not(folder):
    os.symlink("a.png", folder / "images" / "inside.png")
    os.symlink("loop.png", folder / "images" / "loop.png")
    assert read_samples(write(folder, {**UND, "image": "images/inside.png"}))
    with pytest.raises(SampleError, match=r"loop\.png' (cannot be opened|does not exist)"):
        read_samples(write(folder, {**UND, "image": "images/loop.png"}))


def test_header_only_reading_leaves_pixels_alone(traps):
    path = write(traps, {**UND, "image": "images/cut.png"})
    assert len(read_samples(path, decode_images=False)) == 1


def test_missing_and_empty_files_and_wrong_options(folder):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such sample file"):
        read_samples(folder / "none.jsonl")
    with pytest.raises(FileNotFoundError):
        read_samples(folder)
    with pytest.raises(SampleError, match="no samples"):
        read_samples(write(folder, "", ""))
    with pytest.raises(ValueError, match="'raise' or 'skip'"):
        read_samples(write(folder, GEN), on_error="ignore")


# ---- properties ----------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(
    lambda t: t.strip() and "<image>" not in t
)
ONE_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@ONE_FOLDER
@given(
    turns=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3),
    newline=st.sampled_from(["\n", "\r\n"]),
    ascii_only=st.booleans(),
    marker_first=st.booleans(),
)
def test_what_is_written_is_read(folder, turns, newline, ascii_only, marker_first):
    (question, answer), rest = turns[0], turns[1:]
    marked = f"<image>\n{question}" if marker_first else f"{question}\n<image>"
    values = [marked, answer, *(text for turn in rest for text in turn)]
    lines = [json.dumps(e, ensure_ascii=ascii_only) for e in (entry(*values), entry(question, "<image>"))]
    und, gen = read_samples(write(folder, *lines, newline=newline))
    assert und.turns == tuple((q.strip(), a.strip()) for q, a in turns)
    assert gen.turns == ((question.strip(), ""),)
    assert (und.task, gen.task) == ("understanding", "generation")


KEYS = st.sampled_from(["image", "conversations", "from", "value", "type"])
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["<image>", "human"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["image", "conversations", "from", "value", "type"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@ONE_FOLDER
@given(bad=st.lists(JSON.map(json.dumps) | st.binary(max_size=40), max_size=4))
def test_any_line_is_a_sample_or_a_named_problem(folder, bad):
    """Nothing crashes the reader, no line goes missing, and good lines survive bad neighbours."""
    raw = [line.encode() if isinstance(line, str) else line.replace(b"\n", b"") for line in bad]
    path = folder / "s.jsonl"
    path.write_bytes(b"\n".join([json.dumps(GEN).encode(), *raw, json.dumps(UND).encode()]))
    samples = read_samples(path, on_error="skip")
    assert len(samples) + samples.n_skipped == 2 + sum(bool(line.strip()) for line in raw)
    assert {"s.jsonl:1", f"s.jsonl:{2 + len(raw)}"} <= {s.id for s in samples}
    assert all(problem.split(": ")[0].startswith("s.jsonl:") for problem in samples.problems)
    if samples.problems:
        with pytest.raises(SampleError):
            read_samples(path)


@ONE_FOLDER
@given(name=st.text(st.sampled_from("./\\ab:\0 é\ud800"), max_size=12) | st.text(max_size=8))
def test_no_path_leaves_the_folder(folder, name):
    (folder.parent / "outside.png").write_bytes((folder / "images" / "a.png").read_bytes())
    samples = read_samples(write(folder, json.dumps({**UND, "image": name}), GEN), on_error="skip")
    for sample in samples:
        assert all(image.is_relative_to(folder.resolve()) for image in sample.images)
