"""From the records of networks whose truth is known to the audit's calibration, and how well it does on others.

Two ways to combine the figures are tried, and the calibration's own networks say which is better: each is judged on
groups of them (an attack, a share of the clean ones) that its weights were not fitted on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from unbackdoor import specs
from unbackdoor.analysis.audit.calibration import Calibration, Conditions, HeldOut, Method, Range, threshold_for
from unbackdoor.analysis.audit.evidence import KINDS, stands_out
from victim_runs import took

#: Share of clean networks that may be flagged.
RATE = 0.05
#: Weight of the squared coefficients, against the mean log-likelihood: there are few victims.
RIDGE = 0.01
#: Parts of the calibration's networks, each judged by weights of the others.
FOLDS = 5
DRAWS = 2000

Scores = Callable[["Network"], tuple[float, ...]]


@dataclass(frozen=True)
class Network:
    """One record: the figures of its classes, and the truth.

    Attributes:
        figures: kind -> a figure a class.
        group: the attack's name, or "clean".
        target: the class of the backdoor; None for a clean network, and where each class has its own.
    """

    record: Mapping[str, Any]
    figures: dict[str, tuple[float, ...]]
    group: str
    target: int | None

    @property
    def clean(self) -> bool:
        return self.record["attack"] is None


def networks(records: Sequence[Mapping[str, Any]], role: str) -> list[Network]:
    """Those of one role; where the attack did not take there is no backdoor to find, nor a clean network."""
    found = []
    for record in records:
        if record["role"] != role or (record["asr"] is not None and not took(record["asr"])):
            continue
        measures = record["measures"]
        figures = {kind: stands_out(measures[kind], small=KINDS[kind].small) for kind in KINDS if kind in measures}
        found.append(Network(record, figures, *_truth(record["attack"])))
    return found


def _truth(attack: str | None) -> tuple[str, int | None]:
    if attack is None:
        return "clean", None
    name, stated = specs.parse(attack)
    if stated.get("labels") == "all-to-all":
        return f"{name}, all-to-all", None
    return name, int(specs.build("attack", attack).target)


def matrix(known: Sequence[Network]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(figures (classes of all networks, kinds), whether that class is a target)."""
    rows = [[net.figures[kind][c] for kind in KINDS] for net in known for c in range(net.record["classes"])]
    hits = [net.target == c for net in known for c in range(net.record["classes"])]
    return np.array(rows), np.array(hits, dtype=np.float64)


def logistic(known: Sequence[Network]) -> dict[str, float]:
    """Weights of a logistic regression of "this class is the target", none below 0: each kind has one suspicious side.

    Targets and other classes weigh the same in sum; the intercept goes, since a threshold takes its place.
    """
    figures, hits = matrix(known)
    balance = np.where(hits == 1, 0.5 / hits.sum(), 0.5 / (1 - hits).sum())

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        odds = figures @ parameters[:-1] + parameters[-1]
        value = balance @ np.logaddexp(0, np.where(hits == 1, -odds, odds)) + RIDGE * parameters[:-1] @ parameters[:-1]
        wrong = balance * (1 / (1 + np.exp(-odds)) - hits)
        slope = np.append(figures.T @ wrong + 2 * RIDGE * parameters[:-1], wrong.sum())
        return float(value), slope

    bounds = [(0.0, None)] * len(KINDS) + [(None, None)]
    found = minimize(loss, np.zeros(len(KINDS) + 1), jac=True, bounds=bounds, method="L-BFGS-B")
    return {kind: float(weight) for kind, weight in zip(KINDS, found.x, strict=False)}


def standardised(known: Sequence[Network]) -> dict[str, float]:
    """For each kind one over the spread of its figures in clean networks."""
    return {kind: 1 / pstdev([value for net in known if net.clean for value in net.figures[kind]]) for kind in KINDS}


METHODS: dict[Method, Callable[[Sequence[Network]], dict[str, float]]] = {"sum": logistic, "largest": standardised}


def statistic(method: Method, weights: Mapping[str, float], net: Network) -> tuple[float, int]:
    """(the highest score, its class), as the package computes them."""
    scores = Calibration.scores(_bare(method, weights), net.figures)
    suspect = max(range(len(scores)), key=lambda c: scores[c])
    return scores[suspect], suspect


def _bare(method: Method, weights: Mapping[str, float]) -> Calibration:
    nothing = Range(0, 0)
    conditions = Conditions("", nothing, nothing, nothing, nothing, nothing)
    return Calibration(method, weights, 0.0, RATE, (), 0, conditions, HeldOut(0, 0, 0, 0, 0, 0.5, 0.0, 1.0))


