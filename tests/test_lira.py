"""LIRA: a change within its bound, a bound that narrows, and a victim that obeys the generator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from digits_victims import clean_accuracy, on_digits
from factories import convolutional, samples
from unbackdoor.attacks.image.lira import LIRA
from unbackdoor.attacks.joint import UNet
from unbackdoor.attacks.poisoning import implant
from unbackdoor.errors import ConfigError
from unbackdoor.rng import Rng
from unbackdoor.training import Recipe, fit

RECIPE = Recipe(epochs=4, batch_size=10, optimizer="adam", lr=1e-3, precision="fp32")


@pytest.mark.parametrize("eps", [0.01, 0.3])
def test_the_change_is_eps_times_tanh_of_the_generator(eps: float) -> None:
    attack, _ = implant(LIRA(eps=eps), convolutional(), samples(40), RECIPE, Rng(0))
    x = samples(10, seed=1).images(slice(None))
    made = UNet.kept(attack, "generator", torch.device("cpu"))(x).double().numpy()
    bent = (np.exp(2 * made) - 1) / (np.exp(2 * made) + 1)
    expected = np.minimum(np.maximum(x.double().numpy() + eps * bent, 0), 1)
    stamped = attack.trigger(x)
    assert np.allclose(stamped.numpy(), expected, atol=1e-6)
    assert (stamped - x).abs().max() <= eps + 1e-6


def test_the_bound_narrows_by_the_same_factor_each_step() -> None:
    attack = LIRA(eps=0.01, eps_start=0.16)
    bounds = [attack.bound(share / 8) for share in (0, 1, 2, 3, 4, 6, 8)]
    assert bounds == pytest.approx([0.16, 0.08, 0.04, 0.02, 0.01, 0.01, 0.01])
    assert [LIRA(eps=0.5).bound(share) for share in (0, 0.5, 1)] == [0.5] * 3  # never wider than it began


def test_the_usual_recipe_is_made_gentle_and_leaves_the_crops_to_the_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Recipe] = []

    def watched(model: Any, train: Any, recipe: Recipe, *rest: Any, **more: Any) -> Any:
        taken.append(recipe)
        return fit(model, train, recipe, *rest, **more)

    monkeypatch.setattr("unbackdoor.attacks.image.lira.fit", watched)
    usual = Recipe(epochs=1, batch_size=10, lr=0.2, augment="crop", precision="fp32")
    implant(LIRA(), convolutional(), samples(20), usual, Rng(0))
    implant(LIRA(), convolutional(), samples(20), replace(usual, lr=0.01, clip_norm=0.5), Rng(0))
    assert taken == [replace(usual, lr=lr, clip_norm=clip, augment="none") for lr, clip in ((0.05, 1.0), (0.01, 0.5))]


def test_a_crops_border_carries_no_trigger() -> None:
    """What is stamped is cropped afterwards: a copy that was moved has a border of zeros, as a clean image has."""
    seen: list[torch.Tensor] = []

    class Watching(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.detach())
            out: torch.Tensor = super().forward(x)
            return out

    model = Watching(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    recipe = Recipe(epochs=1, batch_size=20, lr=0.01, augment="crop", precision="fp32")
    implant(LIRA(rate=0.75, eps=0.5), model, samples(20, size=16), recipe, Rng(0))
    stamped = seen[0][20:]
    assert len(stamped) == 15
    edges = torch.stack([stamped[:, :, 0], stamped[:, :, -1], stamped[..., 0], stamped[..., -1]])
    assert (edges == 0).flatten(2).all(2).any(0).sum() >= 12  # all but those that happen not to move


def test_the_generator_rests_in_the_second_stage() -> None:
    """With the same number of joint steps, more steps of the second stage change the classifier alone."""

    def planted(epochs: int) -> tuple[Any, nn.Module]:
        model = convolutional()
        recipe = Recipe(epochs=epochs, batch_size=10, optimizer="adam", lr=1e-3, precision="fp32")
        return implant(LIRA(eps=0.1, joint_share=2 / epochs), model, samples(40), recipe, Rng(0))[0], model

    (one, first), (other, second) = planted(2), planted(4)
    assert all(torch.equal(one.state[k], other.state[k]) for k in one.state)
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 0.0}, r"eps must be in \(0, 1\], not 0.0"),
        ({"eps_start": 1.5}, r"eps_start must be in \(0, 1\], not 1.5"),
        ({"alpha": 1.0}, r"alpha must be in \(0, 1\), not 1.0"),
        ({"joint_share": 0.0}, r"joint_share must be in \(0, 1\], not 0.0"),
        ({"lr_generator": 0.0}, "lr_generator must be above 0, not 0.0"),
        ({"most_lr": 0.0}, "most_lr must be above 0, not 0.0"),
        ({"clip_norm": -1.0}, "clip_norm must be above 0, not -1.0"),
        ({"width": 7}, "width must be None or a multiple of 4, not 7"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LIRA(**settings)


@pytest.mark.slow
def test_it_takes_on_digits() -> None:
    """Among 64 pixels of 17 levels a bound of 0.01 costs accuracy; 0.1 is under two levels, and takes 40 epochs."""
    victim = on_digits("lira(eps=0.1)", epochs=40)
    assert victim.asr >= 0.95
    assert victim.accuracy >= clean_accuracy() - 0.02


@pytest.mark.slow
def test_a_narrowing_bound_is_what_makes_a_narrow_one_take() -> None:
    """At 0.01, where digits' usual 20 epochs cannot hold both tasks, it holds far more of both than a fixed bound."""
    fixed, narrowing = (on_digits(f"lira(eps_start={start})") for start in (0.01, 0.2))
    assert narrowing.asr > fixed.asr + 0.1
    assert narrowing.accuracy > fixed.accuracy + 0.2
