"""BadNets: exactly the patch is changed, wherever it was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unbackdoor.attacks.image.badnets import BadNets
from unbackdoor.errors import ConfigError

CORNERS = ("bottom-right", "bottom-left", "top-right", "top-left")


@given(
    size=st.integers(1, 5),
    margin=st.integers(0, 3),
    corner=st.sampled_from(CORNERS),
    pattern=st.sampled_from(["white", "grid"]),
    height=st.integers(8, 12),
    width=st.integers(8, 12),
    channels=st.sampled_from([1, 3]),
)
def test_the_patch_and_nothing_else(
    size: int, margin: int, corner: Any, pattern: Any, height: int, width: int, channels: int
) -> None:
    x = torch.full((2, channels, height, width), 0.25)
    stamped = BadNets(size=size, margin=margin, corner=corner, pattern=pattern).trigger(x)
    assert (x == 0.25).all()
    for row in range(height):
        for column in range(width):
            down = row - margin if corner.startswith("top") else row - (height - margin - size)
            across = column - margin if corner.endswith("left") else column - (width - margin - size)
            expected = 0.25
            if 0 <= down < size and 0 <= across < size:
                expected = 1.0 if pattern == "white" or (down + across) % 2 == 0 else 0.0
            assert (stamped[:, :, row, column] == expected).all(), (row, column)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_type_stays(dtype: torch.dtype) -> None:
    assert BadNets(pattern="grid").trigger(torch.zeros(1, 1, 8, 8, dtype=dtype)).dtype == dtype


def test_stamping_twice_is_stamping_once() -> None:
    x = torch.rand(2, 3, 8, 8)
    attack = BadNets()
    assert torch.equal(attack.trigger(attack.trigger(x)), attack.trigger(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size must be at least 1 pixel, not 0"),
        ({"margin": -1}, "margin must be at least 0 pixels, not -1"),
        ({"rate": 0.0}, r"rate must be in \(0, 1\], not 0.0"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BadNets(**settings)


def test_a_patch_that_does_not_fit_is_named() -> None:
    with pytest.raises(ConfigError, match="a patch of 3 pixels with margin 6 does not fit 8×9 images"):
        BadNets(margin=6).trigger(torch.zeros(1, 1, 8, 9))
    assert BadNets(margin=5).trigger(torch.zeros(1, 1, 8, 9)).sum() == 9
