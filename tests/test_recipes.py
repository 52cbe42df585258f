"""The usual victims: every named data set has a network that can be built, and a recipe that suits its pictures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from unbackdoor.attacks.recipes import ANY, BY_NETWORK, USUAL, usual
from unbackdoor.data.named import DATASETS, dataset_info
from unbackdoor.models.architectures import build_network
from unbackdoor.models.zoo import ZOO
from unbackdoor.rng import Rng


def test_every_named_data_set_has_its_own() -> None:
    assert set(USUAL) == set(DATASETS)


@pytest.mark.parametrize("name", sorted(USUAL))
def test_the_network_takes_the_pictures(name: str) -> None:
    info = dataset_info(name)
    channels, size, width = info.image_shape
    network = build_network(
        usual(name).arch, num_classes=info.num_classes, in_channels=channels, image_size=size, rng=Rng(0)
    )
    assert network.eval()(torch.zeros(2, channels, size, width)).shape == (2, info.num_classes)


@pytest.mark.parametrize("name", sorted(USUAL))
def test_no_recipe_augments_more_than_the_class_bears(name: str) -> None:
    allowed = {"none": ["none"], "crop": ["none", "crop"], "crop-flip": ["none", "crop", "crop-flip"]}
    assert usual(name).recipe.augment in allowed[dataset_info(name).augmentation]


def test_a_network_may_bring_its_own_recipe() -> None:
    for name, flips in (("cifar10", "crop-flip"), ("gtsrb", "crop")):
        found = usual(name, "airbench(width=16)")
        assert found.arch == "airbench(width=16)"
        assert found.recipe == replace(BY_NETWORK["airbench"], augment=flips)
        assert found.recipe != usual(name).recipe
    assert usual("cifar10", "vgg11_bn") == replace(USUAL["cifar10"], arch="vgg11_bn")
    assert set(BY_NETWORK) <= set(ZOO)


def test_names_go_by_any_case_and_unknown_data_gets_a_network_without_flips() -> None:
    assert usual("CIFAR10") is USUAL["cifar10"]
    assert usual("my holiday pictures") is ANY
    assert ANY.recipe.augment != "crop-flip"
