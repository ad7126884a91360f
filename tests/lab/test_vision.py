"""The pretrained parts of the Janus-like model."""

import numpy as np
import torch

from minimal_aia.lab import images, models, scenes, vision, vq


def test_patch_labels_name_the_thing_of_their_cell():
    scene = (scenes.Thing("red", "circle", 0, 1), scenes.Thing("blue", "cross", 2, 2))
    labels = vision.patch_labels([scene]).view(6, 6)
    expected = torch.zeros(6, 6, dtype=torch.long)
    expected[0:2, 2:4] = vision.CLASSES.index("red circle")
    expected[4:6, 4:6] = vision.CLASSES.index("blue cross")
    assert torch.equal(labels, expected)


def test_a_short_pretraining_already_sees_more_than_chance():
    eye, probe = vision.pretrain(steps=60, batch=16, progress=False)
    assert vision.accuracy(eye, probe, count=60) > 0.15  # chance is 1 in 24 at best
    assert not any(p.requires_grad for p in eye.parameters())


def test_distillation_moves_towards_the_codebook():
    codebook = images.fit_codebook(n_scenes=300)
    before = vq.agreement(vq.distill(codebook, steps=1, progress=False), codebook, count=20)
    after = vq.agreement(vq.distill(codebook, steps=25, batch=8, progress=False), codebook, count=20)
    assert after["same_code"] > before["same_code"] + 0.2


def test_the_shipped_image_tokenizer_names_and_paints_like_the_codebook():
    from minimal_aia.models.lab import CHECKPOINTS

    model, codebook = models.load(CHECKPOINTS / "janus")
    scores = vq.agreement(model.model.vqmodel, codebook, count=200)
    assert scores["same_code"] > 0.99
    assert scores["read_after_round_trip"] > 0.85
    found = scenes.draw_scenes(np.random.default_rng(0), 3)
    assert vision.patch_labels(found).shape == (3, 36)
