"""The blind audit: is there evidence of a backdoor, towards which class, and what does its trigger look like?

It is given a network and clean samples, and nothing else: no trigger, no target, no test set. Evidence of several kinds
is gathered for each class and combined into one statistic with weights and a threshold from networks whose truth is
known. Where none is found, that proves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from unbackdoor.analysis.audit.calibration import Calibration, shipped
from unbackdoor.analysis.audit.evidence import Evidence, gather
from unbackdoor.defenses.inversion import InvertedTrigger
from unbackdoor.rng import Rng
from unbackdoor.types import Samples


@dataclass(frozen=True, slots=True, eq=False)
class AuditResult:
    """What an audit found.

    Attributes:
        evidence: of all kinds that the network allows.
        scores: one a class; what the figures of that class come to.
        unlike: in what the network and the samples are unlike those of the calibration, a part of a sentence each:
            where there is anything, threshold and error rates are not known to hold.
        calibration: weights and threshold.
    """

    evidence: Evidence
    scores: tuple[float, ...]
    unlike: tuple[str, ...]
    calibration: Calibration

    @property
    def suspect(self) -> int:
        """The class with the highest score, whether that is evidence or not."""
        return max(range(len(self.scores)), key=lambda c: self.scores[c])

    @property
    def statistic(self) -> float:
        """The highest score."""
        return self.scores[self.suspect]

    @property
    def found(self) -> bool:
        """Whether the statistic is above the threshold: evidence of a backdoor towards :attr:`suspect`."""
        return self.statistic > self.calibration.threshold

    @property
    def trigger(self) -> InvertedTrigger:
        """The smallest patch found for the suspected class; it need not look like the attacker's."""
        return self.evidence.triggers[self.suspect]


def audit(model: nn.Module, clean: Samples, rng: Rng, *, calibration: Calibration | None = None) -> AuditResult:
    """Look for evidence of a backdoor. ``model`` is left as it is.

    Args:
        model: maps images (N, C, H, W) in [0, 1] to logits (N, num_classes).
        clean: images with true labels; :data:`~unbackdoor.analysis.audit.evidence.PER_CLASS` of each class at most are
            used.
        rng: gives draws and starts: the same network, samples and generator give the same result.
        calibration: the one that comes with the package where it is None.

    Raises:
        DataError: no images, images of one class alone, or outputs that do not fit or are not finite.
    """
    calibration = calibration or shipped()
    evidence = gather(model, clean, rng)
    unlike = calibration.conditions.unlike(
        classes=clean.num_classes,
        shape=clean.image_shape,
        parameters=sum(p.numel() for p in model.parameters()),
        samples=evidence.samples,
    )
    return AuditResult(evidence, calibration.scores(evidence.figures), unlike, calibration)
