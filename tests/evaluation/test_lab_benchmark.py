"""The lab's benchmark: a perfect model gets 1, guessers their level, and every number can be had by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from lab_subjects import Oracle, Unbound, scene_of

from minimal_aia.cli import main
from minimal_aia.evaluation import lab_benchmark as bench
from minimal_aia.evaluation.answers import answer_to, blind_answer, pairings, unbound
from minimal_aia.evaluation.scores import SCORE_COLUMNS, scores
from minimal_aia.evaluation.subjects import LabModel, lab_subject, origin
from minimal_aia.lab import images, metrics, models, scenes
from minimal_aia.lab.scenes import Prompt, Thing
from minimal_aia.lab.sequences import BOI, BOS, EOI, EOS, FIRST_CODE, WORDS, word_ids

torch.set_num_threads(1)
ITEMS = 12


def value(table, metric, group):
    found = table[(table["metric"] == metric) & (table["group"] == group)]
    assert len(found) == 1
    return found["value"].iloc[0]


def score(rows, name="m"):
    return scores(bench.frame(rows, name, 0), n_boot=50)


# --- true answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", scenes.QUESTION_KINDS)
def test_answers_agree_with_the_questions_that_scenes_make(kind):
    rng = np.random.default_rng(0)
    asked = [(s, scenes.draw_question(s, kind, rng)) for s in scenes.draw_scenes(rng, 150)]
    asked = [(s, q) for s, q in asked if q]
    assert len(asked) > 20
    assert [answer_to(s, q.text) for s, q in asked] == [q.answer for _, q in asked]


RED, BLUE = Thing("red", "circle", 0, 0), Thing("blue", "circle", 1, 2)
GREEN = Thing("green", "square", 2, 2)


@pytest.mark.parametrize(
    ("scene", "text", "answer"),
    [
        ((RED, BLUE), "what color is the circle ?", None),  # two circles
        ((RED, GREEN), "what color is the cross ?", None),  # none
        ((RED, GREEN), "is the circle blue or green ?", None),  # neither
        ((RED, GREEN), "is the circle blue or red ?", "red"),
        ((RED, BLUE), "how many circles are there ?", "two"),
        ((RED, BLUE), "how many crosses are there ?", "zero"),
        ((RED, BLUE, GREEN), "how many shapes are there ?", "three"),
        ((RED,) * 4, "how many shapes are there ?", None),  # no word for four
        ((RED, BLUE), "is the red circle left of the blue circle ?", "yes"),
        ((RED, BLUE), "is the red circle below the blue circle ?", "no"),
        ((RED, GREEN), "is the red circle below the blue circle ?", None),
        ((), "describe the image", None),
        ((), "is there a red circle ?", "no"),
        ((RED,), "where is the red circle ?", "top left"),
    ],
)
def test_answers_of_scenes_that_no_question_was_made_for(scene, text, answer):
    assert answer_to(scene, text) == answer


def test_an_unknown_question_is_an_error():
    with pytest.raises(ValueError, match="not a question"):
        answer_to((RED,), "why is the circle red ?")


# --- known subjects -----------------------------------------------------------------------------------------


def test_a_perfect_model_scores_one():
    table = scores(bench.benchmark(Oracle(), 30), n_boot=50)
    shares = table[table["metric"] != "yes_ratio"]
    assert set(shares["value"]) == {1.0}
    assert set(shares["metric"]) == {*bench.YES_NO, "exact_match", "drawn_right", "geneval"} - {"yes_ratio"}
    assert set(table.loc[table["metric"] == "yes_ratio", "value"]) == {0.5}


def test_a_perfect_model_that_draws_the_wrong_colour():
    table = score(bench.drawing_rows(Oracle(wrong=True).draw, 30, 0))
    assert {value(table, "drawn_right", c) for c in scenes.CATEGORIES} == {0.0}
    forgiven = {g: value(table, "geneval", g) for g in bench.GENEVAL}
    assert {g for g, v in forgiven.items() if v == 1} == {"single_object", "two_object", "counting"}
    assert forgiven["colors"] == 0


def test_guessing_without_binding_lands_on_its_level():
    """300 throws a kind against the computed chances: within four standard errors."""
    n = 300
    thrown = score(bench.answer_rows(Unbound().answer, n, 0))
    level = scores(bench.guesser("unbound", n), n_boot=50)
    for kind in scenes.QUESTION_KINDS:
        p = value(level, "exact_match", kind)
        assert value(thrown, "exact_match", kind) == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / n) + 1e-9)
    assert value(level, "exact_match", "relation") == 0.5
    assert value(level, "exact_match", "count") == 1
    # What it says about existence is not thrown: the same to the last digit.
    balance = score(bench.yes_no_rows(Unbound().answer, n, 0))
    for split in bench.SPLITS:
        for metric in bench.YES_NO:
            assert value(balance, metric, split) == pytest.approx(value(level, metric, split))
    assert value(level, "accuracy", "swapped") == 0.5


@pytest.mark.parametrize("kind", ["color", "position"])
def test_the_level_of_any_thing_is_the_model_cards(kind):
    level = scores(bench.guesser("unbound", 100), n_boot=10)
    assert value(level, "exact_match", kind) == pytest.approx(metrics.guessing_level(kind))


def test_the_blind_guesser_is_a_subject_that_sees_no_picture():
    questions = {q.text: q for kind in scenes.QUESTION_KINDS for q in bench._questions(kind, 40, 0)[1]}
    answer = lambda pictures, texts: [blind_answer(questions[text]) for text in texts]  # noqa: E731
    said = score(bench.answer_rows(answer, 40, 0))
    level = scores(bench.guesser("blind", 40), n_boot=50)
    for kind in scenes.QUESTION_KINDS:
        assert value(said, "exact_match", kind) == value(level, "exact_match", kind)
    assert value(level, "exact_match", "describe") == 0


def test_pairings_by_listing_them():
    from itertools import permutations

    for colors, shapes in (["rr", "cs"], ["rgb", "ccs"], ["rrg", "cst"], ["r", "c"], ["rrr", "ccc"]):
        found = {tuple(zip(c, s, strict=True)) for c in permutations(colors) for s in permutations(shapes)}
        # `found` counts layouts of pairs on places, which is what the unbound guesser chooses from
        assert pairings(list(colors), list(shapes)) == len(found)


def test_chances_of_the_unbound_guesser_by_hand():
    scene = (RED, GREEN)
    chance = {q.kind: unbound(scene, q) for q in scenes.draw_questions(scene, 8, np.random.default_rng(0))}
    assert chance["color"] == chance["shape"] == chance["position"] == chance["relation"] == 0.5
    assert chance["count"] == 1
    assert chance["describe"] == 0.25  # two ways for the colours, two for the shapes
    swapped = scenes.Question("is there a red square ?", "no", "existence")
    assert unbound(scene, swapped) == 0
    assert unbound(scene, scenes.Question("is there a red cross ?", "no", "existence")) == 1
    assert unbound(scene, scenes.Question("is the circle red or green ?", "red", "choice")) == 0.5
    assert unbound(scene, scenes.Question("is the circle red or blue ?", "red", "choice")) == 1


# --- yes and no ---------------------------------------------------------------------------------------------


def test_splits_are_what_they_say():
    for scene, asked in bench.existence_items(60, 0):
        assert scenes.is_held_out(scene)
        names = {t.name for t in scene}
        colors, shapes = {t.color for t in scene}, {t.shape for t in scene}
        thing = {split: tuple(q.text.split()[3:5]) for split, q in asked.items()}
        assert set(thing) == {"there", *bench.SPLITS}
        assert " ".join(thing["there"]) in names
        assert not {" ".join(thing[split]) for split in bench.SPLITS} & names
        assert (thing["near"][0] in colors) != (thing["near"][1] in shapes)
        assert thing["swapped"][0] in colors
        assert thing["swapped"][1] in shapes
        assert all(answer_to(scene, q.text) == q.answer for q in asked.values())


def test_yes_no_metrics_from_the_confusion_matrix():
    """Random answers, a few of them neither yes nor no; every metric again from counts."""
    rng = np.random.default_rng(1)
    answers = list(rng.choice(["yes", "no", "red"], p=[0.5, 0.4, 0.1], size=4 * 50))
    table = score(bench.yes_no_rows(lambda pictures, questions: answers, 50, 0))
    order = ["there", *bench.SPLITS]
    for split in bench.SPLITS:
        positive = [a for i, a in enumerate(answers) if order[i % 4] == "there"]
        negative = [a for i, a in enumerate(answers) if order[i % 4] == split]
        tp, fn = positive.count("yes"), len(positive) - positive.count("yes")
        fp, tn = negative.count("yes"), negative.count("no")
        precision, recall = tp / (tp + fp), tp / (tp + fn)
        assert value(table, "accuracy", split) == pytest.approx((tp + tn) / 100)
        assert value(table, "precision", split) == pytest.approx(precision)
        assert value(table, "recall", split) == pytest.approx(recall)
        assert value(table, "f1", split) == pytest.approx(2 * precision * recall / (precision + recall))
        assert value(table, "yes_ratio", split) == pytest.approx((tp + fp) / 100)


def test_saying_yes_to_everything_has_a_good_looking_f1():
    table = score(bench.yes_no_rows(lambda pictures, questions: ["yes"] * len(questions), 20, 0))
    level = scores(bench.guesser("blind", 20), n_boot=10)
    for metric, expected in zip(bench.YES_NO, (0.5, 0.5, 1, 2 / 3, 1), strict=True):
        assert value(table, metric, "random") == pytest.approx(expected)
        assert value(level, metric, "random") == pytest.approx(expected)


# --- drawings -----------------------------------------------------------------------------------------------

ONE = Prompt("a red circle", "single", (("red", "circle", None, None),))
TWO = Prompt("a red circle and a green square", "two",
             (("red", "circle", None, None), ("green", "square", None, None)))  # fmt: skip
LEFT = Prompt("a red circle left of a green square", "relation", TWO.things, "left of")
THREE = Prompt("three red circles", "counting", (("red", "circle", None, None),) * 3)
EXTRA = Thing("blue", "cross", 1, 1)
RED_2, RED_3 = Thing("red", "circle", 0, 1), Thing("red", "circle", 0, 2)


@pytest.mark.parametrize(
    ("prompt", "scene", "verdicts", "strict"),
    [
        (ONE, (RED,), {"single_object": True, "colors": True}, True),
        (ONE, (RED, EXTRA), {"single_object": True, "colors": True}, False),
        (ONE, (BLUE,), {"single_object": True, "colors": False}, False),
        (ONE, (EXTRA,), {"single_object": False, "colors": False}, False),
        (TWO, (RED, GREEN), {"two_object": True, "color_attr": True}, True),
        (TWO, (Thing("green", "circle", 0, 0), Thing("red", "square", 2, 2)),
         {"two_object": True, "color_attr": False}, False),
        (TWO, (RED,), {"two_object": False, "color_attr": False}, False),
        (THREE, (RED, RED_2, RED_3), {"counting": True}, True),
        (THREE, (RED, RED_2, RED_3, EXTRA), {"counting": True}, False),
        (THREE, (RED, RED_2, Thing("blue", "circle", 0, 2)), {"counting": True}, False),
        (THREE, (RED, RED_2), {"counting": False}, False),
        (THREE, (RED, RED_2, RED_3, BLUE), {"counting": False}, False),
        (LEFT, (RED, GREEN), {"position": True}, True),
        (LEFT, (Thing("green", "square", 0, 0), RED_3), {"position": False}, False),
        (LEFT, (RED, Thing("red", "square", 2, 2)), {"position": False}, False),
        (LEFT, (Thing("green", "square", 0, 0), RED_2, GREEN), {"position": True}, False),
    ],
)  # fmt: skip
def test_rules_of_geneval_and_the_strict_one(prompt, scene, verdicts, strict):
    assert bench.geneval(prompt, scene) == verdicts
    assert prompt.satisfied_by(scene) == strict


def test_the_stand_in_reads_prompts_right():
    for category in scenes.CATEGORIES:
        assert all(p.satisfied_by(scene_of(p.text)) for p in bench._prompts(category, 30, 0)[1])


def test_the_detectors_own_error():
    """As rendered it reads everything; what it misreads after the tokenizer is counted again here."""
    perfect = scores(bench.ground_truth(None, 40), n_boot=10)
    assert set(perfect["value"]) == {1.0}
    _, codebook = models.load(lab_folder("unified"))
    table = scores(bench.ground_truth(codebook, 40), n_boot=10)
    for category in scenes.CATEGORIES:
        found, wanted = metrics.held_out_prompts(category, 40)
        right = []
        for scene, prompt in zip(found, wanted, strict=True):
            codes = images.encode(scenes.render(scene)[None], codebook)
            right.append(prompt.satisfied_by(images.detect(images.decode(codes, codebook)[0])))
        assert value(table, "drawn_right", category) == pytest.approx(np.mean(right))
    assert 0.8 < value(table, "drawn_right", "all") < 1  # the tokenizer is lossy, but not by much


# --- lab models ---------------------------------------------------------------------------------------------


def lab_folder(name):
    from minimal_aia.models.lab import CHECKPOINTS

    return CHECKPOINTS / name


@pytest.fixture(scope="module")
def unified():
    return lab_subject("lab/unified")


@pytest.fixture(scope="module")
def frame(unified):
    return bench.benchmark(unified, ITEMS)


def test_the_same_numbers_as_the_metrics_that_the_course_shows(unified, frame):
    """Decoded answers against the teacher-forced decision, drawings, losses: on the same items."""
    table = scores(frame, n_boot=50)
    for row in metrics.answer_table(unified.model, unified.codebook, ITEMS).itertuples():
        assert value(table, "exact_match", row.kind) == pytest.approx(row.right)
    for row in metrics.drawing_table(unified.model, unified.codebook, ITEMS).itertuples():
        assert value(table, "drawn_right", row.category) == pytest.approx(row.right)
    for task in unified.tasks:
        loss = metrics.held_out_loss(unified.model, unified.codebook, task, batches=1)
        mine = table[(table["task"] == task) & (table["metric"] == "next_token_loss")]
        assert mine["value"].item() == pytest.approx(loss, rel=1e-5)


def test_the_janus_like_model_answers_as_its_metrics_say():
    subject = lab_subject("lab/janus")
    table = score(bench.answer_rows(subject.answer, ITEMS, 0))
    for row in metrics.answer_table(subject.model, subject.codebook, ITEMS).itertuples():
        assert value(table, "exact_match", row.kind) == pytest.approx(row.right)


def test_the_same_seed_gives_the_same_and_more_items_begin_alike(unified, frame):
    again = bench.answer_rows(unified.answer, ITEMS, 0)
    first = frame[frame["metric"] == "exact_match"].reset_index(drop=True)
    pd.testing.assert_frame_equal(bench.frame(again, "unified", 0), first, check_dtype=False)
    for longer, shorter in ((bench._questions("color", 20, 0), bench._questions("color", ITEMS, 0)),
                            (bench._prompts("two", 20, 0), bench._prompts("two", ITEMS, 0))):  # fmt: skip
        assert longer[0][:ITEMS] == shorter[0]
        assert longer[1][:ITEMS] == shorter[1]
    assert bench._questions("color", ITEMS, 1)[0] != bench._questions("color", ITEMS, 0)[0]
    drawn = unified.draw(["a red circle"] * 4, seed=3)
    assert (drawn == unified.draw(["a red circle"] * 4, seed=3)).all()
    assert (drawn != unified.draw(["a red circle"] * 4, seed=4)).any()


@pytest.mark.parametrize("prompted", [False, True])
def test_answers_are_those_of_generate(unified, prompted):
    """Against transformers' own decoding, a sequence at a time."""
    rng = np.random.default_rng(2)
    found = scenes.draw_scenes(rng, 6)
    pictures = bench.pictures_of(found)
    questions = [scenes.draw_questions(s, 1, rng)[0].text for s in found]
    prompts = [scenes.describe(s) for s in found]
    said = unified.answer(pictures, questions, prompts if prompted else None)
    for picture, question, prompt, words in zip(pictures, questions, prompts, said, strict=True):
        codes = images.encode(picture[None], unified.codebook)[0] + FIRST_CODE
        start = [BOS, *word_ids(prompt)] if prompted else [BOS]
        ids = torch.tensor([[*start, BOI, *codes, EOI, *word_ids(question)]])
        out = unified.model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :].tolist()
        out = out[: out.index(EOS)] if EOS in out else out
        names = [WORDS[i] if i < FIRST_CODE else f"<code_{i - FIRST_CODE}>" for i in out]
        assert words == " ".join(names)


