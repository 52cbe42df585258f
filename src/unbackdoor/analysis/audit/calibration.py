"""How the figures of an audit become one statistic, and from where on it is called evidence.

Weights and threshold come from networks whose truth is known. They are in ``calibration.json`` beside this file, which
``benchmarks/audit_calibration.py`` writes, and no setting.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from unbackdoor.analysis.audit.evidence import KINDS
from unbackdoor.errors import DataError

#: How figures are combined: by their weighted sum, or by the largest of them, each in units of its spread.
Method = Literal["sum", "largest"]

_FILE = "calibration.json"


@dataclass(frozen=True, slots=True)
class Range:
    """From the least to the most, both included."""

    least: int
    most: int

    def __contains__(self, value: int) -> bool:
        return self.least <= value <= self.most

    def __str__(self) -> str:
        return f"{self.least:,}" if self.least == self.most else f"{self.least:,} to {self.most:,}"


@dataclass(frozen=True, slots=True)
class Conditions:
    """On what networks and samples the calibration was made.

    Attributes:
        networks: in words.
        classes, channels, sides, parameters, samples: of the task, the images and the networks; samples of all classes
            together.
    """

    networks: str
    classes: Range
    channels: Range
    sides: Range
    parameters: Range
    samples: Range

    def unlike(self, *, classes: int, shape: tuple[int, int, int], parameters: int, samples: int) -> tuple[str, ...]:
        """What lies outside, a part of a sentence each.

        Args:
            shape: (C, H, W) of an image.
            parameters: of the network.
            samples: that the audit looks at.
        """
        said = []
        for name, values, known in (
            ("classes", (classes,), self.classes),
            ("colour channels", shape[:1], self.channels),
            ("pixels a side", sorted(set(shape[1:])), self.sides),
            ("parameters", (parameters,), self.parameters),
            ("samples", (samples,), self.samples),
        ):
            if any(value not in known for value in values):
                said.append(f"{' × '.join(f'{v:,}' for v in values)} {name} instead of {known}")
        return tuple(said)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """How the audit did on networks that were not used for the calibration.

    Attributes:
        clean, flagged_clean: networks without a backdoor, and those of them that were flagged.
        backdoored, flagged, right: networks with one class as target, those flagged, and those of them for which the
            suspected class was the target.
        auroc, low, high: of the statistic, with a 95 % bootstrap interval.
    """

    clean: int
    flagged_clean: int
    backdoored: int
    flagged: int
    right: int
    auroc: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Weights, threshold, and where they come from.

    Attributes:
        method: how figures are combined.
        weights: kind of evidence -> what its figure is multiplied by.
        threshold: a statistic above it is called evidence.
        rate: share of clean networks, in (0, 1), that may lie above the threshold.
        clean: the statistics of the calibration's clean networks, ascending.
        backdoored: how many networks with a backdoor the calibration used.
        conditions: what the networks were.
        held_out: how it did on others.
    """

    method: Method
    weights: Mapping[str, float]
    threshold: float
    rate: float
    clean: tuple[float, ...]
    backdoored: int
    conditions: Conditions
    held_out: HeldOut

    def scores(self, figures: Mapping[str, tuple[float, ...]]) -> tuple[float, ...]:
        """One score a class, of the figures that there are: a kind that is missing adds nothing."""
        used = [[weight * value for value in figures[kind]] for kind, weight in self.weights.items() if kind in figures]
        if not used:
            raise DataError(f"no kind of evidence was gathered: at least one of {', '.join(self.weights)} is needed")
        return tuple(sum(parts) if self.method == "sum" else max(parts) for parts in zip(*used, strict=True))

    def as_high(self, statistic: float) -> int:
        """How many of the calibration's clean networks have a statistic at least as high."""
        return sum(value >= statistic for value in self.clean)

    def to_json(self) -> str:
        """The file's content."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Read what :meth:`to_json` wrote.

        Raises:
            DataError: it is no calibration.
        """
        try:
            content = json.loads(text)
            made = cls(**content | _parts(content))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"this is no calibration of the audit: {error}") from error
        unknown = sorted(made.weights.keys() - KINDS.keys())
        if unknown:
            raise DataError(f"the calibration weighs {unknown[0]!r}, which is no kind of evidence")
        return made


def _parts(content: Mapping[str, Any]) -> dict[str, Any]:
    given = content["conditions"]
    ranges = {name: Range(**value) for name, value in given.items() if isinstance(value, dict)}
    return {
        "clean": tuple(content["clean"]),
        "conditions": Conditions(**given | ranges),
        "held_out": HeldOut(**content["held_out"]),
    }


@lru_cache(maxsize=1)
def shipped() -> Calibration:
    """The calibration that comes with the package."""
    return Calibration.from_json(files("unbackdoor.analysis.audit").joinpath(_FILE).read_text(encoding="utf-8"))


def file() -> Path:
    """Where the package's calibration lies, for the script that writes it."""
    return Path(__file__).with_name(_FILE)


def threshold_for(clean: list[float], rate: float) -> float:
    """The threshold that a further network of the same kind exceeds with a chance of at most ``rate``.

    It is the ⌈(n + 1)(1 − rate)⌉-th smallest of n statistics, as in split conformal prediction (Vovk et al. 2005).

    Raises:
        DataError: too few networks for so small a rate.
    """
    place = math.ceil((len(clean) + 1) * (1 - rate))
    if place > len(clean):
        raise DataError(f"a rate of {rate:g} needs at least {math.ceil(1 / rate) - 1} clean networks, not {len(clean)}")
    return sorted(clean)[place - 1]
