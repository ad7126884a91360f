"""The lab's image tokenizer against brute force."""

import numpy as np

from minimal_aia.lab import images, scenes


def pictures(count: int = 20) -> np.ndarray:
    return np.stack([scenes.render(s) for s in scenes.draw_scenes(np.random.default_rng(0), count)])


def test_patches_come_in_reading_order_and_go_back():
    batch = pictures()
    patches = images.to_patches(batch)
    assert patches.shape == (20, 36, 48)
    expected = batch[3, 4:8, 8:12].reshape(-1) / 255  # row 1, column 2 of the 6x6 grid
    np.testing.assert_allclose(patches[3, 8], expected, atol=1e-6)
    np.testing.assert_array_equal(images.from_patches(patches), batch)


def test_encode_takes_the_nearest_code():
    codebook = np.random.default_rng(1).random((30, 48)).astype(np.float32)
    batch = pictures(5)
    flat = images.to_patches(batch)
    brute = ((flat[:, :, None] - codebook) ** 2).sum(-1).argmin(-1)
    np.testing.assert_array_equal(images.encode(batch, codebook), brute)


def test_decode_paints_the_codes():
    codebook = np.random.default_rng(1).random((30, 48)).astype(np.float32)
    codes = np.random.default_rng(2).integers(0, 30, (4, 36))
    np.testing.assert_allclose(
        images.to_patches(images.decode(codes, codebook)), codebook[codes], atol=0.51 / 255
    )


def test_codebook_is_the_same_from_the_same_seed_and_lossy():
    a, b = (images.fit_codebook(seed=3, n_scenes=300, n_codes=40) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    batch = pictures()
    assert not np.array_equal(images.decode(images.encode(batch, a), a), batch)


def test_detector_error_counts_misread_scenes():
    assert images.detector_error(count=50) == 0
    blank = np.full((2, 48), 245 / 255, dtype=np.float32)  # every picture decodes to blank paper
    assert images.detector_error(blank, count=50) == 1
