"""Samples from arrays: ``.npz`` files, mappings and pairs of arrays; and to ``.npz``."""

from __future__ import annotations

import io
import itertools
import lzma
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from unbackdoor.data.loaded import Loaded, checked
from unbackdoor.data.pictures import READ_ERRORS
from unbackdoor.errors import DataError, OutputExists
from unbackdoor.types import Samples

Array = NDArray[Any]
Layout = Literal["NHWC", "NCHW"]

_IMAGE_KEYS = ("x", "images", "image", "inputs", "data", "img")
_LABEL_KEYS = ("y", "labels", "label", "targets", "target")
_CLASS_KEYS = ("classes", "class_names", "label_names")
_PAIRS = tuple((x, y) for x in _IMAGE_KEYS for y in _LABEL_KEYS)
_DEFAULT_NAMES = ("arr_0", "arr_1")

EXPECTED = "uint8 or whole numbers in 0..255, or floats in [0, 1]"


def load_npz(path: str | os.PathLike[str], *, split: str = "test", num_classes: int | None = None) -> Loaded:
    """Read images and labels from an ``.npz`` file. Nothing is unpickled.

    Keys, in any case: ``x_<split>`` and ``y_<split>`` (or ``<split>_images`` and ``<split>_labels``, and the like);
    else ``x``/``y``, ``images``/``labels``, ``inputs``/``targets``, ``data``/``label``. Optional: ``classes`` (names),
    ``num_classes``. Images may be stored packed, as lossless WebP strips (:func:`unpack_strips`), under
    ``x_<split>_webp`` with offsets ``x_<split>_off``. What the arrays may hold is said at :func:`from_arrays`.

    Args:
        split: which split to take, where the file has splits.
        num_classes: outputs of the network; by default the file's word, or the largest label + 1.

    Raises:
        DataError: not readable, no known keys, or arrays that are no labelled images.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist; an .npz file with images and labels is needed")
    try:
        # Opened here, since numpy leaves a file open whose directory it cannot read.
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise DataError(f"{path} holds a single array; an .npz file with images and labels is needed")
            with file:
                return from_mapping(file, split=split, num_classes=num_classes, where=str(path))
    except ValueError as error:
        if "allow_pickle" not in str(error) and "pickled" not in str(error):
            raise DataError(f"{path} cannot be read: {error}") from error
        raise DataError(
            f"{path} is, or holds, a pickle, which is never read since reading it could run code; "
            f"save plain arrays: {EXPECTED}, and integer labels"
        ) from error
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, KeyError, RuntimeError) as error:
        raise DataError(f"{path} cannot be read as .npz ({type(error).__name__}: {error})") from error


def from_mapping(
    arrays: Mapping[str, Any],
    *,
    split: str = "test",
    num_classes: int | None = None,
    class_names: Sequence[str] = (),
    where: str = "arrays",
) -> Loaded:
    """:func:`load_npz` for any mapping of arrays."""
    keys = {k.lower(): k for k in reversed(list(arrays))}
    image_key, label_key = _find_keys(keys, split.lower(), where)
    if image_key.endswith("_webp"):
        offsets = np.asarray(arrays[keys[image_key.removesuffix("_webp") + "_off"]])
        images: Any = unpack_strips(np.asarray(arrays[keys[image_key]]), offsets, where)
        layout: Layout | None = "NHWC"
    else:
        images = arrays[keys[image_key]]
        layout = _stated_layout(arrays, keys, where)
    if not class_names:
        class_names = _names(arrays, keys)
    if num_classes is None and "num_classes" in keys:
        num_classes = int(np.ravel(arrays[keys["num_classes"]])[0])
    return from_arrays(
        images,
        arrays[keys[label_key]],
        num_classes=num_classes,
        class_names=class_names,
        layout=layout,
        where=f"{where}, {keys[image_key]} and {keys[label_key]}",
    )


def _names(arrays: Mapping[str, Any], keys: Mapping[str, str]) -> list[str]:
    for key in _CLASS_KEYS:
        # A single number under such a key is a count, or the labels that occur: no names.
        if key in keys and (values := np.asarray(arrays[keys[key]])).dtype.kind in "US":
            return [v.decode() if isinstance(v, bytes) else str(v) for v in values.ravel()]
    return []


def _stated_layout(arrays: Mapping[str, Any], keys: Mapping[str, str], where: str) -> Layout | None:
    if "layout" not in keys:
        return None
    layout = str(np.ravel(arrays[keys["layout"]])[0]).upper()
    if layout not in get_args(Layout):
        raise DataError(f"{where}: layout must be one of {', '.join(get_args(Layout))}, not {layout!r}")
    return "NHWC" if layout == "NHWC" else "NCHW"


def _split_pairs(split: str) -> Iterable[tuple[str, str]]:
    for x, y in _PAIRS:
        yield f"{x}_{split}", f"{y}_{split}"
        yield f"{split}_{x}", f"{split}_{y}"


def _find_keys(keys: Mapping[str, str], split: str, where: str) -> tuple[str, str]:
    """The lower-case keys of images (with ``_webp`` where they are packed) and labels."""
    for x, y in [*_split_pairs(split), *_PAIRS, _DEFAULT_NAMES]:
        if y in keys:
            if x in keys:
                return x, y
            if f"{x}_webp" in keys and f"{x}_off" in keys:
                return f"{x}_webp", y
    splits = [s for s in ("train", "val", "test") if any(y in keys for _, y in _split_pairs(s))]
    if splits and split not in splits:
        raise DataError(f"{where} has no split {split!r}; it has {' and '.join(splits)}")
    raise DataError(
        f"{where}: no images and labels found among its keys {', '.join(sorted(keys.values())) or '(none)'}; "
        f"name them x and y, images and labels, or x_{split} and y_{split}"
    )


def unpack_strips(packed: Array, offsets: Array, where: str = "strips") -> Array:
    """Decode square pictures packed as lossless WebP strips: uint8 (N, side, side, 3).

    Each piece ``packed[offsets[i]:offsets[i + 1]]`` is one WebP file of pictures on top of each other; its width is
    the side of a picture.

    Raises:
        DataError: offsets out of order, or a piece that is no strip of square pictures.
    """
    if packed.dtype != np.uint8 or packed.ndim != 1 or offsets.ndim != 1 or len(offsets) < 2:
        raise DataError(f"{where}: packed images must be uint8 bytes in one row, with at least two offsets")
    bounds = [int(o) for o in offsets]
    if bounds[0] < 0 or bounds[-1] > len(packed) or any(a >= b for a, b in itertools.pairwise(bounds)):
        raise DataError(f"{where}: offsets must rise from 0 to the {len(packed)} bytes that are there")
    strips: list[Array] = []
    for index, (start, stop) in enumerate(itertools.pairwise(bounds)):
        try:
            with Image.open(io.BytesIO(packed[start:stop].tobytes()), formats=["WEBP"]) as image:
                strip = np.asarray(image.convert("RGB"))
        except READ_ERRORS as error:
            raise DataError(f"{where}: strip {index} is no WebP picture ({error})") from error
        height, side, _ = strip.shape
        if height % side or (strips and strips[0].shape[1] != side):
            raise DataError(f"{where}: strip {index} of {height}×{side} is no pile of square pictures of one size")
        strips.append(strip.reshape(-1, side, side, 3))
    return np.concatenate(strips)


def from_arrays(
    images: Any,
    labels: Any,
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] = (),
    layout: Layout | None = None,
    where: str = "arrays",
) -> Loaded:
    """Samples from arrays or tensors.

    Images: (N, H, W, C), (N, C, H, W) with C of 1 or 3, (N, H, W), or rows of a square grey picture (N, H·W); uint8 or
    whole numbers in 0..255 (kept as uint8), or floats in [0, 1] (kept as float32). Labels: integers (N,) or (N, 1), or
    one-hot (N, classes).

    Args:
        num_classes: by default the number of names, the width of one-hot labels, or the largest label + 1.
        layout: of four-dimensional images; by default the axis of length 1 or 3 holds the channels.
        where: what to call the arrays in errors.

    Raises:
        DataError: shapes, ranges or labels that are none of these; all samples of one class.
    """
    y, one_hot_width = _labels(_array(labels, where), where)
    pixels, notes = _channels_first(_array(images, where), layout, where)
    if len(pixels) != len(y):
        raise DataError(f"{where}: {len(pixels)} images and {len(y)} labels; each image needs one label")
    if len(y) == 0:
        raise DataError(f"{where}: there are no samples; at least one of each of two classes is needed")
    values, more_notes = _values(pixels, layout is not None, where)
    if num_classes is None:
        num_classes = len(class_names) or one_hot_width or max(2, int(y.max()) + 1)
    try:
        samples = Samples(values, torch.from_numpy(y), num_classes, tuple(class_names))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return checked(samples, [*notes, *more_notes], where)


def _array(values: Any, where: str) -> Array:
    if isinstance(values, Tensor):
        return np.asarray(values.detach().cpu())
    array = np.asarray(values)
    if array.dtype == object:
        raise DataError(f"{where}: an array of Python objects (pictures of several sizes?) cannot be used: {EXPECTED}")
    return array


def _labels(y: Array, where: str) -> tuple[NDArray[np.int64], int]:
    """Labels (N,) and the width of one-hot labels, or 0."""
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim == 2:
        if not (np.isin(y, (0, 1)).all() and (y.sum(1) == 1).all()):
            raise DataError(f"{where}: labels of shape {y.shape} are not one-hot (a single 1 in each row)")
        return y.argmax(1).astype(np.int64), y.shape[1]
    if y.ndim != 1 or y.dtype.kind not in "iufb":
        raise DataError(
            f"{where}: labels must be integers (N,) or (N, 1), or one-hot (N, classes), "
            f"not {y.dtype} of shape {y.shape}"
        )
    if y.dtype.kind == "f" and not (np.isfinite(y).all() and (y == np.rint(y)).all()):
        wrong = y[~(np.isfinite(y) & (y == np.rint(y)))][0]
        raise DataError(f"{where}: label {wrong} is no whole number")
    return y.astype(np.int64), 0


def _channels_first(x: Array, layout: Layout | None, where: str) -> tuple[Array, list[str]]:
    """(N, C, H, W) and what was assumed."""
    if x.ndim == 2:
        side = round(x.shape[1] ** 0.5)
        if side * side != x.shape[1] or side < 2:
            raise DataError(f"{where}: rows of {x.shape[1]} values are no square grey pictures; reshape to NHWC")
        return x.reshape(-1, 1, side, side), [f"rows of {x.shape[1]} values taken as {side}×{side} grey pictures"]
    if x.ndim == 3:
        return x[:, None], []
    if x.ndim != 4:
        raise DataError(f"{where}: images must be (N, H, W, C), (N, C, H, W) or (N, H, W), not {x.shape}")
    first, last = x.shape[1] in (1, 3), x.shape[3] in (1, 3)
    if layout is None and first and last:
        raise DataError(
            f"{where}: images of shape {x.shape} could be (N, H, W, C) or (N, C, H, W); say which with a key layout"
        )
    if layout is None and not first and not last:
        raise DataError(f"{where}: images of shape {x.shape} have no axis of 1 or 3 channels, first or last")
    if layout == "NHWC" or (layout is None and last):
        return np.moveaxis(x, 3, 1), [] if layout else [f"images {x.shape} taken as (N, H, W, C)"]
    return x, [] if layout else [f"images {x.shape} taken as (N, C, H, W)"]


def _values(x: Array, stated: bool, where: str) -> tuple[Tensor, list[str]]:
    """uint8, or float32 in [0, 1]."""
    if x.dtype == np.bool_:
        return torch.from_numpy(x.astype(np.uint8) * np.uint8(255)), ["black and white pixels taken as 0 and 255"]
    if x.dtype.kind not in "uif":
        raise DataError(f"{where}: images of type {x.dtype} cannot be used: {EXPECTED}")
    low, high = x.min(), x.max()
    if x.dtype.kind == "f" and low >= 0 and high <= 1:
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)), []
    whole = x.dtype.kind != "f" or bool((x == np.rint(x)).all())
    if not (low >= 0 and high <= 255 and whole):
        hint = "; undo the normalisation, which belongs to the network's input format" if low < 0 else ""
        kind = "whole numbers" if whole else "values"
        raise DataError(f"{where}: the images hold {kind} in {low:g}..{high:g}; they must be {EXPECTED}{hint}")
    if high == 1 and not stated:
        raise DataError(f"{where}: the images hold whole numbers 0 and 1 only; store them as bool, as floats, or ×255")
    notes = [] if x.dtype == np.uint8 else [f"{x.dtype} images in 0..255 kept as uint8"]
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.uint8)), notes


def save_npz(path: str | os.PathLike[str], samples: Samples, *, force: bool = False) -> Path:
    """Write samples as ``x`` (N, H, W, C), ``y``, ``num_classes``, ``layout`` and, where known, ``classes``.

    The file appears whole or not at all. :func:`load_npz` gives back equal samples.

    Raises:
        OutputExists: the file is there already and ``force`` is not set.
    """
    path = Path(path)
    if path.exists() and not force:
        raise OutputExists(f"{path} exists already; overwrite it with --force")
    arrays: dict[str, Array] = {
        "x": samples.inputs.permute(0, 2, 3, 1).contiguous().cpu().numpy(),
        "y": samples.labels.cpu().numpy(),
        "num_classes": np.array(samples.num_classes),
        "layout": np.array("NHWC"),
    }
    if samples.class_names:
        arrays["classes"] = np.array(samples.class_names)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
