"""From one Pillow picture to uint8 pixels: turning, modes, transparency, 16 bits, size."""

from __future__ import annotations

import struct
from collections import Counter
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from unbackdoor.errors import ConfigError, DataError

Pixels = NDArray[np.uint8]
Resample = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
Size = tuple[int, int]

#: What Pillow's readers raise on files that are damaged or are no pictures at all.
READ_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    Image.DecompressionBombError,
)

_GREY_MODES = ("1", "L", "LA", "La")
_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")


def size_pair(image_size: int | tuple[int, int]) -> Size:
    """(height, width) from one number or two.

    Raises:
        ConfigError: not positive.
    """
    pair = (image_size, image_size) if isinstance(image_size, int) else (int(image_size[0]), int(image_size[1]))
    if min(pair) < 1:
        raise ConfigError(f"image_size must be at least 1 pixel, not {image_size!r}")
    return pair


def check_options(channels: int | None, resample: str) -> None:
    """Raise ConfigError where an option of :func:`to_pixels` is none that it knows."""
    if channels not in (None, 1, 3):
        raise ConfigError(f"channels must be 1 (grey), 3 (RGB) or None (as the pictures are), not {channels!r}")
    if resample not in get_args(Resample):
        raise ConfigError(f"resample must be one of {', '.join(get_args(Resample))}, not {resample!r}")


def read_picture(path: Path, size: Size | None, channels: int | None, resample: Resample, seen: Counter[str]) -> Pixels:
    """:func:`to_pixels` of a file.

    Raises:
        DataError: the file is damaged, is no picture, or holds values of unknown range; the message names it.
    """
    try:
        with Image.open(path) as image:
            return to_pixels(image, size, channels, resample, seen)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except READ_ERRORS as error:
        raise DataError(f"{path} cannot be read as a picture ({type(error).__name__}: {error})") from error


def to_pixels(
    image: Image.Image, size: Size | None, channels: int | None, resample: Resample, seen: Counter[str]
) -> Pixels:
    """uint8 (H, W) for grey or (H, W, 3) for RGB; of an animation the first frame.

    The picture is turned as its EXIF orientation says. Transparent parts are laid over black. 16-bit values are scaled
    by 255/65535, floating values in [0, 1] by 255, both rounded. Grey is the luma 0.299 R + 0.587 G + 0.114 B.
    A picture of another aspect ratio than ``size`` is cropped to it around its centre, then resized (which is to
    resize the shorter side and crop the longer one); Pillow's filters average over all source pixels when they reduce.

    Args:
        size: (height, width), or None to keep the picture's own.
        channels: 1, 3, or None: grey where the picture is grey.
        seen: counts what was done, by a phrase that can be shown to the user.

    Raises:
        DataError: 32-bit integers beyond 16 bits, or floats outside [0, 1].
    """
    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
        seen["turned as their EXIF orientation says"] += 1
    image = _eight_bits(image, seen)
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        image = _over_black(image, seen)
    grey = image.mode in _GREY_MODES
    if not grey and image.mode != "RGB":
        image = image.convert("RGB")
    target = "L" if channels == 1 or (channels is None and grey) else "RGB"
    if image.mode != target:
        image = image.convert(target)
    return np.asarray(_resized(image, size, resample, seen), dtype=np.uint8)


def _eight_bits(image: Image.Image, seen: Counter[str]) -> Image.Image:
    if image.mode not in _DEEP_MODES:
        return image
    values: NDArray[Any] = np.asarray(image)
    low, high = values.min(), values.max()
    limit = 1 if image.mode == "F" else 65535
    if not (low >= 0 and high <= limit):  # also catches NaN
        need = "floats in [0, 1]" if image.mode == "F" else "integers in 0..65535"
        raise DataError(f"its values span {low}..{high}; {need} can be scaled to 8 bits")
    seen["scaled to 8 bits from 16-bit or floating values"] += 1
    return Image.fromarray(np.rint(values.astype(np.float64) * (255 / limit)).astype(np.uint8))


def _over_black(image: Image.Image, seen: Counter[str]) -> Image.Image:
    grey = image.mode in _GREY_MODES
    with_alpha = image.convert("RGBA")
    if with_alpha.getchannel("A").getextrema() == (255, 255):
        return with_alpha.convert("L" if grey else "RGB")
    seen["laid over black where they are transparent"] += 1
    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, with_alpha).convert("L" if grey else "RGB")


def _resized(image: Image.Image, size: Size | None, resample: Resample, seen: Counter[str]) -> Image.Image:
    if size is None or (image.height, image.width) == size:
        return image
    height, width = size
    box = None
    if image.height * width == image.width * height:
        seen[f"resized to {height}×{width} ({resample})"] += 1
    else:
        scale = max(height / image.height, width / image.width)
        kept_width, kept_height = width / scale, height / scale
        left, top = (image.width - kept_width) / 2, (image.height - kept_height) / 2
        box = (max(0.0, left), max(0.0, top), min(image.width, left + kept_width), min(image.height, top + kept_height))
        seen[f"cropped around the centre and resized to {height}×{width} ({resample})"] += 1
    return image.resize((width, height), Image.Resampling[resample.upper()], box=box)


def told(seen: Counter[str]) -> list[str]:
    """What :func:`to_pixels` counted, as notes."""
    return [f"{count} {'picture' if count == 1 else 'pictures'} {what}" for what, count in seen.items()]