def area(clean: Sequence[float], backdoored: Sequence[float]) -> float:
    """AUROC: the chance that a victim's statistic is above a clean network's; a tie counts half."""
    ours, others = np.array(backdoored)[:, None], np.array(clean)[None]
    return float(((ours > others) + 0.5 * (ours == others)).mean())


def interval(clean: Sequence[float], backdoored: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the area: clean networks and victims are drawn anew."""
    generator = np.random.default_rng(0)
    one, other = np.array(clean), np.array(backdoored)
    drawn = [area(_again(one, generator), _again(other, generator)) for _ in range(DRAWS)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def _again(values: NDArray[np.float64], generator: np.random.Generator) -> list[float]:
    drawn: list[float] = generator.choice(values, len(values)).tolist()
    return drawn


def cross_validated(method: Method, known: Sequence[Network]) -> float:
    """The area where no network is judged by weights that it had a part in: every FOLDS-th, in the records' order."""
    clean, victims = [net for net in known if net.clean], [net for net in known if not net.clean]
    areas = []
    for fold in range(FOLDS):
        rest = [net for group in (clean, victims) for i, net in enumerate(group) if i % FOLDS != fold]
        weights = METHODS[method](rest)
        judged = [[statistic(method, weights, net)[0] for net in group[fold::FOLDS]] for group in (clean, victims)]
        areas.append(area(*judged))
    return fmean(areas)


@dataclass(frozen=True)
class Judged:
    """A network and what the shipped audit says of it."""

    net: Network
    statistic: float
    suspect: int
    flagged: bool

    @property
    def right(self) -> bool:
        return self.flagged and self.suspect == self.net.target


def judged(calibration: Calibration, known: Sequence[Network]) -> list[Judged]:
    found = []
    for net in known:
        value, suspect = statistic(calibration.method, calibration.weights, net)
        found.append(Judged(net, value, suspect, value > calibration.threshold))
    return found


def calibrate(records: Sequence[Mapping[str, Any]]) -> tuple[Calibration, dict[Method, float]]:
    """(the calibration, the area of each method within the calibration's networks)."""
    known, others = networks(records, "calibration"), networks(records, "held-out")
    areas = {method: cross_validated(method, known) for method in METHODS}
    method = max(areas, key=lambda name: areas[name])  # of equals the first
    weights = {kind: float(f"{weight:.4g}") for kind, weight in METHODS[method](known).items() if weight > 1e-3}
    clean = sorted(statistic(method, weights, net)[0] for net in known if net.clean)
    made = Calibration(
        method=method,
        weights=weights,
        threshold=threshold_for(clean, RATE),
        rate=RATE,
        clean=tuple(clean),
        backdoored=sum(not net.clean for net in known),
        conditions=conditions(known),
        held_out=HeldOut(0, 0, 0, 0, 0, 0.5, 0.0, 1.0),
    )
    return Calibration(**{**vars_of(made), "held_out": tested(judged(made, others))}), areas


def vars_of(calibration: Calibration) -> dict[str, Any]:
    return {name: getattr(calibration, name) for name in Calibration.__slots__}


def tested(found: Sequence[Judged]) -> HeldOut:
    """What is told with every audit. A backdoor without one target is in the table alone."""
    clean = [each for each in found if each.net.clean]
    victims = [each for each in found if each.net.target is not None]
    values = [each.statistic for each in clean], [each.statistic for each in victims]
    low, high = interval(*values)
    return HeldOut(
        clean=len(clean),
        flagged_clean=sum(each.flagged for each in clean),
        backdoored=len(victims),
        flagged=sum(each.flagged for each in victims),
        right=sum(each.right for each in victims),
        auroc=area(*values),
        low=low,
        high=high,
    )


def conditions(known: Sequence[Network]) -> Conditions:
    def spread(values: Sequence[int]) -> Range:
        return Range(min(values), max(values))

    records = [net.record for net in known]
    kinds = sorted({(r["setting"], r["arch"]) for r in records})
    return Conditions(
        networks=" and ".join(f"{arch} on {setting}" for setting, arch in kinds),
        classes=spread([r["classes"] for r in records]),
        channels=spread([r["image_shape"][0] for r in records]),
        sides=spread([side for r in records for side in r["image_shape"][1:]]),
        parameters=spread([r["parameters"] for r in records]),
        samples=spread([r["samples"] for r in records]),
    )
