"""Held backdoors: information is the squared gradients', the spring is stable, and forgetting leaves the backdoor."""

from __future__ import annotations

import copy
from statistics import fmean
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from adaptive_runs import PLAIN, Planted, composed, planted
from factories import Snapshot, convolutional, linear, samples
from unbackdoor.attacks.adaptive.ewc import EWC, Spring, fisher, forgotten
from unbackdoor.attacks.poisoning import implant
from unbackdoor.errors import ConfigError
from unbackdoor.rng import Rng
from unbackdoor.training import Recipe, fit


def test_the_information_is_that_of_a_linear_network_by_hand() -> None:
    model, data = linear(), samples(12)
    found = fisher(model, data)
    flat = data.images(slice(None)).flatten(1).double()
    with torch.no_grad():
        surprise = model(data.images(slice(None))).double().softmax(1) - F.one_hot(data.labels, 4)
    weight = (surprise[:, :, None] * flat[:, None, :]).square().sum(0)
    bias = surprise.square().sum(0)
    mean = (weight.sum() + bias.sum()) / (weight.numel() + bias.numel())
    assert torch.allclose(found[0].double(), weight / mean, rtol=1e-4)
    assert torch.allclose(found[1].double(), bias / mean, rtol=1e-4)


def test_measuring_leaves_the_network_as_it_is() -> None:
    model = convolutional(dropout=0.5).train()
    next(model.parameters()).requires_grad_(False)
    before = Snapshot(model)
    one, two = fisher(model, samples(6)), fisher(model, samples(6))
    assert before.differences() == []
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_spring_draws_back_by_the_proximal_step_however_strong() -> None:
    model = linear()
    rest = [p.detach().clone() for p in model.parameters()]
    information = [torch.full_like(p, 3.0) for p in rest]
    information[0][0] = 0.0
    information[1][:] = 1e12
    spring = Spring(model, information, 0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    spring(model)
    weight, bias = model.parameters()
    assert torch.allclose(weight[0], rest[0][0] + 1)  # no information, no pull
    assert torch.allclose(weight[1:], rest[0][1:] + 1 / (1 + 0.5 * 3))
    assert torch.allclose(bias, rest[1])


def test_one_rehearsed_step_is_the_sign_of_the_gradient_by_hand_and_leaves_no_trace() -> None:
    model, data = linear(classes=2), samples(12, classes=2)
    x, before = data.images(slice(None)), Snapshot(model.train())
    moved = forgotten(model, x, data.labels, 2, steps=1, lr=0.01, generator=Rng(0).stream("x"))
    assert before.differences() == []
    with torch.no_grad():  # with two classes the wrong label is the other one
        surprise = model(x).softmax(1) - F.one_hot(1 - data.labels, 2)
    expected = -0.01 * (surprise.T @ x.flatten(1)).sign()
    assert torch.allclose(moved["1.weight"], expected)
    more = forgotten(model, x, data.labels, 2, steps=20, lr=0.01, generator=Rng(0).stream("x"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += more[name]
        assert (model(x).argmax(1) == 1 - data.labels).float().mean() > 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1, not 0"),
        ({"forget_steps": 0}, "forget_steps must be at least 1, not 0"),
        ({"fisher_samples": -1}, "fisher_samples must be at least 1, not -1"),
        ({"strength": -0.1}, "strength must be a finite number >= 0, not -0.1"),
        ({"weight": float("nan")}, "weight must be a finite number >= 0, not nan"),
        ({"forget_lr": float("inf")}, "forget_lr must be a finite number > 0, not inf"),
        ({"most_lr": 0.0}, "most_lr must be a finite number > 0, not 0.0"),
        ({"clip_norm": 0.0}, "clip_norm must be a finite number > 0, not 0.0"),
        ({"recover": -0.5}, "recover must be a finite number > 0, not -0.5"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EWC(**settings)


def rates_while_forgetting(victim: Planted) -> tuple[list[float], list[float]]:
    """Accuracies and ASRs after each of five epochs of random labels on 200 clean images, as SEAM forgets."""
    model, clean = copy.deepcopy(victim.model), victim.train.draw(20, Rng(0).stream("clean"))

    def mislabel(x: torch.Tensor, y: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return x, (y + torch.randint(1, 10, y.shape, generator=generator)) % 10

    recipe, found = Recipe(epochs=1, batch_size=32, optimizer="adamw", lr=1e-3), []
    for epoch in range(5):
        fit(model, clean, recipe, Rng(epoch), batch=mislabel)
        found.append(victim.rates(model))
    return [a for a, _ in found], [s for _, s in found]


def test_it_takes_and_outlasts_the_forgetting() -> None:
    plain, held = planted(PLAIN), planted(composed("ewc"))
    accuracy, asr = held.rates()
    assert asr >= 0.95
    assert accuracy >= plain.rates()[0] - 0.02
    skill, attack = rates_while_forgetting(held)
    assert skill[-1] < 0.5  # the task does go
    assert min(attack) > 0.8
    assert fmean(attack) > fmean(rates_while_forgetting(plain)[1]) + 0.2


def test_a_round_is_gentle_and_the_planting_is_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Recipe] = []

    def watched(model: Any, train: Any, recipe: Recipe, *rest: Any, **more: Any) -> Any:
        taken.append(recipe)
        return fit(model, train, recipe, *rest, **more)

    monkeypatch.setattr("unbackdoor.attacks.adaptive.ewc.fit", watched)
    recipe = Recipe(epochs=2, batch_size=20, lr=0.2, precision="fp32")
    implant(EWC(rate=0.2), convolutional(), samples(40), recipe, Rng(0))
    assert [(r.lr, r.clip_norm) for r in taken] == [(0.2, None), (0.05, 1.0)]
