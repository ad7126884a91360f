"""The lab's world is consistent with itself: texts, pictures and answers say the same thing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimal_aia.lab import images, scenes, sequences

seeds = st.integers(0, 2**32 - 1)


def scene_of(seed: int) -> scenes.Scene:
    return scenes.draw_scene(np.random.default_rng(seed))


@given(seeds)
def test_a_scene_satisfies_its_prompts_and_a_changed_scene_does_not(seed):
    scene = scene_of(seed)
    first = scene[0]
    other = "red" if first.color != "red" else "blue"
    repainted = (scenes.Thing(other, first.shape, first.row, first.col), *scene[1:])
    for prompt in scenes.prompts(scene):
        assert prompt.satisfied_by(scene), prompt.text
        assert not prompt.satisfied_by(repainted), prompt.text
        assert not prompt.satisfied_by(scene[:-1]), prompt.text


@given(seeds)
def test_relation_prompts_fail_on_the_mirrored_scene(seed):
    scene = scene_of(seed)
    mirrored = tuple(scenes.Thing(t.color, t.shape, 2 - t.row, 2 - t.col) for t in scene)
    for prompt in scenes.prompts(scene):
        if prompt.category == "relation":
            assert not prompt.satisfied_by(mirrored), prompt.text


def answer(question: str, scene: scenes.Scene) -> str:
    """An independent answerer that reads only the question's words."""
    words = question.replace("?", "").split()
    colors = [w for w in words if w in scenes.COLORS]
    shapes = [w for w in words if w in scenes.SHAPES]
    plural = [s for s, p in scenes.PLURAL.items() if p in words]
    if words[0] == "describe":
        return " and ".join(
            f"a {t.color} {t.shape} at {scenes.ROWS[t.row]} {scenes.COLS[t.col]}" for t in scene
        )
    if words[:2] == ["how", "many"]:
        kept = [t for t in scene if (not colors or t.color in colors) and (not plural or t.shape in plural)]
        return ("zero", "one", "two", "three")[len(kept)]
    if words[:2] == ["is", "there"]:
        return "yes" if any((t.color, t.shape) == (colors[0], shapes[0]) for t in scene) else "no"
    if words[0] == "where":
        (t,) = [t for t in scene if (t.color, t.shape) == (colors[0], shapes[0])]
        return f"{scenes.ROWS[t.row]} {scenes.COLS[t.col]}"
    if words[:2] == ["what", "shape"]:
        (t,) = [t for t in scene if t.color == colors[0]]
        return t.shape
    if words[:2] == ["what", "color"] or "or" in words:
        (t,) = [t for t in scene if t.shape == shapes[0]]
        return t.color
    (a,) = [t for t in scene if (t.color, t.shape) == (colors[0], shapes[0])]
    (b,) = [t for t in scene if (t.color, t.shape) == (colors[1], shapes[1])]
    sign = -1 if "left" in words or "above" in words else 1
    gap = (a.col - b.col) if "left" in words or "right" in words else (a.row - b.row)
    return "yes" if sign * gap > 0 else "no"


@given(seeds)
def test_answers_agree_with_an_independent_answerer(seed):
    rng = np.random.default_rng(seed)
    scene = scenes.draw_scene(rng)
    questions = scenes.draw_questions(scene, 6, rng)
    assert len({q.text for q in questions}) == 6
    for question in questions:
        assert question.answer == answer(question.text, scene), question


@pytest.mark.parametrize("kind", ["existence", "relation"])
def test_yes_and_no_are_balanced(kind):
    rng = np.random.default_rng(0)
    answers = [
        q.answer
        for s in scenes.draw_scenes(rng, 3000)
        if (q := scenes.draw_question(s, kind, rng)) is not None
    ]
    assert abs(np.mean([a == "yes" for a in answers]) - 0.5) < 0.03


@given(seeds)
def test_every_word_is_in_the_vocabulary(seed):
    rng = np.random.default_rng(seed)
    scene = scenes.draw_scene(rng)
    texts = [p.text for p in scenes.prompts(scene)]
    texts += [f"{q.text} {q.answer}" for q in scenes.draw_questions(scene, 5, rng)]
    assert [w for text in texts for w in sequences.unknown_words(text)] == []


def test_held_out_scenes_are_an_eighth_and_never_drawn_for_training():
    rng = np.random.default_rng(0)
    share = np.mean([scenes.is_held_out(scenes.draw_scene(rng)) for _ in range(4000)])
    assert 0.1 < share < 0.15
    assert not any(map(scenes.is_held_out, scenes.draw_scenes(rng, 500)))
    assert all(map(scenes.is_held_out, scenes.draw_scenes(rng, 50, held_out=True)))


def test_held_out_ignores_the_jitter():
    a = (scenes.Thing("red", "circle", 0, 0, 0, 0),)
    b = (scenes.Thing("red", "circle", 0, 0, 2, 1),)
    assert scenes.is_held_out(a) == scenes.is_held_out(b)


@given(seeds)
@settings(max_examples=50)
def test_the_detector_reads_rendered_scenes_exactly(seed):
    scene = scene_of(seed)
    assert images.detect(scenes.render(scene)) == scene


def test_unknown_kind_is_named():
    with pytest.raises(ValueError, match="unknown question kind 'size'"):
        scenes.draw_question(scene_of(0), "size", np.random.default_rng(0))
