"""Arrays: layouts, value ranges, labels, packed strips, and the way to a file and back."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from unbackdoor.data.arrays import from_arrays, load_npz, save_npz, unpack_strips
from unbackdoor.errors import DataError, OutputExists
from unbackdoor.types import Samples

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (6, 5, 4, 3), np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("x", "y"),
    [("x", "y"), ("X", "y"), ("images", "labels"), ("inputs", "targets"), ("data", "label"), ("arr_0", "arr_1")],
)
def test_known_keys(tmp_path: Path, x: str, y: str) -> None:
    samples = load_npz(saved(tmp_path / "a.npz", **{x: COLOUR, y: LABELS})).samples
    np.testing.assert_array_equal(samples.inputs.permute(0, 2, 3, 1).numpy(), COLOUR)
    assert samples.labels.tolist() == LABELS.tolist()
    assert samples.num_classes == 3


@pytest.mark.parametrize("keys", ["x_{}", "{}_images"])
def test_splits(tmp_path: Path, keys: str) -> None:
    labels = {"x_{}": "y_{}", "{}_images": "{}_labels"}[keys]
    content = {}
    for split, part in (("train", slice(0, 4)), ("test", slice(3, 6))):
        content |= {keys.format(split): COLOUR[part], labels.format(split): LABELS[part]}
    path = saved(tmp_path / "a.npz", **content)
    assert len(load_npz(path, split="train").samples) == 4
    assert len(load_npz(path).samples) == 3
    with pytest.raises(DataError, match="no split 'val'; it has train and test"):
        load_npz(path, split="val")


def test_class_names_and_count_from_the_file_or_the_caller(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", x=COLOUR, y=LABELS, classes=np.array(["a", "b", "c"]))
    assert load_npz(path).samples.class_names == ("a", "b", "c")
    assert from_arrays(COLOUR, LABELS, num_classes=7).samples.num_classes == 7
    with pytest.raises(DataError, match="label 2 is out of range: 2 classes"):
        from_arrays(COLOUR, LABELS, num_classes=2)


def test_layouts_are_found_and_said() -> None:
    first = from_arrays(COLOUR.transpose(0, 3, 1, 2), LABELS)
    last = from_arrays(COLOUR, LABELS)
    assert torch.equal(first.samples.inputs, last.samples.inputs)
    assert "taken as (N, C, H, W)" in first.notes[0]
    assert "taken as (N, H, W, C)" in last.notes[0]
    grey = from_arrays(COLOUR[..., 0], LABELS).samples
    assert grey.image_shape == (1, 5, 4)
    rows = from_arrays(COLOUR[:, :4, :, 0].reshape(6, 16), LABELS)
    assert torch.equal(rows.samples.inputs, grey.inputs[:, :, :4])
    assert "4×4 grey" in rows.notes[0]


def test_an_ambiguous_layout_has_to_be_stated() -> None:
    x = RNG.integers(0, 256, (6, 3, 5, 3), np.uint8)
    with pytest.raises(DataError, match="could be"):
        from_arrays(x, LABELS)
    assert from_arrays(x, LABELS, layout="NHWC").samples.image_shape == (3, 3, 5)
    assert from_arrays(x, LABELS, layout="NCHW").samples.inputs.shape == (6, 3, 5, 3)


@pytest.mark.parametrize(
    ("shape", "message"), [((6, 5, 4, 2), "no axis of 1 or 3"), ((6,), "must be (N, H, W, C)"), ((6, 17), "no square")]
)
def test_shapes_that_are_no_images(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        from_arrays(np.zeros(shape, np.uint8), LABELS)


def test_values_are_kept_or_converted() -> None:
    assert torch.equal(from_arrays(torch.from_numpy(COLOUR), LABELS).samples.inputs, _chw(COLOUR))
    for dtype in (np.int64, np.float32, np.float64, np.uint16):
        loaded = from_arrays(COLOUR.astype(dtype), LABELS)
        assert torch.equal(loaded.samples.inputs, _chw(COLOUR))
        assert any("in 0..255 kept as uint8" in n for n in loaded.notes)
    unit = from_arrays(COLOUR / 255, LABELS).samples.inputs
    assert unit.dtype == torch.float32
    torch.testing.assert_close(unit, _chw(COLOUR) / 255)
    assert from_arrays(COLOUR > 100, LABELS).samples.inputs.unique().tolist() == [0, 255]


def _chw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (COLOUR / 127.5 - 1, "undo the normalisation"),
        (COLOUR / 100, "floats in [0, 1]"),
        (COLOUR.astype(np.int32) * 257, "whole numbers in"),
        (np.where(COLOUR > 200, np.nan, COLOUR / 255), "nan"),
        ((COLOUR > 100).astype(np.int64), "0 and 1 only"),
        (COLOUR.astype(complex), "complex"),
        (np.array([None] * 6), "Python objects"),
    ],
)
def test_ranges_that_are_refused(x: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        from_arrays(x, LABELS)


def test_label_forms() -> None:
    forms: list[Any] = [LABELS[:, None], LABELS.astype(np.uint8), LABELS.astype(float), torch.from_numpy(LABELS)]
    for form in forms:
        assert from_arrays(COLOUR, form).samples.labels.tolist() == LABELS.tolist()
    one_hot = from_arrays(COLOUR, np.eye(5)[LABELS]).samples
    assert one_hot.labels.tolist() == LABELS.tolist()
    assert one_hot.num_classes == 5


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.full((6, 3), 1 / 3), "not one-hot"),
        (LABELS + 0.5, "label 0.5 is no whole number"),
        (np.array(list("abcabc")), "labels must be integers"),
        (LABELS[:4], "6 images and 4 labels"),
        (LABELS - 1, "label -1 is out of range"),
        (np.zeros(6, int), "of one class (class 0)"),
    ],
)
def test_labels_that_are_refused(y: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        from_arrays(COLOUR, y)


def test_no_samples_at_all() -> None:
    with pytest.raises(DataError, match="there are no samples"):
        from_arrays(COLOUR[:0], LABELS[:0])


class Bomb:
    """Would leave a trace if it were ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_pickled_objects_are_never_read(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    path = saved(tmp_path / "a.npz", x=np.array([Bomb(trace)], dtype=object), y=LABELS)
    with pytest.raises(DataError, match="never read since reading it could run code"):
        load_npz(path)
    assert not trace.exists()


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_npz(tmp_path / "nowhere.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(DataError, match=r"text\.npz"):
        load_npz(tmp_path / "text.npz")
    whole = saved(tmp_path / "a.npz", x=COLOUR, y=LABELS).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:100])
    with pytest.raises(DataError, match="cannot be read"):
        load_npz(tmp_path / "cut.npz")
    np.save(tmp_path / "single.npy", COLOUR)
    with pytest.raises(DataError, match="a single array"):
        load_npz(tmp_path / "single.npy")
    with pytest.raises(DataError, match="its keys pictures, y; name them x and y"):
        load_npz(saved(tmp_path / "b.npz", pictures=COLOUR, y=LABELS))


