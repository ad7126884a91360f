"""The plug-in inside lmms-eval's own evaluator: a task of ours without any hub, and the paper's tasks on data
that we invented. `make test-eval` installs the harness; without it the tests that need it are skipped."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from checkpoints import MAKERS

from minimal_aia.cli import main
from minimal_aia.data import read_samples
from minimal_aia.evaluation.understanding import TASKS, check_tasks, evaluate_understanding
from minimal_aia.models import load_adapter

torch.set_num_threads(1)
HERE = Path(__file__).parent
SAMPLES = HERE.parents[1] / "data_samples" / "understanding.jsonl"
harness = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None,
    reason="lmms-eval is not installed (make test-eval installs it)",
)


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """No hub, and the harness's copy of our data in a temporary folder."""
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    patch.delenv("OPENAI_API_KEY", raising=False)
    yield
    patch.undo()


@pytest.fixture
def lab_task(tmp_path):
    """The folder of our task, with the lab's 60 questions of data_samples; and those samples."""
    folder = shutil.copytree(HERE / "lab_task", tmp_path / "tasks")
    samples = [s for s in read_samples(SAMPLES) if s.source == "lab"]
    lines = [
        json.dumps({"picture": str(s.images[0]), "question": s.turns[0][0], "answer": s.turns[0][1]}) + "\n"
        for s in samples
    ]
    (folder / "lab_questions.jsonl").write_text("".join(lines))
    yaml = folder / "lab_questions.yaml"
    yaml.write_text(yaml.read_text().replace("DATA", str(folder / "lab_questions.jsonl")))
    return folder, samples


