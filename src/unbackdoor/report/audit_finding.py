"""An audit's result as a report holds it: figures of each class, the verdict, and pictures of the recovered trigger."""

from __future__ import annotations

from dataclasses import dataclass

from unbackdoor.analysis.audit.calibration import Calibration


@dataclass(frozen=True, slots=True)
class RecoveredTrigger:
    """The smallest patch found for the suspected class, in pictures (PNG in base64).

    Attributes:
        mask: how far each pixel is replaced, white is wholly.
        pattern: by what, on grey where nothing is replaced.
        clean, stamped: one of the clean images, without and with it.
        label: that image's class.
        before, after: what the network says to it, without and with the patch.
        size: sum of the mask, in pixels.
        success: share, in [0, 1], of the clean images of other classes that it sends to the class.
        works: whether that reached what the search asked for.
    """

    mask: str
    pattern: str
    clean: str
    stamped: str
    label: int
    before: int
    after: int
    size: float
    success: float
    works: bool


@dataclass(frozen=True, slots=True)
class AuditFinding:
    """What an audit of one network says.

    Attributes:
        found: whether there is evidence of a backdoor. Where there is none, that proves nothing.
        suspect: the class with the highest score.
        statistic: that score.
        scores: one a class.
        measures: kind of evidence -> what was measured, one a class.
        figures: kind of evidence -> how each class stands out: the natural logarithm of its ratio to the others'
            median, above 0 on the suspicious side.
        as_high: of the calibration's clean networks, how many have a statistic at least as high.
        samples: how many were looked at.
        unlike: in what network and samples are unlike those of the calibration.
        trigger: what was recovered for ``suspect``.
        notes: what kind of evidence is missing, and why.
    """

    found: bool
    suspect: int
    statistic: float
    scores: tuple[float, ...]
    measures: dict[str, tuple[float, ...]]
    figures: dict[str, tuple[float, ...]]
    as_high: int
    samples: int
    unlike: tuple[str, ...]
    trigger: RecoveredTrigger
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RemovalAudit:
    """The audits of a network before and after a removal, of the same samples with the same draws.

    Attributes:
        after: None where the cleaned network could not be audited; ``notes`` then say why.
        calibration: weights and threshold. They come from networks as they were trained; what a removal does to the
            statistic of a network without a backdoor is not known.
        seconds: wall time of both.
    """

    before: AuditFinding
    after: AuditFinding | None
    calibration: Calibration
    seconds: float
    notes: tuple[str, ...] = ()
