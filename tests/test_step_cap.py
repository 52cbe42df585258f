"""Recipe.step_cap: matrices learn no faster than in proportion to their size; nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import factories
from unbackdoor.errors import ConfigError
from unbackdoor.rng import Rng
from unbackdoor.training import Recipe, fit, make_optimizer


def network(scale: float) -> nn.Sequential:
    """A matrix whose entries are all ±scale, its bias, and a matrix of ones."""
    first, second = nn.Linear(4, 4), nn.Linear(4, 2)
    with torch.no_grad():
        first.weight.copy_(scale * (1 - 2 * (torch.arange(16) % 2)).reshape(4, 4))
        second.weight.fill_(1.0)
    return nn.Sequential(first, second)


def groups(model: nn.Module, **settings: Any) -> dict[str, dict[str, Any]]:
    """Parameter name -> its group."""
    optimizer = make_optimizer(list(model.parameters()), Recipe(**settings))
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


def test_without_a_cap_there_is_one_group() -> None:
    model = network(0.001)
    optimizer = make_optimizer(list(model.parameters()), Recipe(optimizer="adamw", lr=0.01))
    assert len(optimizer.param_groups) == 1
    assert "lr_share" not in optimizer.param_groups[0]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_small_matrix_is_capped_and_nothing_else(optimizer: str) -> None:
    found = groups(network(0.002), optimizer=optimizer, lr=0.01, step_cap=0.5)
    shares = {name: group["lr_share"] for name, group in found.items()}
    assert shares == {"0.weight": pytest.approx(0.5 * 0.002 / 0.01), "0.bias": 1, "1.weight": 1, "1.bias": 1}


def test_a_matrix_of_zeros_is_not_stopped() -> None:
    assert groups(network(0.0), lr=0.01, step_cap=0.5)["0.weight"]["lr_share"] == 1


def test_decoupled_decay_is_as_fast_for_a_capped_matrix() -> None:
    found = groups(network(0.002), optimizer="adamw", lr=0.01, weight_decay=0.3, step_cap=0.5)
    assert found["0.weight"]["lr_share"] < 1
    for group in found.values():
        assert group["lr_share"] * group["weight_decay"] == pytest.approx(0.3)
    coupled = groups(network(0.002), optimizer="adam", lr=0.01, weight_decay=0.3, step_cap=0.5)
    assert {g["weight_decay"] for g in coupled.values()} == {0.3}


def test_a_first_adam_step_is_as_large_as_the_cap() -> None:
    small = 0.002
    clean = factories.samples(16, 4)
    model = factories.linear()
    with torch.no_grad():
        model[1].weight.fill_(small)  # type: ignore[index]
    before = factories.weights(model)
    recipe = Recipe(epochs=1, batch_size=16, optimizer="adam", lr=0.05, step_cap=0.5, precision="fp32")
    fit(model, clean, recipe, Rng(0))
    moved = {name: (value - before[name]).abs().max().item() for name, value in model.state_dict().items()}
    assert moved["1.weight"] == pytest.approx(0.5 * small, rel=1e-2)
    assert moved["1.bias"] <= 0.05 * 1.01
    assert moved["1.bias"] > 0.5 * small * 2


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_cap_that_does_not_bind_changes_nothing(optimizer: Any) -> None:
    def trained(cap: float | None) -> dict[str, torch.Tensor]:
        model = factories.convolutional()
        settings: dict[str, Any] = {"epochs": 2, "batch_size": 16, "lr": 0.01, "weight_decay": 0.1}
        fit(model, factories.samples(), Recipe(optimizer=optimizer, step_cap=cap, **settings), Rng(0))
        return factories.weights(model)

    assert factories.same(trained(None), trained(1e6))


def test_a_cap_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"step_cap must be None or > 0, not 0\.0"):
        Recipe(step_cap=0.0)
