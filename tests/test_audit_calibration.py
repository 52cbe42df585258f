"""The calibration of the audit: what is planned, how weights and error rates come about, and that it is the shipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import audit_calibration
import audit_fit
import audit_tables
from audit_fit import Network, area, calibrate, judged, logistic, networks, standardised, statistic
from unbackdoor import specs
from unbackdoor.analysis.audit.calibration import shipped
from unbackdoor.analysis.audit.evidence import KINDS, stands_out
from unbackdoor.errors import DataError
from unbackdoor.types import Samples
from victim_runs import read_records

RECORDS = Path(__file__).parents[1] / "benchmarks" / "records"


def test_no_network_is_on_both_sides() -> None:
    plans = audit_calibration.planned()
    assert len({plan.name for plan in plans}) == len(plans)
    sides = [{(p.setting, p.arch, p.seed) for p in plans if p.role == role} for role in ("calibration", "held-out")]
    assert sides[0].isdisjoint(sides[1])
    attacks = [{p.attack for p in plans if p.role == role and p.attack} for role in ("calibration", "held-out")]
    assert attacks[0].isdisjoint(attacks[1])
    seen, other = ({specs.parse(a)[0] for a in side} for side in attacks)
    assert seen == {"badnets", "blended"}
    assert {"wanet", "bpp", "tact", "blind"} <= other
    for attack in attacks[0] | attacks[1]:
        specs.build("attack", attack)
    # A share of one in twenty needs that many clean networks.
    assert sum(p.attack is None and p.role == "calibration" for p in plans) >= 19


def test_half_the_resolution_is_the_mean_of_four() -> None:
    images = torch.tensor([[[[0, 4, 255, 255], [8, 4, 255, 254], [1, 0, 2, 2], [0, 0, 2, 2]]]], dtype=torch.uint8)
    found = audit_calibration.halved(Samples(images, torch.tensor([1]), 2))
    assert found.inputs.tolist() == [[[[4, 255], [0, 2]]]]
    assert found.labels.tolist() == [1]


def record(seed: int, attack: str | None, *, strength: float = 3.0, role: str = "calibration") -> dict[str, Any]:
    """Ten classes of noise; the target stands out by pixels and perturbation, and the rest is noise alone."""
    generator = np.random.default_rng(seed)
    target = None if attack is None else getattr(specs.build("attack", attack), "target", None)
    measures = {}
    for kind, about in KINDS.items():
        logs = generator.normal(scale=0.3, size=10)
        if target is not None and kind in ("pixel_mask", "perturbation"):
            logs[target] += 0.3 * strength * (-1 if about.small else 1)
        measures[kind] = np.exp(logs).tolist()
    return {
        "role": role,
        "setting": "digits",
        "arch": "cnn(width=16)",
        "attack": attack,
        "seed": seed,
        "asr": None if attack is None else 0.95,
        "classes": 10,
        "image_shape": [1, 8, 8],
        "parameters": 5000 + seed,
        "samples": 200,
        "measures": measures,
    }


def study(role: str = "calibration", first: int = 0, strength: float = 3.0) -> list[dict[str, Any]]:
    clean = [record(first + i, None, role=role) for i in range(24)]
    attacks = [f"badnets(size=2, target={i % 10})" for i in range(20)]
    return clean + [record(first + 100 + i, a, strength=strength, role=role) for i, a in enumerate(attacks)]


def test_only_attacks_that_took_are_counted() -> None:
    weak = record(1, "badnets(target=2)") | {"asr": 0.79}
    every = record(2, "badnets(labels=all-to-all)")
    found = networks([record(0, None), weak, every, record(3, "blended(target=4)", role="held-out")], "calibration")
    assert [(net.group, net.target, net.clean) for net in found] == [
        ("clean", None, True),
        ("badnets, all-to-all", None, False),
    ]


def test_a_networks_figures_are_those_of_the_package() -> None:
    (net,) = networks([record(0, None)], "calibration")
    measures = record(0, None)["measures"]
    assert net.figures == {kind: stands_out(measures[kind], small=KINDS[kind].small) for kind in KINDS}


def test_the_regression_finds_the_kinds_that_tell_and_no_weight_is_negative() -> None:
    weights = logistic(networks(study(), "calibration"))
    assert min(weights.values()) >= 0
    told = [weights["pixel_mask"], weights["perturbation"]]
    assert min(told) > 3 * max(value for kind, value in weights.items() if kind not in ("pixel_mask", "perturbation"))


def test_the_regression_ends_where_no_step_is_better() -> None:
    known = networks(study(strength=1.0), "calibration")
    figures, hits = audit_fit.matrix(known)
    balance = np.where(hits == 1, 0.5 / hits.sum(), 0.5 / (1 - hits).sum())
    weights = np.array(list(logistic(known).values()))

    def loss(weights: Any, intercept: float) -> float:
        chance = 1 / (1 + np.exp(-(figures @ weights + intercept)))
        entropy = -(balance * np.where(hits == 1, np.log(chance), np.log(1 - chance))).sum()
        return float(entropy + audit_fit.RIDGE * (weights**2).sum())

    def best(weights: Any) -> float:
        return min(loss(weights, i) for i in np.linspace(-3, 1, 2001))

    least = best(weights)
    for place in range(len(weights)):
        for step in (-0.05, 0.05):
            moved = weights.copy()
            moved[place] = max(0.0, moved[place] + step)
            assert best(moved) >= least - 1e-6


def test_standardised_figures_have_spread_one_in_clean_networks() -> None:
    known = networks(study(), "calibration")
    for kind, weight in standardised(known).items():
        values = [value for net in known if net.clean for value in net.figures[kind]]
        assert np.std(values) * weight == pytest.approx(1)


def test_the_area_counts_pairs() -> None:
    assert area([1, 2, 3], [2.5, 4]) == pytest.approx(5 / 6)
    assert area([1, 1], [1]) == 0.5
    low, high = audit_fit.interval([0.0, 0.1, 0.2], [1.0, 2.0])
    assert (low, high) == (1.0, 1.0)
    low, high = audit_fit.interval(list(range(20)), [v + 3 for v in range(20)])
    assert 0.4 < low < area(list(range(20)), [v + 3 for v in range(20)]) < high < 0.9


def test_a_calibration_is_judged_on_others_and_keeps_its_rate() -> None:
    known, others = study(), study("held-out", 1000)
    made, areas = calibrate([*known, *others])
    assert made.method == max(areas, key=lambda name: areas[name])
    assert made.held_out.clean == 24
    assert made.held_out.backdoored == 20
    assert made.held_out.auroc > 0.9
    assert made.held_out.right >= 12
    assert made.conditions.parameters.least == 5000
    found = judged(made, networks(known, "calibration"))
    assert sum(each.flagged for each in found if each.net.clean) <= audit_fit.RATE * 24
    # What is held out has no say in weights and threshold.
    again, _ = calibrate([*known, *study("held-out", 2000, strength=0.0)])
    assert (again.weights, again.threshold, again.clean) == (made.weights, made.threshold, made.clean)
    assert again.held_out.auroc < made.held_out.auroc


def test_too_few_clean_networks_make_no_threshold() -> None:
    least = round(1 / audit_fit.RATE) - 1
    few = [r for r in study() if r["attack"] or r["seed"] < least - 1]
    with pytest.raises(DataError, match=f"needs at least {least} clean networks, not {least - 1}"):
        calibrate([*few, *study("held-out", 1000)])


def test_the_statistic_is_the_highest_score() -> None:
    (net,) = networks([record(0, None)], "calibration")
    value, suspect = statistic("sum", {"pixel_mask": 2.0}, net)
    assert value == pytest.approx(2 * max(net.figures["pixel_mask"]))
    assert net.figures["pixel_mask"][suspect] == max(net.figures["pixel_mask"])


def test_the_rows_count_what_was_flagged_and_whether_the_class_was_right() -> None:
    made, _ = calibrate([*study(), *study("held-out", 1000)])
    everywhere = record(5000, "badnets(labels=all-to-all)", role="held-out")
    found = judged(made, networks([*study("held-out", 1000), everywhere], "held-out"))
    rows = {row[0]: row for row in audit_tables.rows(found)}
    assert list(rows) == ["clean", "all with one target", "`badnets`", "`badnets, all-to-all`"]
    assert rows["clean"][1] == "24"
    assert rows["all with one target"][1:4] == ["20", str(made.held_out.flagged), str(made.held_out.right)]
    assert rows["`badnets, all-to-all`"][1] == "1"
    assert rows["`badnets, all-to-all`"][3] == "–"
    assert rows["all with one target"][4] == f"{made.held_out.auroc:.2f}"


def test_the_shipped_calibration_is_that_of_the_records() -> None:
    made, _ = calibrate(read_records(RECORDS / "audit.jsonl"))
    found = shipped()
    assert made.method == found.method
    assert dict(made.weights) == pytest.approx(dict(found.weights), rel=1e-2)
    assert made.threshold == pytest.approx(found.threshold, rel=1e-2)
    assert made.conditions == found.conditions
    assert made.backdoored == found.backdoored
    for name in ("clean", "flagged_clean", "backdoored", "flagged", "right"):
        assert getattr(made.held_out, name) == getattr(found.held_out, name)


def test_the_record_holds_what_was_planned() -> None:
    planned = {(p.role, p.setting, p.arch, p.attack, p.seed) for p in audit_calibration.planned()}
    found = read_records(RECORDS / "audit.jsonl")
    assert {(r["role"], r["setting"], r["arch"], r["attack"], r["seed"]) for r in found} <= planned
    assert len({(r["role"], r["setting"], r["arch"], r["attack"], r["seed"]) for r in found}) == len(found)
    assert isinstance(Network(found[0], {}, "clean", None).clean, bool)
