"""The blind audit: what is gathered, how it is combined, what it must not touch, and what it finds."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from audit_examples import calibration
from digits_victims import digits, on_digits
from factories import Snapshot, linear, samples
from unbackdoor.analysis import audit as package
from unbackdoor.analysis.audit import AuditResult, audit, evidence
from unbackdoor.analysis.audit.calibration import Calibration, Conditions, Range, shipped, threshold_for
from unbackdoor.analysis.audit.evidence import KINDS, PER_CLASS, Evidence, gather, stands_out
from unbackdoor.analysis.forgetting_speed import ForgettingSpeed
from unbackdoor.attacks.recipes import usual
from unbackdoor.auditing import audit as audit_report
from unbackdoor.defenses.ascent import Ascended
from unbackdoor.errors import ConfigError, DataError
from unbackdoor.models.architectures import build_network
from unbackdoor.rng import Rng
from unbackdoor.training import fit
from unbackdoor.types import Samples

# The figures


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_a_figure_is_the_log_ratio_to_the_median_of_the_others(count: int, small: bool) -> None:
    values = np.random.default_rng(count).uniform(0.5, 20, count)
    wanted = []
    for i in range(count):
        others = np.exp(np.median(np.log(np.delete(values, i))))
        wanted.append(np.log(others / values[i]) if small else np.log(values[i] / others))
    assert stands_out(values.tolist(), small=small) == pytest.approx(wanted)
    assert stands_out((1000 * values).tolist(), small=small) == pytest.approx(wanted)  # no unit is left


def test_a_class_that_is_half_as_far_as_the_others_stands_out_by_ln_2() -> None:
    assert stands_out([4.0, 2.0, 4.0, 4.0], small=True) == pytest.approx([0, math.log(2), 0, 0])
    assert stands_out([4.0, 2.0, 4.0, 4.0], small=False) == pytest.approx([0, -math.log(2), 0, 0])


def test_what_a_class_keeps_is_its_mean_probability_over_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ((0.8, None, 0.5), (0.4, None, 0.5), (0.2, None, 0.5))
    course = ForgettingSpeed(kept, ((0.1,) * 3,) * 3)
    monkeypatch.setattr(evidence, "forgetting_speed", lambda *_, **__: course)
    found = evidence._forgetting(linear(3), samples(12, classes=3), Rng(0))["retention"]
    # A class without images of its own stands in the middle.
    assert found == pytest.approx((0.3 / 0.8, (0.375 + 1.0) / 2, 1.0))


def test_movement_in_unlearning_is_that_of_the_heads_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, moved = linear(), linear(seed=1)
    monkeypatch.setattr(evidence, "ascend", lambda *_, **__: Ascended(moved, [], ()))
    found = evidence._unlearning(model, samples(12), Rng(0))["unlearning"]
    rows = [
        module.weight for network in (model, moved) for module in network.modules() if isinstance(module, nn.Linear)
    ]
    assert found == pytest.approx((rows[1] - rows[0]).abs().sum(1).tolist())


class Dormant(nn.Module):
    """A feature a class, how bright its square is, and one that no image uses; the head gives that to class 2."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 4, bias=False)
        with torch.no_grad():
            self.head.weight[:] = torch.cat([4 * torch.eye(4), torch.tensor([[0.0], [0.0], [30.0], [0.0]])], 1)

    def forward(self, x: Tensor) -> Tensor:
        bright = x[:, :, :2].unflatten(3, (4, 2)).mean((1, 2, 4))
        features = torch.relu(bright - 0.4)
        out: Tensor = self.head(torch.cat([features, torch.zeros_like(features[:, :1])], 1))
        return out


def test_a_class_with_a_dormant_feature_of_its_own_stands_out_in_feature_space() -> None:
    found = evidence._feature_space(Dormant().eval(), samples(40), Rng(0))
    for kind in ("feature_mask", "feature_shift"):
        figures = stands_out(found[kind], small=True)
        assert max(range(4), key=lambda c: figures[c]) == 2
        assert figures[2] > 0.5


