"""Augmentation of a whole batch, against the same crop and flip done image by image with loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unbackdoor.augmentation import Augmentation, augment, padding_for
from unbackdoor.errors import ConfigError
from unbackdoor.rng import Rng


def views(image: Tensor, *, flips: bool) -> set[tuple[int, ...]]:
    """Every crop of the zero-padded image, plain and mirrored, made pixel by pixel."""
    channels, height, width = image.shape
    up, side = padding_for(height), padding_for(width)
    found = set()
    for dy in range(-up, up + 1):
        for dx in range(-side, side + 1):
            for mirrored in (False, True) if flips else (False,):
                pixels = []
                for c in range(channels):
                    for row in range(height):
                        for column in range(width):
                            y, x = row + dy, (width - 1 - column if mirrored else column) + dx
                            inside = 0 <= y < height and 0 <= x < width
                            pixels.append(int(image[c, y, x]) if inside else 0)
                found.add(tuple(pixels))
    return found


@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    channels=st.integers(1, 3),
    how=st.sampled_from(["crop", "crop-flip"]),
    dtype=st.sampled_from([torch.uint8, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_each_image_becomes_one_of_its_crops(
    height: int, width: int, channels: int, how: Augmentation, dtype: torch.dtype, seed: int
) -> None:
    generator = Rng(seed).stream("images")
    x = torch.randint(1, 256, (3, channels, height, width), generator=generator).to(dtype)
    kept = x.clone()
    made = augment(x, how, Rng(seed).stream("crops"))
    assert made.shape == x.shape
    assert made.dtype == dtype
    assert torch.equal(x, kept)
    for before, after in zip(x, made, strict=True):
        assert tuple(int(v) for v in after.flatten()) in views(before, flips=how == "crop-flip")


def test_every_place_and_both_sides_come_up_about_equally_often() -> None:
    n = 20_000
    image = torch.zeros(1, 1, 8, 8)  # padding 1: 3 × 3 places; the marks are off centre, to tell flips apart
    image[0, 0, 3, 2] = 1
    made = augment(image.expand(n, 1, 8, 8), "crop-flip", Rng(0).stream())
    where = made.flatten(1).argmax(1)
    counts = torch.bincount(where, minlength=64).reshape(8, 8)
    rows, columns = counts.sum(1) / n, counts.sum(0) / n
    assert rows[2:5].tolist() == pytest.approx([1 / 3] * 3, abs=0.02)
    # Plain, the mark lands in columns 1..3; mirrored, in 4..6.
    assert columns[1:7].tolist() == pytest.approx([1 / 6] * 6, abs=0.02)


def test_crop_alone_never_mirrors() -> None:
    x = torch.zeros(500, 1, 8, 8, dtype=torch.uint8)
    x[:, :, :, 1] = 1
    assert augment(x, "crop", Rng(0).stream())[..., 4:].sum() == 0


def test_channels_of_a_pixel_stay_together() -> None:
    plane = torch.randint(1, 200, (16, 1, 8, 8), generator=Rng(0).stream(), dtype=torch.uint8)
    made = augment(torch.cat([plane, plane + 1], 1), "crop-flip", Rng(1).stream())
    inside = made[:, 0] > 0
    assert torch.equal(made[:, 1][inside], made[:, 0][inside] + 1)


def test_the_result_is_channels_last_and_repeats_with_its_seed() -> None:
    x = torch.randint(0, 256, (8, 3, 12, 12), generator=Rng(0).stream(), dtype=torch.uint8)
    one, same, other = (augment(x, "crop-flip", Rng(seed).stream()) for seed in (1, 1, 2))
    assert one.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_none_is_none() -> None:
    x = torch.rand(2, 3, 4, 4)
    assert augment(x, "none", Rng(0).stream()) is x


@pytest.mark.parametrize(("size", "padding"), [(1, 1), (8, 1), (28, 3), (32, 4), (64, 8), (224, 28)])
def test_padding_grows_with_the_image(size: int, padding: int) -> None:
    assert padding_for(size) == padding


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ConfigError, match="augmentation must be one of none, crop, crop-flip, not 'mixup'"):
        augment(torch.zeros(1, 1, 4, 4), "mixup", Rng(0).stream())  # type: ignore[arg-type]
