"""Result files written as the scorers write them, read back; and files that no scorer wrote, refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimal_aia.cli import main
from minimal_aia.evaluation.imported import TABLE, import_scores

TAGS = ["single_object", "two_object", "counting", "colors", "position", "color_attr"]


def geneval_frame(correct: list[list[bool]]) -> pd.DataFrame:
    """One row a picture as evaluate_images.py collects them: `correct[p][i]` of prompt p, picture i."""
    rows = []
    for p, pictures in enumerate(correct):
        metadata = {"tag": TAGS[p % 6], "include": [{"class": "a", "count": p}], "prompt": f"a photo/{p} é"}
        for i, right in enumerate(pictures):
            rows.append(
                {
                    "filename": f"images/{p:05d}/samples/{i:04d}.png",
                    "tag": metadata["tag"],
                    "prompt": metadata["prompt"],
                    "correct": right,
                    "reason": "" if right else "expected a>=1, found 0",
                    "metadata": json.dumps(metadata),
                    "details": json.dumps({"a": [[0.5, 1.0]]}),
                }
            )
    return pd.DataFrame(rows)


def write_geneval(path, frame: pd.DataFrame):
    with path.open("w") as file:
        frame.to_json(file, orient="records", lines=True)
    return path


def value(table: pd.DataFrame, metric: str, group: str) -> tuple[float, int]:
    (row,) = table[(table["metric"] == metric) & (table["group"] == group)].itertuples()
    return row.value, row.items


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=4), min_size=1, max_size=9))
@settings(max_examples=40)
def test_geneval_gives_what_its_summary_prints(tmp_path_factory, correct):
    frame = geneval_frame(correct)
    path = write_geneval(tmp_path_factory.mktemp("g") / "results.jsonl", frame)
    table = import_scores(path, model="m")
    assert list(table.columns) == TABLE
    by_tag: dict[str, list[bool]] = {}  # by hand, not by pandas
    for p, pictures in enumerate(correct):
        by_tag.setdefault(TAGS[p % 6], []).extend(pictures)
    shares = {tag: sum(rights) / len(rights) for tag, rights in by_tag.items()}
    for tag, share in shares.items():
        assert value(table, "score", tag) == (pytest.approx(share), len(by_tag[tag]))
    n = sum(map(len, correct))
    assert value(table, "score", "overall") == (pytest.approx(sum(shares.values()) / len(shares)), n)
    assert value(table, "images", "overall") == (pytest.approx(sum(map(sum, correct)) / n), n)
    assert value(table, "prompts", "overall") == (
        pytest.approx(sum(map(any, correct)) / len(correct)),
        len(correct),
    )
    assert (table["harness"].unique(), table["version"].unique()) == (["geneval"], ["unknown"])


def dpg_text(scores: dict[str, list[float]], model="images") -> str:
    """As compute_dpg_bench.py writes it: a line a grid, then the summary."""
    lines, means = [], []
    for path, each in scores.items():
        mean = sum(each) / len(each)
        means.append(mean)
        lines.append(path + ", " + ", ".join(str(x) for x in each) + ", " + str(mean))
    return "\n".join(lines) + (
        f"\nModel: {model}\nL1 category scores:\n\tentity: {np.mean([0.5, 1]) * 100}\n\tother: 100.0\n"
        "L2 category scores:\n\tentity - part: 50.0\n\tentity - whole: 100.0\n\tother - count: 100.0\n"
        f"Image path: {model}\nSave results to: {model}/dpg-bench_1_results.txt\n"
        f"DPG-Bench score: {np.mean(means) * 100}\n"
    )


@given(
    st.dictionaries(
        st.from_regex(r"[a-z0-9 ,._-]{0,8}[a-z0-9]\.png", fullmatch=True),
        st.lists(st.floats(0, 1), min_size=1, max_size=4),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=60)
def test_dpg_gives_the_score_and_the_categories(tmp_path_factory, scores):
    path = tmp_path_factory.mktemp("d") / "results.txt"
    path.write_text(dpg_text({f"some, where/{name}": each for name, each in scores.items()}))
    table = import_scores(path, version="3c228f1")
    expected = 100 * sum(sum(each) / len(each) for each in scores.values()) / len(scores)
    assert value(table, "score", "overall") == (pytest.approx(expected, abs=1e-9), len(scores))
    found = dict(zip(table["group"], table["value"], strict=True))
    assert found.pop("overall") == pytest.approx(expected, abs=1e-9)
    assert found == {
        "L1 entity": 75.0,
        "L1 other": 100.0,
        "L2 entity - part": 50.0,
        "L2 entity - whole": 100.0,
        "L2 other - count": 100.0,
    }
    assert table["items"].isna().sum() == 5
    assert (table["model"].unique(), table["version"].unique()) == (["images"], ["3c228f1"])


LMMS = {
    "results": {
        "pope": {
            "alias": "pope",
            "pope_accuracy,none": 0.875,
            "pope_accuracy_stderr,none": 0.1,
            "pope_accuracy_stderr_clt,none": 0.1,
            "submission,none": None,
            "pope_yes_ratio,none": 0.5,
            " ": " ",
        },
        "lab": {"right,strict": 1, "right_stderr,strict": "N/A"},
    },
    "n-samples": {"pope": {"original": 9000, "effective": 8}},
    "model_name": "lab/unified",
    "harness_version": "0.7.3",
}


def test_lmms_gives_every_number_with_its_items(tmp_path):
    path = tmp_path / "20260101_results.json"
    path.write_text(json.dumps(LMMS))
    table = import_scores(path)
    rows = [tuple(None if v is pd.NA else v for v in row) for row in table.itertuples(index=False)]
    assert rows == [
        ("lab/unified", "pope", "pope_accuracy", "overall", 0.875, 8, "lmms", "0.7.3"),
        ("lab/unified", "pope", "pope_yes_ratio", "overall", 0.5, 8, "lmms", "0.7.3"),
        ("lab/unified", "lab", "right", "strict", 1.0, None, "lmms", "0.7.3"),
    ]
    assert set(import_scores(path, model="mine", version="x")["model"]) == {"mine"}


GOOD = geneval_frame([[True, False], [True]])


def broken(line: int, **change) -> str:
    rows = [json.loads(text) for text in GOOD.to_json(orient="records", lines=True).splitlines()]
    rows[line - 1] |= change
    return "".join(json.dumps(row) + "\n" for row in rows)


DPG = dpg_text({"a/0.png": [1.0, 0.5], "a/1.png": [0.25, 0.25]})
BAD = [
    ("r.jsonl", broken(2, correct="yes"), r"r\.jsonl:2: no 'correct' of type bool; is this GenEval's"),
    ("r.jsonl", broken(3, tag=None), r"r\.jsonl:3: no 'tag' of type str"),
    ("r.jsonl", broken(1) + "{\n", r"r\.jsonl:4: not JSON"),
    ("r.jsonl", broken(1) + "\n" + broken(1), r"r\.jsonl:4: not JSON"),
    ("r.jsonl", broken(1) + broken(1), r"r\.jsonl:4: .*0000\.png was scored on line 1 already"),
    ("r.jsonl", "[1]\n", r"r\.jsonl:1: no 'filename'"),
    ("r.jsonl", "", r"r\.jsonl: the file is empty"),
    ("r.txt", DPG.replace("0.75\n", "0.7\n"), r"r\.txt:1: the last number is not the mean"),
    ("r.txt", DPG.replace("a/1.png", "a/0.png"), r"r\.txt:2: a/0\.png was scored above already"),
    ("r.txt", DPG.replace("score: 50.0", "score: 51.0"), r"r\.txt:13: the score 51\.0 is not that of the 2"),
    ("r.txt", DPG.replace("part: 50.0", "part: nan"), r"r\.txt:8: 'nan' is not a number"),
    ("r.txt", DPG.split("Model")[0], r"r\.txt: no summary at its end; the scorer has not finished"),
    ("r.txt", "", r"r\.txt: no summary"),
    ("r.txt", "Prompt\n" + DPG, r"r\.txt:1: not a line that DPG-Bench's scorer writes: 'Prompt'"),
    ("r.json", '{"results":\n{,}}', r"r\.json:2: not JSON"),
    ("r.json", "[]", r"r\.json:1: no 'results' by task"),
    ("r.json", '{"results": {"mme": 1}}', r"r\.json:1: no 'results' by task"),
    ("r.json", '{"results": {"mme": {"alias": "mme"}}}', r"r\.json:1: 'results' holds no number"),
    ("r.json", json.dumps({**LMMS, "model_name": ""}), r"does not name the model: say --model"),
    ("r.csv", "a,b\n", r"r\.csv: whose result file is this\? Say --harness"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD)
def test_what_no_scorer_wrote_is_refused_with_file_and_line(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    model = None if name.endswith(".json") else "m"
    with pytest.raises(ValueError, match=message):
        import_scores(path, model=model)


@given(st.text(max_size=200), st.sampled_from(["geneval", "dpg", "lmms"]))
@settings(max_examples=150)
def test_any_text_is_a_table_or_one_clear_error(tmp_path_factory, text, harness):
    path = tmp_path_factory.getbasetemp() / f"any-{harness}"
    path.write_bytes(text.encode("utf-8", "replace"))
    with pytest.raises(ValueError, match="any-"):  # nobody's result file is made by chance
        import_scores(path, harness, model="m")


def test_the_command_puts_files_of_three_harnesses_into_one_table(tmp_path, capsys):
    one = write_geneval(tmp_path / "results.jsonl", GOOD)
    (two := tmp_path / "r.txt").write_text(DPG)
    (three := tmp_path / "r.json").write_text(json.dumps(LMMS))
    files, out = [str(one), str(two), str(three)], tmp_path / "scores.csv"
    assert main(["import-scores", *files, "--model", "aia", "--out", str(out)]) == 0
    table = pd.read_csv(out)
    assert list(table.columns) == TABLE
    assert table["harness"].value_counts().to_dict() == {"dpg": 6, "geneval": 5, "lmms": 3}
    assert set(table["model"]) == {"aia"}
    assert math.isclose(value(table, "score", "single_object")[0], 0.5)
    assert "wrote 14 scores" in capsys.readouterr().out
    assert main(["import-scores", str(three)]) == 0
    assert "pope_accuracy" in capsys.readouterr().out

    for arguments, message in [
        ([str(one)], "GenEval's result file does not name the model"),
        ([str(two), "--out", "x.xlsx"], "must be .csv or .parquet"),
        ([str(tmp_path / "none.json")], "no such result file"),
    ]:
        assert main(["import-scores", *arguments]) == 2
        assert message.lower() in capsys.readouterr().err.lower()