class PooledHead(nn.Module):
    """A head whose rows are the classes, but whose outputs are pooled: the layer alone is not the network's end."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.head = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x).mean((2, 3))
        return out


def test_a_kind_that_the_network_does_not_allow_is_missing_and_told() -> None:
    found = gather(PooledHead().eval(), samples(40), Rng(0))
    assert "feature_mask" not in found.measures
    assert "pixel_mask" in found.measures
    assert any("the last layer alone does not give the network's answers" in note for note in found.notes)


# The combination


def test_scores_are_the_weighted_sum_or_the_largest() -> None:
    figures = {"pixel_mask": (0.0, 1.0, -1.0), "perturbation": (0.5, 0.25, 3.0), "unlearning": (9.0, 9.0, 9.0)}
    summed = calibration()
    assert summed.scores(figures) == pytest.approx((1.0, 1.5, 5.0))
    assert replace(summed, method="largest").scores(figures) == pytest.approx((1.0, 1.0, 6.0))
    assert summed.scores({"pixel_mask": figures["pixel_mask"]}) == pytest.approx((0.0, 1.0, -1.0))
    with pytest.raises(DataError, match="at least one of pixel_mask, perturbation is needed"):
        summed.scores({"unlearning": (1.0, 2.0)})


def result(scores: tuple[float, ...], threshold: float) -> AuditResult:
    return AuditResult(Evidence({}, (), 0), scores, (), calibration(threshold))


def test_evidence_is_what_lies_above_the_threshold() -> None:
    assert result((0.1, 2.0, -3.0), 1.9).found
    assert not result((0.1, 2.0, -3.0), 2.0).found
    assert result((0.1, 2.0, -3.0), 2.0).suspect == 1
    assert [calibration().as_high(value) for value in (0.0, 0.4, 0.61, 1.0)] == [4, 3, 1, 0]


def test_the_threshold_is_exceeded_no_more_often_than_stated() -> None:
    generator = np.random.default_rng(0)
    assert threshold_for(list(range(19)), 0.05) == 18
    assert threshold_for(list(range(39)), 0.05) == 37
    with pytest.raises(DataError, match="needs at least 19 clean networks, not 18"):
        threshold_for([0.0] * 18, 0.05)
    drawn = [generator.normal(size=41) for _ in range(4000)]
    above = np.mean([d[0] > threshold_for(d[1:].tolist(), 0.1) for d in drawn])
    assert 0.08 < above <= 0.11  # 4 of 41 at most, within three standard errors


def test_a_calibration_is_read_back_and_a_broken_one_refused() -> None:
    made = calibration()
    assert Calibration.from_json(made.to_json()) == made
    for broken in ("[]", "{}", "no json", made.to_json().replace("held_out", "test")):
        with pytest.raises(DataError, match="no calibration of the audit"):
            Calibration.from_json(broken)
    unknown = json.loads(made.to_json()) | {"weights": {"colour": 1.0}}
    with pytest.raises(DataError, match="weighs 'colour', which is no kind of evidence"):
        Calibration.from_json(json.dumps(unknown))


def test_what_is_unlike_the_calibration_is_named() -> None:
    known = Conditions("some", Range(10, 10), Range(1, 1), Range(8, 14), Range(5000, 9000), Range(180, 200))
    like: dict[str, Any] = {"classes": 10, "shape": (1, 8, 14), "parameters": 5000, "samples": 200}
    assert known.unlike(**like) == ()
    assert known.unlike(**like | {"shape": (3, 32, 32), "samples": 10}) == (
        "3 colour channels instead of 1",
        "32 pixels a side instead of 8 to 14",
        "10 samples instead of 180 to 200",
    )
    assert known.unlike(**like | {"classes": 43, "parameters": 11_000_000}) == (
        "43 classes instead of 10",
        "11,000,000 parameters instead of 5,000 to 9,000",
    )


def test_the_shipped_calibration_weighs_kinds_that_there_are() -> None:
    made = shipped()
    assert made.weights.keys() <= KINDS.keys()
    assert made.threshold == threshold_for(list(made.clean), made.rate)
    assert made.as_high(made.threshold) >= 1
    assert all(weight > 0 for weight in made.weights.values())


# What it must not touch, and what it refuses


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches of a few steps: what is found does not matter, only what is touched."""
    short = replace(evidence._PIXEL_SEARCH, rounds=3, round_steps=2)
    monkeypatch.setattr(evidence, "_PIXEL_SEARCH", short)
    monkeypatch.setattr(evidence, "_FEATURE_SEARCH", short)
    monkeypatch.setattr(evidence, "_SIZES", replace(evidence._SIZES, steps=3, halvings=2))


