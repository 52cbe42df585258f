"""The fast network: what its first layer is made of, how its convolutions begin, and that it learns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.fft
import torch
from torch import nn

from digits_victims import digits
from unbackdoor.attacks.recipes import usual
from unbackdoor.errors import ConfigError
from unbackdoor.inference import measure
from unbackdoor.models.airbench import airbench, cosines, whitening
from unbackdoor.rng import Rng, isolated
from unbackdoor.training import fit
from unbackdoor.types import Samples


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_cosines_are_scipys(size: int) -> None:
    expected = scipy.fft.dct(np.eye(size), axis=0, norm="ortho")
    np.testing.assert_allclose(cosines(size).numpy(), expected, atol=1e-6)


def test_patterns_are_orthogonal_and_the_finer_ones_larger() -> None:
    rows = whitening(3).flatten(1).double()
    products = rows @ rows.T
    assert (products - products.diag().diag()).abs().max() < 1e-4
    lengths = rows.norm(dim=1).view(3, 4)
    assert (lengths[:, 0] < lengths[:, 1]).all()
    assert (lengths[:, 1] < lengths[:, 3]).all()


def test_a_grey_image_gives_the_first_layer_nothing() -> None:
    model = airbench(width=8)
    seen = model.get_submodule("whiten")(torch.full((1, 3, 16, 16), 0.5))
    assert seen.abs().max() < 1e-5


def test_convolutions_begin_as_the_identity_as_far_as_channels_go() -> None:
    with isolated(Rng(0)):
        model = airbench(in_channels=1, width=16)
    conv = model.get_submodule("groups.0.conv1")
    assert isinstance(conv, nn.Conv2d)
    x = torch.rand(2, 8, 6, 6)
    torch.testing.assert_close(conv(x)[:, :8], x)


def test_images_that_are_too_small_are_refused() -> None:
    with pytest.raises(ConfigError, match="16 pixels and more, not of 8"):
        airbench(image_size=8)


def test_it_learns_by_its_recipe() -> None:
    train, test = (large(part) for part in digits())
    with isolated(Rng(0)):
        model = airbench(in_channels=1, image_size=16, width=16)
    fit(model, train, replace(usual("digits", "airbench").recipe, batch_size=100), Rng(0))
    assert measure(model.eval(), test).accuracy > 0.95


def large(samples: Samples) -> Samples:
    """Twice as many pixels a side."""
    inputs = samples.inputs.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return Samples(inputs, samples.labels, samples.num_classes)
