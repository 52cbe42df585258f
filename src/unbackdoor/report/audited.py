"""From an audit to what a report holds of it: the verdict, all figures and pictures, of one network or of two."""

from __future__ import annotations

import time

import torch
from torch import nn

from unbackdoor.analysis.audit import AuditResult, audit
from unbackdoor.analysis.audit.calibration import shipped
from unbackdoor.errors import DataError
from unbackdoor.inference import device_of, predict
from unbackdoor.report.audit_finding import AuditFinding, RecoveredTrigger, RemovalAudit
from unbackdoor.report.examples import png
from unbackdoor.rng import Rng
from unbackdoor.types import Samples


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


def before_and_after(before: nn.Module, after: nn.Module, clean: Samples, rng: Rng) -> RemovalAudit:
    """Audit a network and what a removal made of it; both are left as they are.

    Args:
        clean: as in :func:`find`; both are audited on the same draws.

    Raises:
        DataError: as :func:`find`, of the network before.
    """
    began = time.perf_counter()
    first = find(before, clean, rng)
    second: AuditFinding | None = None
    notes: tuple[str, ...] = ()
    try:
        second = find(after, clean, rng)
    except (
        DataError
    ) as error:  # a destroyed network gives no finite outputs; the removal's report is written all the same
        notes = (f"the network after the removal could not be audited: {error}",)
    return RemovalAudit(first, second, shipped(), time.perf_counter() - began, notes)
