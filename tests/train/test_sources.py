"""The same samples out of JSON lines, `datasets` folders, parquet files and streams."""

from __future__ import annotations

import io
import json
import pickle

import datasets
import pytest
from data_fakes import content, entries, write_lines, write_pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minimal_aia.data import IMAGE, SampleError, read_samples
from minimal_aia.pictures import PictureBytes, open_picture
from minimal_aia.train import open_source as opening
from minimal_aia.train.open_source import open_source
from minimal_aia.train.sources import LineSource, StreamSource, TableSource

TASKS = ("generation", "understanding")


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    """What `datasets` copies goes with the test."""
    import datasets.config

    old, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, tmp_path_factory.mktemp("hf")
    yield
    datasets.config.HF_DATASETS_CACHE = old


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven samples a task as JSON lines, as a list, as a mixed file, as Arrow folders and as parquet."""
    folder = tmp_path_factory.mktemp("data")
    pictures = write_pictures(folder)
    mixed = []
    for task in TASKS:
        rows = entries(task, 7, pictures)
        mixed += rows
        write_lines(folder / f"{task}.jsonl", rows)
        (folder / f"{task}.json").write_text(json.dumps(rows))
        # As tables, pictures are bytes; several in a row make a list column.
        packed = [
            {**row, "images": [{"path": None, "bytes": (folder / n).read_bytes()} for n in names]}
            for row in rows
            for names in [row["image"] if isinstance(row["image"], list) else [row["image"]]]
        ]
        for row in packed:
            del row["image"]
        turn = {"from": datasets.Value("string"), "value": datasets.Value("string")}
        features = datasets.Features(
            images=datasets.List(datasets.Image()),
            conversations=datasets.List(turn),
            type=datasets.Value("string"),
            source=datasets.Value("string"),
        )
        table = datasets.Dataset.from_list(packed, features=features)
        table.save_to_disk(str(folder / f"{task}-arrow"))
        datasets.DatasetDict(train=table).save_to_disk(str(folder / f"{task}-splits"))
        (folder / f"{task}-parquet").mkdir()
        table.select(range(4)).to_parquet(str(folder / f"{task}-parquet" / "0.parquet"))
        table.select(range(4, 7)).to_parquet(str(folder / f"{task}-parquet" / "1.parquet"))
    write_lines(folder / "mixed.jsonl", mixed)
    return folder


LAYOUTS = [
    "{task}.jsonl",
    "{task}.json",
    "mixed.jsonl",
    "{task}-arrow",
    "{task}-splits",
    "{task}-parquet",
    "{task}-parquet/*.parquet",
    "stream:{task}-arrow",
    "stream:{task}-parquet",
]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_samples_of_the_file(folder, layout, task):
    wanted = [content(sample) for sample in read_samples(folder / f"{task}.jsonl")]
    prefix, _, name = layout.format(task=task).rpartition(":")
    spec = f"{prefix}:{folder / name}" if prefix else str(folder / name)
    source = open_source(spec, task, block=7)
    assert len(source) == 7
    found = [source[i] for i in (6, 0, 3, 1, 2, 4, 5)]  # in any order
    assert [content(found[i]) for i in (1, 3, 4, 2, 5, 6, 0)] == wanted
    assert len({sample.id for sample in found}) == 7
    assert all(source.text_bytes(i) >= len(str(wanted[i][1][0][0])) for i in range(7))
    again = pickle.loads(pickle.dumps(source))  # as a spawned worker gets it
    assert content(again[2]) == wanted[2]


def test_ids_name_the_line_of_a_mixed_file(folder):
    assert open_source(str(folder / "mixed.jsonl"), "understanding")[0].id == "mixed.jsonl:8"
    assert open_source(str(folder / "understanding.json"), "understanding")[1].id == "understanding.json:2"
    assert open_source(str(folder / "generation-arrow"), "generation")[3].id == "generation-arrow:3"


def test_rows_of_a_caption_table_are_generation(tmp_path):
    image = io.BytesIO()
    Image.new("RGB", (5, 4), "red").save(image, "PNG")
    rows = [{"jpg": {"path": "a.png", "bytes": image.getvalue()}, "caption": " two birds "}]
    table = datasets.Dataset.from_list(rows, features=datasets.Features(
        jpg=datasets.Image(), caption=datasets.Value("string")))  # fmt: skip
    table.save_to_disk(str(tmp_path / "t"))
    sample = open_source(str(tmp_path / "t"), "generation")[0]
    assert (sample.task, sample.turns) == ("generation", (("two birds", ""),))
    assert isinstance(sample.images[0], PictureBytes)
    assert open_picture(sample.images[0]).size == (5, 4)
    with pytest.raises(SampleError, match=r"t:0: a sample for generation among those for understanding"):
        open_source(str(tmp_path / "t"), "understanding")[0]


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip),
            st.booleans(),
            st.sampled_from(["", "\n", " \r\n"]),
        ),
        min_size=1,
        max_size=8,
    ),
    st.booleans(),
)
def test_lines_are_found_where_read_samples_finds_them(tmp_path_factory, rows, ascii_only):
    """Any text, blank lines, escapes: the n-th sample of each task has the same words and line number."""
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    write_pictures(path.parent, 1)
    lines = []
    for i, (text, generation, blank) in enumerate(rows):
        text = f"{i} {text.replace(IMAGE, '')}"
        turns = (text, IMAGE) if generation else (f"{IMAGE}\n{text}", text)
        said = [{"from": who, "value": v} for who, v in zip(("human", "gpt"), turns)]
        line = json.dumps({"image": "images/0.png", "conversations": said}, ensure_ascii=ascii_only)
        if i % 2:  # as some writers of JSON escape it
            line = line.replace(IMAGE, "\\u003cimage\\u003e")
        lines.append(line + "\n" + blank)
    path.write_bytes("".join(lines).encode())
    read = read_samples(path)
    for task in TASKS:
        wanted = [sample for sample in read if sample.task == task]
        if not wanted:
            with pytest.raises(ValueError, match=f"no sample for {task}"):
                LineSource(path, task)
            continue
        source = LineSource(path, task)
        assert [source[i] for i in range(len(source))] == wanted


def test_bad_samples_are_errors_of_their_own(tmp_path):
    names = write_pictures(tmp_path)
    rows = entries("generation", 5, names)
    rows[1]["image"] = "images/none.png"
    rows[2]["image"] = "../secret.png"
    rows[3]["conversations"][0]["value"] = " "
    path = write_lines(tmp_path / "x.jsonl", rows)
    path.write_text(path.read_text() + '{"value": "<image>"\n')
    source = open_source(str(path), "generation")
    assert source[0].id == "x.jsonl:1"
    for i, reason in {
        1: r"x.jsonl:2: .*does not exist",
        2: r"x.jsonl:3: .*leaves the folder",
        3: r"x.jsonl:4: turn 1 \(human\) is empty",
        5: r"x.jsonl:6: malformed JSON",
    }.items():
        with pytest.raises(SampleError, match=reason):
            source[i]
    source.check = "none"  # codes are there: the picture need not be, but its path is still no way out
    assert source[1].id == "x.jsonl:2"
    with pytest.raises(SampleError, match="leaves the folder"):
        source[2]


def test_bytes_are_checked_like_files(tmp_path):
    rows = [{"images": [{"path": "b.tiff", "bytes": b"II*\0" + b"\0" * 60}], "prompt": "x"}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "t"))
    with pytest.raises(SampleError, match=r"t:0: image 'b.tiff' is unreadable"):
        open_source(str(tmp_path / "t"), "generation")[0]


def test_another_image_folder_and_absolute_paths_into_it(tmp_path):
    names = write_pictures(tmp_path / "pictures")
    rows = entries("generation", 2, names)
    (tmp_path / "lists").mkdir()
    path = write_lines(tmp_path / "lists" / "x.jsonl", rows)
    assert open_source(str(path), "generation", tmp_path / "pictures")[1].images[0].is_file()
    for row in rows:
        row["image"] = str((tmp_path / "pictures" / row["image"]).resolve())
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "t"))
    source = open_source(str(tmp_path / "t"), "generation", tmp_path / "pictures")
    assert source[1].images[0].is_file()
    with pytest.raises(SampleError, match="leaves the folder"):  # without leave
        open_source(str(tmp_path / "t"), "generation")[1]


def test_a_fingerprint_changes_with_the_data(folder, tmp_path):
    lines = (folder / "generation.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl").write_text(lines.replace("circle", "square", 1))
    one, same, other = (
        open_source(str(p), "generation").fingerprint
        for p in (folder / "generation.jsonl", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    )
    assert one == same != other
    tables = [open_source(str(folder / f"{task}-arrow"), task).fingerprint for task in TASKS]
    assert tables[0] != tables[1]


def test_a_stream_goes_on_after_its_end_and_from_anywhere(folder):
    """Any number, forwards, backwards, beyond the end: the row is number modulo length."""
    wanted = [content(sample) for sample in read_samples(folder / "generation.jsonl")]
    source = open_source(f"stream:{folder / 'generation-parquet'}", "generation", block=3)
    assert isinstance(source, StreamSource)
    for i in [0, 1, 5, 8, 20, 19, 2, 300, 301, 4]:
        assert content(source[i]) == wanted[i % 7], i
    again = open_source(f"stream:{folder / 'generation-parquet'}", "generation", block=3)
    assert content(again[100]) == wanted[100 % 7]  # a resumed run starts here


def test_a_stream_decodes_no_picture_and_reads_each_row_once(folder, monkeypatch):
    source = open_source(f"stream:{folder / 'generation-parquet'}", "generation", block=3)
    read, inner = [], source._read
    monkeypatch.setattr(source, "_read", lambda: read.append(1) or inner())
    monkeypatch.setattr(Image, "open", lambda *a, **k: pytest.fail("decoded a picture"))
    assert [source.text_bytes(i) > 0 for i in range(12)] == [True] * 12
    assert len(read) == 12


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ("none.jsonl", "none.jsonl: no such sample file"),
        ("none", "none: no such data: expected a .jsonl or .parquet file"),
        ("none.parquet", "none.parquet: no such parquet file"),
        ("stream:generation.jsonl", "JSON lines need no streaming"),
        ("images", r"images/\*.parquet: no such parquet file, nor a folder"),
        ("understanding-only.jsonl", "holds no sample for generation"),
        ("list.json", "a .json file holds a list"),
        ("other-columns", "no column conversations, prompt, caption, text, txt"),
        ("no-train", "no split train; give the folder of one of test"),
        ("broken", "broken: not a complete folder of save_to_disk"),
        ("damaged.parquet", r"damaged.parquet: the data set could not be read"),
        ("empty.parquet", "empty.parquet: the data set could not be read"),
    ],
)
def test_what_cannot_be_opened_is_one_clear_error(folder, tmp_path, spec, error, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path, 1)
    write_lines(tmp_path / "understanding-only.jsonl", entries("understanding", 2, ["images/0.png"]))
    (tmp_path / "list.json").write_text('{"a": 1}')
    (tmp_path / "generation.jsonl").write_text((folder / "generation.jsonl").read_text())
    other = datasets.Dataset.from_list([{"url": "x"}])
    other.save_to_disk("other-columns")
    datasets.DatasetDict(test=other).save_to_disk("no-train")
    datasets.Dataset.from_list([{"prompt": "x"}]).select([]).to_parquet("empty.parquet")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{}")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 no")
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        open_source(spec, "generation")


def test_a_table_without_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="empty: the data set has no rows"):
        TableSource(datasets.Dataset.from_dict({"prompt": []}), "empty", "generation", tmp_path)


def test_without_datasets_the_error_says_what_to_install(monkeypatch, folder):
    monkeypatch.setattr(opening.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "minimal-aia\[train\]"'):
        open_source(str(folder / "generation-arrow"), "generation")
    assert len(open_source(str(folder / "generation.jsonl"), "generation")) == 7