def strips(pictures: np.ndarray, each: int) -> tuple[np.ndarray, np.ndarray]:
    pieces = []
    for start in range(0, len(pictures), each):
        buffer = io.BytesIO()
        part = pictures[start : start + each]
        Image.fromarray(part.reshape(-1, *part.shape[2:])).save(buffer, "WEBP", lossless=True)
        pieces.append(buffer.getvalue())
    offsets = np.cumsum([0, *map(len, pieces)])
    return np.frombuffer(b"".join(pieces), np.uint8), offsets


def test_packed_strips_come_back_to_the_bit(tmp_path: Path) -> None:
    pictures = RNG.integers(0, 256, (7, 8, 8, 3), np.uint8)
    packed, offsets = strips(pictures, 3)
    labels = np.arange(7) % 2
    path = saved(tmp_path / "a.npz", x_test_webp=packed, x_test_off=offsets, y_test=labels)
    np.testing.assert_array_equal(load_npz(path).samples.inputs.permute(0, 2, 3, 1).numpy(), pictures)
    with pytest.raises(DataError, match="strip 1 is no WebP"):
        unpack_strips(np.concatenate([packed[: offsets[1]], packed[offsets[1] + 9 :]]), offsets - [0, 0, 9, 9])
    with pytest.raises(DataError, match="offsets must rise"):
        unpack_strips(packed, offsets[::-1])
    with pytest.raises(DataError, match="pile of square pictures"):
        unpack_strips(*strips(pictures[:, :5], 3))


@given(
    shape=st.tuples(st.integers(2, 4), st.sampled_from((1, 3)), st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 99),
    floating=st.booleans(),
    named=st.booleans(),
)
def test_saved_samples_come_back_equal(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, ...], seed: int, floating: bool, named: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    samples = Samples(
        inputs / 255 if floating else inputs,
        torch.arange(shape[0]) % 2,
        3,
        ("a", "b", "ü") if named else (),
    )
    path = save_npz(tmp_path_factory.mktemp("npz") / "deep" / "a.npz", samples)
    back = load_npz(path).samples
    assert torch.equal(back.inputs, samples.inputs)
    assert back.inputs.dtype == samples.inputs.dtype
    assert torch.equal(back.labels, samples.labels)
    assert (back.num_classes, back.class_names) == (3, samples.class_names)
    assert [p.name for p in path.parent.iterdir()] == ["a.npz"]


def test_saving_overwrites_only_by_force_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = from_arrays(COLOUR, LABELS).samples
    path = save_npz(tmp_path / "a.npz", samples)
    before = path.read_bytes()
    with pytest.raises(OutputExists, match="--force"):
        save_npz(path, samples)

    def broken(file: Any, **_: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", broken)
    with pytest.raises(KeyboardInterrupt):
        save_npz(path, samples, force=True)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]
