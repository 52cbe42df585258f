"""Latent: triggered features are the target's, so that a new head brings the backdoor back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from adaptive_runs import PLAIN, composed, planted
from factories import Snapshot, convolutional, samples
from unbackdoor.attacks.adaptive.base import HeadInputs, Marking
from unbackdoor.attacks.adaptive.latent import Latent, _Matching, feature_distance, with_new_head
from unbackdoor.attacks.poisoning import implant
from unbackdoor.errors import ConfigError, UnsupportedModel
from unbackdoor.models.surgery import find_head
from unbackdoor.rng import Rng
from unbackdoor.training import Recipe, fit
from unbackdoor.types import Samples

HEAD = Recipe(epochs=30, batch_size=64, optimizer="adam", lr=3e-3)


def test_the_distance_by_hand() -> None:
    features, centres = torch.tensor([[3.0, 4], [1, 1]]), torch.tensor([[0.0, 4], [1, 1]])
    assert feature_distance(features, centres).tolist() == [pytest.approx(9 / 16), 0]


def test_centres_are_running_means_of_clean_samples_and_only_triggered_features_are_moved() -> None:
    model, data = convolutional(norm=False), samples(8)
    marking = Marking(4)
    with HeadInputs(find_head(model, data)) as seen:
        objective = _Matching(Latent(weight=2.0, momentum=0.75), marking, seen, 0.0)
        x, y = data.images(slice(None)), torch.tensor([0, 0, 1, 1, 2, 0, 0, 3])
        marking.poisoned = torch.tensor([False] * 5 + [True] * 2 + [False])
        first = objective(model, x, y)
        features = seen.features.detach()
        centre = features[:2].mean(0)
        distance = ((features[5:7] - centre).square().sum(1) / centre.square().sum()).mean()
        task = nn.functional.cross_entropy(first.logits, y, reduction="none")[~marking.poisoned].mean()
        assert first.loss.item() == pytest.approx((task + 2 * distance).item(), rel=1e-5)
        # The next batch has one clean sample of class 0 and none of class 1.
        y = torch.tensor([0, 2, 2, 2, 3, 3, 3, 3])
        marking.poisoned = torch.zeros(8, dtype=torch.bool)
        assert objective(model, x, y).terms["distance"].item() == 0
        assert torch.allclose(objective.centres[0], 0.75 * centre + 0.25 * features[0], atol=1e-6)
        assert torch.allclose(objective.centres[1], features[2:4].mean(0))


def test_the_distance_counts_from_the_middle_of_the_warm_up_on() -> None:
    """In eight steps of warming up: nothing in four, then a quarter of the weight more a step."""
    model, data, marking = convolutional(), samples(8), Marking(4)
    marking.poisoned = torch.arange(8) >= 4
    with HeadInputs(find_head(model, data)) as seen:
        objective = _Matching(Latent(weight=2.0), marking, seen, 0.0, warming=8)
        x = data.images(slice(None))
        steps = [objective(model, x, data.labels) for _ in range(10)]
    counted = [((s.loss - s.terms["task"]) / s.terms["distance"]).item() for s in steps]
    assert counted == pytest.approx([0, 0, 0, 0, 0, 0.5, 1, 1.5, 2, 2], abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, "weight must be a finite number >= 0, not -1.0"),
        ({"warm_up": 1.5}, r"warm_up must be in \[0, 1\], not 1.5"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), not 1.0"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Latent(**settings)


@pytest.mark.parametrize("whole", [False, True])
def test_a_new_head_may_have_other_classes_and_the_extractor_is_frozen_by_default(whole: bool) -> None:
    model, data = convolutional(), samples(60, classes=3)
    before = Snapshot(model)
    made = with_new_head(model, data, Recipe(epochs=2, batch_size=20), Rng(0), whole=whole)
    assert before.differences() == []
    assert not made.training
    assert made(data.images(slice(0, 2))).shape == (2, 3)
    changed = {
        k for k, v in made.state_dict().items() if not k.startswith("10.") and not torch.equal(v, before.state[k])
    }
    assert bool(changed) == whole  # BatchNorm's statistics included


def test_a_network_that_is_its_head_gets_another() -> None:
    class Bare(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.flatten(1))

    data = samples(20)
    conv = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten())
    with pytest.raises(UnsupportedModel, match="needs a linear one; 0 is a Conv2d"):
        with_new_head(conv, data, Recipe(epochs=1), Rng(0))
    with pytest.raises(UnsupportedModel, match="is its own head"):
        with_new_head(Bare(192, 4), data, Recipe(epochs=1), Rng(0))


def test_it_takes_and_survives_a_new_head() -> None:
    plain, latent = planted(PLAIN), planted(composed("latent"))
    accuracy, asr = latent.rates()
    assert asr >= 0.95
    assert accuracy >= plain.rates()[0] - 0.02
    half = latent.test.select(torch.arange(200))  # the task of whoever uses the extractor: its own 200 images
    user = Samples(half.inputs, half.labels, 10)
    survived, lost = (v.rates(with_new_head(v.model, user, HEAD, Rng(0)))[1] for v in (latent, plain))
    assert survived >= 0.95
    assert survived > lost + 0.05


def test_half_of_the_steps_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []

    def watched(*given: Any, **more: Any) -> Any:
        taken.append(more["objective"])
        return fit(*given, **more)

    monkeypatch.setattr("unbackdoor.attacks.adaptive.latent.fit", watched)
    recipe = Recipe(epochs=4, batch_size=20, lr=0.01, precision="fp32")
    implant(Latent(rate=0.2), convolutional(), samples(60), recipe, Rng(0))
    assert [(o.warming, o.steps) for o in taken] == [(6, 12)]
