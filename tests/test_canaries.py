"""Canaries: planted into a copy, put through a removal, and what is left of them."""

from __future__ import annotations

import copy
import dataclasses
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from digits_victims import digits, on_digits
from factories import convolutional, linear, samples
from unbackdoor import specs
from unbackdoor.errors import ConfigError, DataError
from unbackdoor.evaluation import canaries
from unbackdoor.evaluation.assessment import Rate, assess
from unbackdoor.evaluation.canaries import Canary, CanaryTest, Planting, usual_canaries
from unbackdoor.rng import Rng
from unbackdoor.types import Removal, Samples, Trace

KINDS = ("badnets(target=3, size=2, corner=top-left)", "blended(target=7, alpha=0.3, picture_seed=5)")


class Nothing:
    """A removal that removes nothing, and remembers what it got."""

    def __call__(self, model: nn.Module, clean: Samples, rng: Rng) -> Removal:
        self.model, self.clean, self.rng = model, clean, rng
        return Removal(copy.deepcopy(model), Trace())


class Original:
    """A perfect removal: it gives back the network as it was before the canaries."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, model: nn.Module, clean: Samples, rng: Rng) -> Removal:
        return Removal(copy.deepcopy(self.model), Trace())


@cache
def scene() -> tuple[nn.Module, Samples, Samples]:
    """(a network with BadNets in another corner, clean samples, samples to judge by)."""
    victim = on_digits("badnets(size=2)")
    clean, rest = digits()[1].part(20, Rng(1).stream("clean"))
    assert rest is not None
    return victim.model, clean, rest


def run(defense: object, **changes: object) -> CanaryTest:
    model, clean, judged = scene()
    settings = {"kinds": KINDS, "planting": Planting(images=4000, lr=2e-3, augment="none"), **changes}
    return canaries.try_canaries(model, clean, judged, defense, Rng(0), **settings)  # type: ignore[arg-type]


def test_canaries_take_and_the_copy_keeps_its_skill() -> None:
    found = run(Nothing())
    assert [c.spec for c in found.canaries] == list(KINDS)
    assert all(c.took and c.planted == c.left and c.given.value < 0.4 for c in found.canaries)
    assert found.accuracy_planted.value > found.accuracy_given.value - 0.03
    assert found.images == 4000


def test_what_a_perfect_removal_leaves_is_what_the_given_network_shows() -> None:
    found = run(Original(scene()[0]))
    assert [c.left for c in found.canaries] == [c.given for c in found.canaries]
    assert found.accuracy_left == found.accuracy_given
    assert found.worst == max(c.given.value for c in found.canaries)


def test_the_removal_gets_the_carrying_copy_and_the_clean_samples_as_they_are() -> None:
    model, clean, _ = scene()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    defense = Nothing()
    run(defense)
    assert defense.clean is clean
    assert defense.rng == Rng(0).child("defense")
    assert defense.model is not model
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_the_same_seed_gives_the_same_test() -> None:
    assert run(Nothing()) != run(Nothing(), planting=Planting(images=2000, lr=2e-3, augment="none"))
    first, second = run(Nothing()), run(Nothing())
    assert (first.canaries, first.accuracy_planted) == (second.canaries, second.accuracy_planted)


@pytest.mark.parametrize("live", [False, True])
def test_statistics_stay_as_they_are_unless_they_are_live(live: bool) -> None:
    model = convolutional()
    data = samples(40, size=16)
    attacks = [specs.build("attack", "badnets(size=2)")]
    planting = Planting(images=80, train_mode=live, augment="none")
    planted, _ = canaries.plant_canaries(model, data, attacks, planting, Rng(0))
    before, after = model.state_dict(), planted.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.endswith("weight") for name in moved)
    assert any("running" in name for name in moved) == live


def test_where_few_take_they_are_planted_once_more_and_harder() -> None:
    model, clean, _ = scene()
    attacks = [specs.build("attack", kind) for kind in KINDS]
    gentle = Planting(images=200, lr=1e-4, augment="none")
    once, epochs = canaries.plant_canaries(model, clean, attacks, dataclasses.replace(gentle, again=False), Rng(0))
    twice, more = canaries.plant_canaries(model, clean, attacks, gentle, Rng(0))
    assert sum(e.images for e in epochs) == 200
    assert sum(e.images for e in more) == 5 * 200
    assert more[0].loss == epochs[0].loss
    assert max(e.lr for e in more) > max(e.lr for e in epochs)
    for attack in attacks:
        weak, strong = (assess(m, clean, attack=attack).asr for m in (once, twice))
        assert weak is not None
        assert strong is not None
        assert strong.value > weak.value


def test_what_is_not_planted_is_not_counted() -> None:
    def canary(planted: float, left: float) -> Canary:
        return Canary("badnets", *(Rate.of(v, 100) for v in (0.0, planted, left)))

    def made_of(*found: Canary) -> CanaryTest:
        return CanaryTest(found, *[Rate.of(0.9, 100)] * 3, images=0, seconds=0.0)

    assert made_of(canary(0.9, 0.1), canary(0.5, 0.5), canary(1.0, 0.3)).worst == 0.3
    assert made_of(canary(0.9, 0.1), canary(0.5, 0.5), canary(1.0, 0.3)).mean == pytest.approx(0.2)
    assert made_of(canary(0.5, 0.5)).worst is None
    assert made_of(canary(0.5, 0.5)).mean is None


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 64, 48), (1, 28, 28), (3, 224, 224)])
@pytest.mark.parametrize("classes", [2, 10, 43])
def test_the_usual_canaries_stamp_any_image_and_differ(shape: tuple[int, int, int], classes: int) -> None:
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    for seed in range(5):
        kinds = usual_canaries(shape, classes, Rng(seed))
        attacks = [specs.build("attack", kind).prepare(None, Rng(seed), None) for kind in kinds]
        assert len(kinds) == 5
        assert len({a.target for a in attacks}) == min(5, classes)
        assert all(not torch.equal(a.trigger(x), x) and a.target < classes for a in attacks)
    assert usual_canaries(shape, classes, Rng(0)) == usual_canaries(shape, classes, Rng(0))
    assert usual_canaries(shape, classes, Rng(0)) != usual_canaries(shape, classes, Rng(1))


def test_each_image_gets_one_canary_and_its_target() -> None:
    _, clean, _ = scene()
    attacks = [specs.build("attack", kind) for kind in KINDS]
    stamps = canaries._Implanting(linear(10, channels=1), attacks, 10, Planting(), Rng(0))
    x, y = clean.images(slice(0, 60)), clean.labels[:60]
    made, wanted = stamps._stamped(x, y)
    seen: set[int] = set()
    for image, stamped, label in zip(x, made, wanted.tolist(), strict=True):
        attack = attacks[[3, 7].index(label)]
        expected: Tensor = attack.trigger(image[None])[0].clamp(0, 1)
        assert torch.equal(stamped, expected)
        seen.add(label)
    assert seen == {3, 7}


def test_a_kind_that_does_not_fit_is_left_out_with_its_reason() -> None:
    found = run(Nothing(), kinds=(KINDS[0], "badnets(size=30)"))
    assert [c.spec for c in found.canaries] == [KINDS[0]]
    assert len(found.notes) == 1
    assert "badnets(size=30) was left out: a patch of 30 pixels" in found.notes[0]
    with pytest.raises(DataError, match="no canary can be planted"):
        run(Nothing(), kinds=("badnets(size=30)",))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown attack"):
        run(Nothing(), kinds=("wings",))
    with pytest.raises(ConfigError, match="target 12 is no class"):
        run(Nothing(), kinds=("badnets(target=12)",))
    with pytest.raises(ConfigError, match="images must be at least 1"):
        Planting(images=0)
    with pytest.raises(ConfigError, match="distill must be at least 0"):
        Planting(distill=-1)


def test_few_samples_are_not_passed_for_ever() -> None:
    assert Planting(images=24_000).recipe(10).epochs == 300
    assert Planting(images=24_000).recipe(600).epochs == 40
    assert Planting(images=5).recipe(600).epochs == 1