@pytest.mark.usefixtures("quick")
def test_network_samples_and_global_generators_stay_as_they_were() -> None:
    model, clean = linear().train(), samples(40)
    before, images, state = Snapshot(model), clean.inputs.clone(), torch.get_rng_state()
    audit(model, clean, Rng(0), calibration=calibration())
    assert before.differences() == []
    assert torch.equal(clean.inputs, images)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("quick")
def test_the_same_seed_gives_the_same_and_another_one_does_not() -> None:
    def figures(seed: int) -> tuple[dict[str, tuple[float, ...]], Tensor]:
        found = audit(linear(), samples(40), Rng(seed), calibration=calibration())
        return found.evidence.measures, found.trigger.pattern

    (one, pattern), (again, same_pattern), (other, _) = figures(0), figures(0), figures(1)
    assert one == again
    assert torch.equal(pattern, same_pattern)
    assert one != other


@pytest.mark.usefixtures("quick")
def test_no_more_samples_are_looked_at_than_the_calibration_knows() -> None:
    assert gather(linear(), samples(400), Rng(0)).samples == 4 * PER_CLASS
    assert gather(linear(), samples(8), Rng(0)).samples == 8


def test_there_is_no_place_for_a_trigger_or_a_test_set() -> None:
    assert list(inspect.signature(gather).parameters) == ["model", "clean", "rng"]
    assert list(inspect.signature(package.audit).parameters) == ["model", "clean", "rng", "calibration"]
    assert list(inspect.signature(audit_report).parameters) == ["model", "samples", "seed", "description", "notes"]
    with pytest.raises(TypeError, match="unexpected keyword argument 'test'"):
        audit_report(linear(), samples(8), test=samples(8))  # type: ignore[call-arg]


class Constant(nn.Module):
    """Gives this value for every class of every image."""

    def __init__(self, value: float, classes: int = 4) -> None:
        super().__init__()
        self.value, self.classes = value, classes

    def forward(self, x: Tensor) -> Tensor:
        return torch.full((len(x), self.classes), self.value)


@pytest.mark.parametrize(
    ("model", "clean", "said"),
    [
        (linear(), Samples(torch.ones(4, 6, dtype=torch.int64), torch.arange(4), 4), "an audit works on images"),
        (linear(), Samples(torch.ones(4, 6), torch.arange(4), 4), "the samples are feature vectors"),
        (linear(), replace(samples(8), labels=torch.zeros(8, dtype=torch.int64)), "all samples are of one class"),
        (linear(5), samples(8), r"outputs of shape \(5,\), and the samples have 4 classes"),
        (Constant(math.nan), samples(8), "not all finite"),
    ],
    ids=["texts", "features", "one class", "other outputs", "not finite"],
)
def test_what_cannot_be_audited_is_refused(model: nn.Module, clean: Samples, said: str) -> None:
    with pytest.raises(DataError, match=said):
        audit(model, clean, Rng(0), calibration=calibration())


def test_a_wrong_key_or_seed_is_refused_before_any_work() -> None:
    with pytest.raises(ConfigError, match="description has no 'nme'; did you mean 'name'"):
        audit_report(linear(), samples(8), description={"nme": "x"})
    with pytest.raises(ConfigError, match="seed must be"):
        audit_report(linear(), samples(8), seed=-1)


# What it finds


@cache
def clean_samples() -> Samples:
    return digits()[1].draw(PER_CLASS, Rng(0).stream("clean"))


def test_a_victim_is_flagged_with_the_right_class() -> None:
    victim = on_digits("badnets(size=2, rate=0.1, target=6)", epochs=12)
    assert victim.asr > 0.9
    found = audit(victim.model, clean_samples(), Rng(0))
    assert found.found
    assert found.suspect == 6
    assert found.unlike == ()
    # The recovered patch lies where the attacker's does: bottom right.
    assert found.trigger.mask[-3:, -3:].sum() > 0.5 * found.trigger.mask.sum()
    assert found.trigger.success > 0.9


def test_a_clean_network_is_not_flagged() -> None:
    model = build_network(usual("digits").arch, num_classes=10, in_channels=1, image_size=8, rng=Rng(7).child("init"))
    fit(model, digits()[0], replace(usual("digits").recipe, epochs=12), Rng(7).child("fit"))
    found = audit(model, clean_samples(), Rng(0))
    assert not found.found
    assert found.unlike == ()