def test_a_picture_of_codes_is_those_codes_again(unified):
    """Drawings travel as pixels: no code may become another on the way."""
    codes = np.resize(np.arange(images.N_CODES), (5, images.N_IMAGE_TOKENS))
    assert (images.encode(images.decode(codes, unified.codebook), unified.codebook) == codes).all()


def test_single_task_models_are_asked_their_task_only():
    model, codebook = models.load(lab_folder("generation"))
    frame = bench.benchmark(LabModel("generation", 0, models.TASKS["generation"], model, codebook), 2)
    assert set(frame["task"]) == {"generation"}
    assert set(frame["metric"]) == {"drawn_right", "geneval", "next_token_loss"}


# --- names and the command ----------------------------------------------------------------------------------


def test_origin_is_read_from_what_training_wrote(tmp_path):
    plain = tmp_path / "unified-seed7"
    plain.mkdir()
    assert origin(plain) == ("unified", 7, "unified")
    tuned = tmp_path / "aia"
    tuned.mkdir()
    (tuned / "recipe.yaml").write_text("model: runs/lab/janus-seed2\nseed: 5\n")
    assert origin(tuned) == ("aia", 5, "janus")
    trained = tmp_path / "renamed"
    trained.mkdir()
    (trained / "training.json").write_text('{"name": "understanding", "seed": 3}')
    assert origin(trained) == ("understanding", 3, "understanding")


def test_command_writes_the_table(tmp_path, capsys):
    out = tmp_path / "scores.csv"
    assert main(["evaluate", "lab", "lab/unified", "--items", "2", "--out", str(out)]) == 0
    table = pd.read_csv(out)
    assert list(table.columns) == SCORE_COLUMNS
    assert {"unified", "guesser: blind", "guesser: unbound", "ground truth"} < set(table["model"])
    assert {"understanding", "generation", "interleaved"} == set(table["task"])
    shares = table[table["metric"] != "next_token_loss"]
    assert shares["value"].dropna().between(0, 1).all()
    assert "exact_match" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lab/unify"], "lab/unify"),
        (["lab/unified", "--out", "nowhere/scores.csv"], "nowhere"),
        (["lab/unified", "--out", "scores.xlsx"], ".csv or .parquet"),
    ],
)
def test_command_says_what_is_wrong_in_one_line(arguments, message, capsys):
    assert main(["evaluate", "lab", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
