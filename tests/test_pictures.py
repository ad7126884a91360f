"""Pictures as files, bytes and codes: opened alike, refused with the reason, cropped without stretching."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from minimal_aia.pictures import (
    PictureBytes,
    PictureCodes,
    PictureError,
    check_picture,
    crop_to_fit,
    open_picture,
    picture_size,
)


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


NOISE = np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8)


def test_a_file_and_its_bytes_are_the_same_picture(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(NOISE))
    for picture in (path, PictureBytes(path.read_bytes(), "a.png")):
        assert (np.asarray(open_picture(picture)) == NOISE).all()
        assert picture_size(picture) == (6, 9)
        check_picture(picture)


def test_grey_and_transparent_pictures_become_rgb():
    grey = PictureBytes(encoded(NOISE[..., 0]))
    assert (np.asarray(open_picture(grey)) == NOISE[..., :1]).all()
    alpha = np.concatenate([NOISE, np.full((6, 9, 1), 255, np.uint8)], -1)
    assert (np.asarray(open_picture(PictureBytes(encoded(alpha)))) == NOISE).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded(NOISE)[:60], "image 'x' is unreadable or truncated"),
        (encoded(NOISE, "TIFF"), "image 'x' is unreadable"),  # not among the formats that are opened
        (b"", "image 'x' is unreadable"),
    ],
)
def test_bytes_that_are_no_picture_are_refused(data, reason):
    with pytest.raises(PictureError, match=reason):
        open_picture(PictureBytes(data, "x"))


def test_a_header_is_enough_for_the_size_not_for_decoding():
    cut = PictureBytes(encoded(NOISE)[:-30], "x")
    check_picture(cut, "header")
    check_picture(cut, "none")
    with pytest.raises(PictureError, match="'its name' is unreadable or truncated"):
        check_picture(cut, "decode", "its name")


def test_codes_have_no_pixels():
    with pytest.raises(PictureError, match="known by its codes alone"):
        open_picture(PictureCodes(torch.zeros(4), 2, 2, "a"))


@pytest.mark.parametrize(("shape", "first"), [((8, 24), (0, 8)), ((24, 8), (8, 0)), ((8, 8), (0, 0))])
def test_the_crop_is_the_middle_of_the_picture(shape, first):
    pixels = np.random.default_rng(1).integers(0, 255, (*shape, 3), dtype=np.uint8)
    cropped = np.asarray(crop_to_fit(Image.fromarray(pixels), 8, 8))
    top, left = first
    assert (cropped == pixels[top : top + 8, left : left + 8]).all()
