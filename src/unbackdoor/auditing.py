"""From a model and a few clean samples to an audit: is there evidence of a backdoor, without any trigger?"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from torch import nn

from unbackdoor.analysis.audit.calibration import shipped
from unbackdoor.api import loaded_model, versions
from unbackdoor.report.audit_record import AuditReport
from unbackdoor.report.audited import find
from unbackdoor.rng import Rng
from unbackdoor.types import Samples


def audit(
    model: nn.Module,
    samples: Samples,
    *,
    seed: int = 0,
    description: Mapping[str, str | None] | None = None,
    notes: Sequence[str] = (),
) -> AuditReport:
    """Look for evidence of a backdoor in ``model``, which is left as it is.

    No trigger, no target and no test set is asked for, and there is no place for one.

    Args:
        model: maps images (N, C, H, W) in [0, 1] to logits (N, num_classes).
        samples: clean images with true labels; twenty of each class at most are used.
        seed: decides every random choice.
        description, notes: as in :func:`unbackdoor.clean`.

    Raises:
        ConfigError: a wrong seed or description key.
        DataError: no images, images of one class alone, or outputs that do not fit or are not finite.
    """
    loaded = loaded_model(model, description or {})
    began = time.perf_counter()
    found = find(model, samples, Rng(seed).child("audit"))
    return AuditReport(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=loaded,
        samples=len(samples),
        image_shape=samples.image_shape,
        class_names=samples.class_names,
        seed=seed,
        found=found,
        calibration=shipped(),
        seconds=time.perf_counter() - began,
        versions=versions(),
        notes=tuple(notes),
    )
