"""Metrics as pure functions. Rates are shares in [0, 1], never percentages.

``predictions``, ``labels`` and ``wanted`` are (N,) int64 tensors on one device. ``wanted`` are the attacker's labels
for triggered inputs. A prediction of −1 stands for "no usable answer" (non-finite outputs) and is wrong everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

import torch
from torch import Tensor

from unbackdoor.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval, both ends included."""

    low: float
    high: float

    @property
    def width(self) -> float:
        return self.high - self.low


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """ACC: share of predictions that equal the label, in [0, 1].

    Raises:
        DataError: no sample, or shapes that differ.
    """
    _require_matching(predictions, labels)
    return _share(predictions == labels)


def foreign_to(labels: Tensor, wanted: Tensor) -> Tensor:
    """(N,) bool: samples whose true label is not already the attacker's. Only these can show that an attack works.

    Raises:
        DataError: there is no such sample.
    """
    _require_matching(wanted, labels)
    foreign = wanted != labels
    if not foreign.any():
        raise DataError(
            f"all {len(labels)} samples already have the label that the attacker wants: "
            "samples of another class are needed to measure the attack"
        )
    return foreign


def attack_success_rate(predictions: Tensor, labels: Tensor, wanted: Tensor) -> float:
    """ASR: share of triggered inputs that get the attacker's label, in [0, 1].

    Samples whose true label is already the attacker's are left out, as in BackdoorBench (Wu et al. 2022, arXiv
    2206.12654): they would count as successes of a network without any backdoor.

    Args:
        predictions: on triggered inputs.
        labels: the true labels.
        wanted: the attacker's labels.

    Raises:
        DataError: nothing is left to count, or shapes that differ.
    """
    _require_matching(predictions, labels)
    foreign = foreign_to(labels, wanted)
    return _share(predictions[foreign] == wanted[foreign])


def robust_accuracy(predictions: Tensor, labels: Tensor, wanted: Tensor) -> float:
    """RA: share of triggered inputs that get their *true* label, in [0, 1]; the exclusion is ASR's (same source).

    ASR + RA ≤ 1; what is missing went to some third class.
    """
    _require_matching(predictions, labels)
    foreign = foreign_to(labels, wanted)
    return _share(predictions[foreign] == labels[foreign])


def der(accuracy_before: float, asr_before: float, accuracy_after: float, asr_after: float) -> float:
    """Defense effectiveness rating, in [0, 1]: ``[max(0, ΔASR) − max(0, ΔACC) + 1] / 2`` with Δ = before − after.

    0.5 is what doing nothing gets. Source: Zhu et al. 2023 (arXiv 2304.11823), as BackdoorBench's leaderboard has it.
    """
    _require_rates(accuracy_before, asr_before, accuracy_after, asr_after)
    return (max(0.0, asr_before - asr_after) - max(0.0, accuracy_before - accuracy_after) + 1) / 2


def fidelity(accuracy_before: float, accuracy_after: float, asr_after: float) -> float:
    """``(ACC_after − ASR_after) / ACC_before``, at most 1/ACC_before; negative where the attack wins more often.

    Source: the released CIFAR code of SEAM (Zhu et al., arXiv 2212.04687). NaN where ACC_before is 0.
    """
    _require_rates(accuracy_before, accuracy_after, asr_after)
    return (accuracy_after - asr_after) / accuracy_before if accuracy_before else math.nan


def fidelity_gap(accuracy_after: float, asr_after: float) -> float:
    """``ACC_after − ASR_after``, in [−1, 1]. Source: the abstract of SEAM (arXiv 2212.04687)."""
    _require_rates(accuracy_after, asr_after)
    return accuracy_after - asr_after


def nist_fidelity(
    accuracy_before: float,
    accuracy_after: float,
    asr_before: float | None = None,
    asr_after: float | None = None,
) -> float:
    """``((ASR_before − ASR_after) / ASR_before) · (ACC_after / ACC_before)``; without ASRs, ``ACC_after / ACC_before``.

    The second form is for clean models. Source: NIST's TrojAI mitigation round, 2024. NaN where ACC_before or a given
    ASR_before is 0; negative where the ASR rose.

    Raises:
        ConfigError: only one of the two ASRs is given, or a rate is outside of [0, 1].
    """
    _require_rates(accuracy_before, accuracy_after)
    if (asr_before is None) != (asr_after is None):
        raise ConfigError("asr_before and asr_after go together: give both, or none for a clean model")
    kept = accuracy_after / accuracy_before if accuracy_before else math.nan
    if asr_before is None or asr_after is None:
        return kept
    _require_rates(asr_before, asr_after)
    return (asr_before - asr_after) / asr_before * kept if asr_before else math.nan


def confusion_matrix(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(num_classes, num_classes) int64 on the CPU: row = true class, column = predicted class.

    Predictions of −1 are in no column.

    Raises:
        DataError: a class index out of range.
    """
    _require_matching(predictions, labels)
    for name, values, least in (("label", labels, 0), ("prediction", predictions, -1)):
        low, high = int(values.min()), int(values.max())
        if low < least or high >= num_classes:
            wrong = low if low < least else high
            raise DataError(f"{name} {wrong} is out of range: {num_classes} classes allow 0..{num_classes - 1}")
    usable = predictions >= 0
    cells = labels[usable] * num_classes + predictions[usable]
    return torch.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes).cpu()


def per_class_accuracy(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(num_classes,) float64 on the CPU in [0, 1]; NaN for classes without a sample."""
    right = confusion_matrix(predictions, labels, num_classes).diagonal().double()
    return right / torch.bincount(labels, minlength=num_classes).cpu()


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a share, within [0, 1] (Wilson 1927, JASA 22:209, no continuity correction).

    Raises:
        ConfigError: not ``0 ≤ successes ≤ total`` with ``total ≥ 1``, or a confidence outside of (0, 1).
    """
    if total < 1 or not 0 <= successes <= total:
        raise ConfigError(f"successes must lie in 0..total with total >= 1, not {successes} of {total}")
    _require_confidence(confidence)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    # At 0 and at all, the bound is exactly the edge; rounding would leave it a hair off.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == total else min(1.0, centre + half)
    return Interval(low, high)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean over seeds. Not clipped: of rates near 1 it may reach beyond 1.

    Raises:
        DataError: fewer than two values, or one that is not finite.
    """
    from scipy.special import stdtrit

    if len(values) < 2:
        raise DataError(f"an interval over seeds needs at least 2 values, not {len(values)}")
    if not all(math.isfinite(v) for v in values):
        raise DataError(f"an interval over seeds needs finite values, not {list(values)}")
    _require_confidence(confidence)
    mean = fmean(values)
    half = float(stdtrit(len(values) - 1, (1 + confidence) / 2)) * stdev(values) / math.sqrt(len(values))
    return Interval(mean - half, mean + half)


def _share(hits: Tensor) -> float:
    # Counted in integers: a float32 mean would be off in the eighth digit.
    return int(hits.sum()) / len(hits)


def _require_matching(predictions: Tensor, labels: Tensor) -> None:
    if predictions.ndim != 1 or predictions.shape != labels.shape:
        raise DataError(
            f"predictions and labels must both be (N,), not {tuple(predictions.shape)} and {tuple(labels.shape)}"
        )
    if len(labels) == 0:
        raise DataError("there are no samples: at least one is needed")


def _require_rates(*rates: float) -> None:
    for rate in rates:
        if not 0 <= rate <= 1:  # also catches NaN
            raise ConfigError(f"a rate must be a share in [0, 1], not {rate}")


def _require_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence must lie between 0 and 1, not {confidence}")
