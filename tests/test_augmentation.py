"""Augmentation of a whole batch, against the same crop and flip done image by image with loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unbackdoor.augmentation import Augmentation, augment, padding_for
from unbackdoor.errors import ConfigError
from unbackdoor.rng import Rng


def views(image: Tensor, *, flips: bool) -> set[bytes]:
    """Every crop of the zero-padded image, plain and mirrored, cut out one by one."""
    _, height, width = image.shape
    up, side = padding_for(height), padding_for(width)
    found = set()
    for pixels in (image.numpy(), image.numpy()[:, :, ::-1]) if flips else (image.numpy(),):
        padded = np.pad(pixels, ((0, 0), (up, up), (side, side)))
        for top in range(2 * up + 1):
            for left in range(2 * side + 1):
                found.add(padded[:, top : top + height, left : left + width].tobytes())
    return found


@given(
    height=st.integers(1, 34),
    width=st.integers(1, 34),
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
        assert after.contiguous().numpy().tobytes() in views(before, flips=how == "crop-flip")


def test_every_place_and_both_sides_come_up_about_equally_often() -> None:
    n = 20_000
    image = torch.zeros(1, 1, 16, 16)  # padding 2: 5 × 5 places; the mark is off centre, to tell flips apart
    image[0, 0, 6, 4] = 1
    made = augment(image.expand(n, 1, 16, 16), "crop-flip", Rng(0).stream())
    counts = torch.bincount(made.flatten(1).argmax(1), minlength=256).reshape(16, 16)
    rows, columns = counts.sum(1) / n, counts.sum(0) / n
    assert rows[4:9].tolist() == pytest.approx([1 / 5] * 5, abs=0.02)
    # Plain, the mark lands in columns 2..6; mirrored, in 9..13.
    assert [*columns[2:7].tolist(), *columns[9:14].tolist()] == pytest.approx([1 / 10] * 10, abs=0.02)


def test_crop_alone_never_mirrors() -> None:
    x = torch.zeros(500, 1, 16, 16, dtype=torch.uint8)
    x[:, :, :, 2] = 1
    assert augment(x, "crop", Rng(0).stream())[..., 5:].sum() == 0


def test_small_images_are_mirrored_and_not_cropped() -> None:
    x = torch.randint(0, 256, (64, 1, 8, 8), generator=Rng(0).stream(), dtype=torch.uint8)
    assert torch.equal(augment(x, "crop", Rng(0).stream()), x)
    made = augment(x, "crop-flip", Rng(0).stream())
    as_they_are, mirrored = (made == x).flatten(1).all(1), (made == x.flip(3)).flatten(1).all(1)
    assert (as_they_are ^ mirrored).all()
    assert 10 < int(mirrored.sum()) < 54


def test_channels_of_a_pixel_stay_together() -> None:
    plane = torch.randint(1, 200, (16, 1, 18, 18), generator=Rng(0).stream(), dtype=torch.uint8)
    made = augment(torch.cat([plane, plane + 1], 1), "crop-flip", Rng(1).stream())
    inside = made[:, 0] > 0
    assert torch.equal(made[:, 1][inside], made[:, 0][inside] + 1)


def test_the_result_is_channels_last_and_repeats_with_its_seed() -> None:
    x = torch.randint(0, 256, (8, 3, 20, 20), generator=Rng(0).stream(), dtype=torch.uint8)
    one, same, other = (augment(x, "crop-flip", Rng(seed).stream()) for seed in (1, 1, 2))
    assert one.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_none_is_none() -> None:
    x = torch.rand(2, 3, 4, 4)
    assert augment(x, "none", Rng(0).stream()) is x


@pytest.mark.parametrize(("size", "padding"), [(1, 0), (15, 0), (16, 2), (28, 3), (32, 4), (64, 8), (224, 28)])
def test_padding_grows_with_the_image(size: int, padding: int) -> None:
    assert padding_for(size) == padding


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ConfigError, match="augmentation must be one of none, crop, crop-flip, not 'mixup'"):
        augment(torch.zeros(1, 1, 4, 4), "mixup", Rng(0).stream())  # type: ignore[arg-type]
