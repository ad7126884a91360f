"""Pictures of samples: files, bytes out of a data set, or image codes that were computed beforehand."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Literal

from PIL import Image, ImageOps

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # a short list: some of Pillow's other readers start programs
MAX_PIXELS = 50_000_000  # a decoded image above this is taken for a decompression bomb
Check = Literal["decode", "header", "none"]


class PictureError(ValueError):
    """A picture that cannot be used; the message says which and why."""


@dataclass(frozen=True, eq=False)
class PictureBytes:
    """An encoded picture (PNG, JPEG, ...) held in memory, as `datasets` and parquet files store them."""

    data: bytes = field(repr=False)
    name: str = "(bytes)"


@dataclass(frozen=True, eq=False)
class PictureCodes:
    """A picture as the model's own VQ codes, made beforehand by `minimal-aia prepare`.

    codes: int [N], as the adapter's `codes` input has them (Emu3: vocabulary ids, with line ends).
    height, width: in codes.
    """

    codes: Tensor = field(repr=False)
    height: int
    width: int
    name: str = "(codes)"


Picture = Path | PictureBytes | PictureCodes


def open_picture(picture: Picture, name: str = "") -> Image.Image:
    """The decoded RGB picture. PictureError if it is damaged, of a format not in `FORMATS`, or too large."""
    if isinstance(picture, PictureCodes):
        raise PictureError(f"image {picture.name!r} is known by its codes alone; pixels are wanted here")
    with _open(picture, name) as image:
        try:
            return image.convert("RGB")
        except Exception as error:
            raise _unreadable(picture, name, error) from None


def picture_size(picture: Path | PictureBytes, name: str = "") -> tuple[int, int]:
    """(height, width) in pixels, from the header alone; else as `open_picture`."""
    with _open(picture, name) as image:
        return image.height, image.width


def check_picture(picture: Path | PictureBytes, check: Check = "decode", name: str = "") -> None:
    """PictureError if the header ("header") or the whole picture ("decode") cannot be read.

    name: what messages call it (default: its path or own name).
    """
    if check == "decode":
        open_picture(picture, name)
    elif check == "header":
        picture_size(picture, name)


def _open(picture: Path | PictureBytes, name: str) -> Image.Image:
    source = picture if isinstance(picture, Path) else io.BytesIO(picture.data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we set the limit ourselves
        try:
            image = Image.open(source, formats=FORMATS)
        except Image.DecompressionBombError:
            raise PictureError(
                f"image {_name(picture, name)!r} has far more than {MAX_PIXELS} pixels"
            ) from None
        except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error ... on damaged files
            raise _unreadable(picture, name, error) from None
    if (n_pixels := image.width * image.height) > MAX_PIXELS:
        image.close()
        raise PictureError(f"image {_name(picture, name)!r} has {n_pixels} pixels, more than {MAX_PIXELS}")
    return image


def _name(picture: Path | PictureBytes, name: str) -> str:
    return name or (str(picture) if isinstance(picture, Path) else picture.name)


def _unreadable(picture: Path | PictureBytes, name: str, error: Exception) -> PictureError:
    return PictureError(f"image {_name(picture, name)!r} is unreadable or truncated ({error})")


def find_picture(name: str, folder: Path, must_exist: bool = True) -> Path:
    """The absolute path of a picture named in a sample file; PictureError if it lies outside `folder`."""
    windows = PureWindowsPath(name)  # also understands "C:\\x" and "..\\x", which a Linux reader would not
    if not name.strip() or "\0" in name:
        raise PictureError("an image path is empty")
    if windows.root or windows.drive or ".." in windows.parts:
        raise PictureError(f"image {name!r} leaves the folder of the file (use a relative path without '..')")
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder):
            raise PictureError(f"image {name!r} leaves the folder of the file through a link")
        if must_exist and not path.is_file():
            raise PictureError(f"image {name!r} does not exist")
    except (OSError, RuntimeError, UnicodeEncodeError) as error:  # link loops, endless names, half surrogates
        raise PictureError(f"image {name!r} cannot be opened: {error}") from None
    return path


def crop_to_fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """The largest centred part of that shape, resized (bicubic): nothing is stretched, nothing padded."""
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