def answers(out: Path) -> dict[int, str]:
    lines = (out / "samples_lab_questions.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["doc_id"]: row["filtered_resps"][0] for row in map(json.loads, lines)}


@harness
def test_a_lab_model_through_the_harness_scores_what_its_own_metric_says(lab_task, tmp_path):
    from minimal_aia.lab.metrics import answers_right
    from minimal_aia.models.lab import _sequences

    folder, samples = lab_task
    adapter = load_adapter("lab/unified", device="cpu")
    out = tmp_path / "scores"
    table = evaluate_understanding(adapter, ["lab_questions"], out=out, batch_size=16, include=folder)
    right = answers_right(adapter.model, _sequences(adapter.collate(samples, "understanding")))
    (row,) = table.itertuples()
    assert (row.model, row.task, row.metric, row.items) == ("lab/unified", "lab_questions", "right", 60)
    assert row.value == pytest.approx(right.mean())
    assert (row.harness, row.version) == ("lmms", importlib.metadata.version("lmms-eval"))
    said = answers(out)
    assert [said[i] == s.turns[0][1] for i, s in enumerate(samples)] == right.tolist()
    pd.testing.assert_frame_equal(pd.read_csv(out / "scores.csv"), table, check_dtype=False)

    alone = tmp_path / "alone"
    few = evaluate_understanding(adapter, ["lab_questions"], out=alone, limit=6, batch_size=1, include=folder)
    assert few["items"].tolist() == [6]
    assert answers(alone) == {i: said[i] for i in range(6)}


@harness
def test_a_tiny_janus_through_the_command(lab_task, tmp_path, capsys):
    """Weights from a folder, as a trained checkpoint comes; noise answers, so nothing is right."""
    model = MAKERS["janus"](tmp_path / "tiny")
    command = [
        "evaluate",
        "understanding",
        "--model",
        str(model),
        "--device",
        "cpu",
        "--tasks",
        "lab_questions",
    ]
    command += ["--include", str(lab_task[0]), "--limit", "5"]
    for name, size in (("together", "5"), ("alone", "1")):
        assert main([*command, "--batch-size", size, "--out", str(tmp_path / name)]) == 0, (
            capsys.readouterr().err
        )
    said = capsys.readouterr().out
    assert "lab_questions" in said
    assert f"wrote results.json, scores.csv and every answer to {tmp_path / 'alone'}" in said
    assert answers(tmp_path / "together") == answers(tmp_path / "alone")
    assert len(answers(tmp_path / "alone")) == 5
    assert pd.read_csv(tmp_path / "alone" / "scores.csv")["value"].tolist() == [0.0]
    assert main(["import-scores", str(tmp_path / "alone" / "results.json")]) == 0
    assert main([*command, "--tasks", "lab_question"]) == 2
    assert "no task 'lab_question'; did you mean lab_questions" in capsys.readouterr().err


@harness
def test_lmms_eval_finds_the_plug_in_by_its_entry_point():
    from lmms_eval.models import get_model

    from minimal_aia.evaluation.lmms_plugin import MinimalAIA

    assert get_model("minimal_aia") is MinimalAIA
    model = MinimalAIA.create_from_arg_string(
        "pretrained=lab/understanding,dtype=float32",
        {"batch_size": 4, "device": "cpu", "max_batch_size": None},
    )
    assert (model.batch_size, model.adapter.name, model.is_simple) == (4, "lab/understanding", False)
    with pytest.raises(ValueError, match="say which model"):
        MinimalAIA.create_from_arg_string("batch_size=2")


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def invented() -> dict[str, tuple[str, list[dict]]]:
    """A few items of each benchmark, with the columns that its task reads: name -> (split, items)."""
    mmmu = {"id": "validation_Art_{}", "question_type": "multiple-choice", "options": "['cat', 'dog']"}
    bench = {"hint": "nan", "category": "a", "L2-category": "b", "source": "c", "split": "dev", "E": "nan"}
    options = {"A": "cat", "B": "dog", "C": "nan", "D": "nan"}
    turned = {"A": "dog", "B": "cat", "C": "nan", "D": "nan"}
    return {
        "mme": (
            "test",
            [
                {
                    "question_id": f"{kind}/{i // 2}.png",
                    "category": kind,
                    "image": picture(i),
                    "answer": answer,
                }
                | {"question": f"Is it {i}? Please answer yes or no."}
                for kind in ("color", "OCR", "code_reasoning")
                for i, answer in enumerate(("Yes", "No", "Yes", "No"))
            ],
        ),
        "pope": (
            "test",
            [
                {"question_id": str(i), "question": "Is there a cat?", "answer": a, "image": picture(i)}
                for i, a in enumerate(("yes", "no", "no", "no"))
            ],
        ),
        "mmmu": (
            "validation",
            [
                mmmu
                | {"id": f"validation_Art_{i}", "answer": a, "image_1": picture(i), "image_2": picture(9)}
                | {"question": "Which of <image 1> and <image 2>?"}
                for i, a in enumerate("AB")
            ],
        ),
        "mmbench-en": (
            "dev",
            [
                bench | options | {"index": 1, "question": "q", "answer": "A", "image": picture(1)},
                bench | turned | {"index": 1_000_001, "question": "q", "answer": "B", "image": picture(1)},
                bench | options | {"index": 2, "question": "r", "answer": "B", "image": picture(2)},
            ],
        ),
        "mmvp": (
            "train",
            [
                {"Index": i + 1, "Question": "q", "Options": "(a) Long (b) Short", "Correct Answer": f"({a})"}
                | {"image": picture(i)}
                for i, a in enumerate("abba")
            ],
        ),
    }


@pytest.fixture
def invented_data(monkeypatch):
    """`datasets.load_dataset` gives the invented items. Returns them by the harness's task name."""
    import datasets

    items = {TASKS[name]: (split, rows) for name, (split, rows) in invented().items()}
    places = {
        "MME": "mme",
        "POPE": "pope",
        "MMMU": "mmmu_val",
        "MMBench": "mmbench_en_dev_static",
        "MMVP": "mmvp",
    }

    def load_dataset(path, **_):
        split, rows = items[places[path.split("/")[1]]]
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return items


@harness
@pytest.mark.parametrize("truthful", [True, False])
def test_the_papers_tasks_score_true_and_wrong_answers(invented_data, monkeypatch, tmp_path, truthful):
    """The harness's own task files and scorers around our plug-in; in the model's place one that knows."""
    pytest.importorskip("openpyxl", reason="MMBench's task writes a spreadsheet")
    from minimal_aia.evaluation import lmms_plugin

    asked = []

    def respond(adapter, conversations, limit):
        return [reply(c) for c in conversations]

    def reply(conversation):
        (message,) = conversation
        pictures = [p["image"] for p in message["content"] if p["type"] == "image"]
        text = "\n".join(p["text"] for p in message["content"] if p["type"] == "text")
        asked.append((len(pictures), text))
        for _, rows in invented_data.values():
            for row in rows:
                shown = row.get("image", row.get("image_1"))
                question = row.get("question", row.get("Question"))
                head = question.split("<image")[0].replace("Please answer yes or no.", "").strip()
                if shown.tobytes() == pictures[0].tobytes() and head in text and _options(row) in text:
                    answer = row.get("answer", row.get("Correct Answer", "")).strip("()")
                    wrong = {"yes": "no", "no": "yes", "a": "b", "b": "a"}[answer.lower()]
                    return answer if truthful else wrong.upper() if len(wrong) == 1 else wrong
        raise AssertionError(f"an item nobody invented: {text!r}")

    monkeypatch.setattr(lmms_plugin, "respond", respond)
    adapter = load_adapter("lab/understanding", device="cpu")
    table = evaluate_understanding(adapter, list(invented()), out=tmp_path, batch_size=4)
    found = {(row.task, row.metric): row.value for row in table.itertuples()}
    best = {
        ("mme", "mme_perception_score"): 400.0,  # two categories of 200
        ("mme", "mme_cognition_score"): 200.0,
        ("pope", "pope_accuracy"): 1.0,
        ("pope", "pope_f1_score"): 1.0,
        ("mmmu_val", "mmmu_acc"): 1.0,
        ("mmbench_en_dev_static", "gpt_eval_score"): 100.0,
        ("mmvp", "mmvp_accuracy"): 1.0,
        ("mmvp", "mmvp_pair_accuracy"): 1.0,
    }
    assert {key: found[key] for key in best} == {k: v if truthful else 0.0 for k, v in best.items()}
    assert found["pope", "pope_yes_ratio"] == 0.25  # of the truth, whatever the model says
    assert len(asked) == 27 - 2  # counted: 12 + 4 + 2 + 3 + 4
    assert {n for n, text in asked if "Which of" in text} == {2}
    assert all("<image" not in text for _, text in asked)


def _options(row: dict) -> str:
    """What tells MMBench's rotations of one question apart."""
    return f"A. {row['A']}" if "A" in row else ""


@harness
def test_data_that_cannot_be_had_is_one_clear_error(monkeypatch):
    import datasets

    def load_dataset(*_, **__):
        raise ConnectionError("the hub is far away")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the harness's attempts
    adapter = load_adapter("lab/understanding", device="cpu")
    with pytest.raises(
        OSError, match=r"data of pope could not be loaded \(ConnectionError: the hub is far away"
    ):
        evaluate_understanding(adapter, ["pope"])


@harness
def test_every_task_of_the_paper_exists_in_the_harness():
    from lmms_eval.tasks import TaskManager

    assert set(TASKS.values()) <= set(TaskManager("ERROR").all_tasks)


def test_what_would_fail_later_is_refused_first(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match="--limit 7 must be even"):
        check_tasks(["mme"], 7)
    check_tasks(["mme"], 8)
    with pytest.raises(ValueError, match=r"graded by an LLM.* OPENAI_API_KEY"):
        check_tasks(["pope", "mm-vet"], None)
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    check_tasks(["mm-vet"], None)
    with pytest.raises(ValueError, match=r"no task given; the paper's are mme, pope"):
        check_tasks([""], None)
    command = ["evaluate", "understanding", "--tasks", "pope", "--device", "cpu"]
    for arguments, message in [
        (["--model", "lab/unified", "--include", str(tmp_path / "none")], "no such folder"),
        (["--model", str(tmp_path / "none")], "no such folder"),
        (["--model", str(MAKERS["simplear"](tmp_path / "s"))], "does generation, not understanding"),
        (["--model", "lab/unified", "--processes", "3"], "3 processes were asked for"),
    ]:
        assert main([*command, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_without_the_harness_the_command_says_how_to_get_it(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lmms_eval" else real(name))
    assert main(["evaluate", "understanding", "--model", "lab/unified", "--tasks", "mme"]) == 2
    error = capsys.readouterr().err
    assert 'pip install "minimal-aia[eval]"' in error
    assert "--no-deps -r tests/evaluation/requirements.txt" in error
    assert (HERE / "requirements.txt").is_file()
