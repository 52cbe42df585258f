"""An audit's result as a report holds it: figures of each class, the verdict, and pictures of the recovered trigger."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from unbackdoor.analysis.audit import AuditResult, audit
from unbackdoor.inference import device_of, predict
from unbackdoor.report.examples import png
from unbackdoor.rng import Rng
from unbackdoor.types import Samples


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


def find(model: nn.Module, clean: Samples, rng: Rng) -> AuditFinding:
    """Audit ``model``, which is left as it is. Arguments and errors are those of
    :func:`unbackdoor.analysis.audit.audit`.
    """
    return finding_of(audit(model, clean, rng), model, clean)


def finding_of(result: AuditResult, model: nn.Module, clean: Samples) -> AuditFinding:
    """The result with pictures.

    Args:
        model: the network that was audited.
        clean: the samples that were given; the first of another class than the suspected one is shown.
    """
    return AuditFinding(
        found=result.found,
        suspect=result.suspect,
        statistic=result.statistic,
        scores=result.scores,
        measures=result.evidence.measures,
        figures=result.evidence.figures,
        as_high=result.calibration.as_high(result.statistic),
        samples=result.evidence.samples,
        unlike=result.unlike,
        trigger=_pictures(result, model, clean),
        notes=result.evidence.notes,
    )


def _pictures(result: AuditResult, model: nn.Module, clean: Samples) -> RecoveredTrigger:
    trigger = result.trigger
    # Some sample is of another class, or the audit had refused.
    shown = clean.select((clean.labels != result.suspect).nonzero()[:1, 0]).to(device_of(model))
    answers = [int(predict(model, shown, transform=change).argmax()) for change in (None, trigger)]
    image = shown.images(slice(None)).cpu()
    mask, pattern = trigger.mask.cpu(), trigger.pattern.cpu()
    grey = torch.full_like(pattern, 0.5)
    return RecoveredTrigger(
        mask=png(mask[None]),
        pattern=png(torch.lerp(grey, pattern, mask)),
        clean=png(image[0]),
        stamped=png(torch.lerp(image, pattern, mask)[0]),
        label=int(shown.labels[0]),
        before=answers[0],
        after=answers[1],
        size=trigger.l1,
        success=trigger.success,
        works=trigger.works,
    )
