"""Audits that exercise every part of their page, made without any search, and a calibration for tests."""

from __future__ import annotations

import torch

from unbackdoor.analysis.audit.calibration import Calibration, Conditions, HeldOut, Range
from unbackdoor.analysis.audit.evidence import KINDS, stands_out
from unbackdoor.report.audit_finding import AuditFinding, RecoveredTrigger
from unbackdoor.report.audit_record import AuditReport
from unbackdoor.report.examples import png
from unbackdoor.report.record import LoadedModel, Versions


def calibration(threshold: float = 1.0) -> Calibration:
    return Calibration(
        method="sum",
        weights={"pixel_mask": 1.0, "perturbation": 2.0},
        threshold=threshold,
        rate=0.05,
        clean=(0.2, 0.4, 0.6, 0.9),
        backdoored=3,
        conditions=Conditions(
            "small ones", Range(10, 10), Range(1, 1), Range(8, 14), Range(1000, 2000), Range(190, 200)
        ),
        held_out=HeldOut(
            clean=18, flagged_clean=1, backdoored=17, flagged=15, right=14, auroc=0.953, low=0.871, high=1.0
        ),
    )


def finding(*, found: bool = True, classes: int = 10, missing: bool = False, works: bool = True) -> AuditFinding:
    """Class 3 stands out, by a factor of 8 where something is to be found."""
    factor = 8.0 if found else 1.1
    measures = {}
    for kind, about in KINDS.items():
        if missing and kind.startswith("feature"):
            continue
        base = [5.0 + 0.1 * ((7 * c) % classes) for c in range(classes)]
        base[3] = base[3] / factor if about.small else base[3] * factor
        measures[kind] = tuple(base)
    figures = {kind: stands_out(values, small=KINDS[kind].small) for kind, values in measures.items()}
    scores = calibration().scores(figures)
    picture = png(torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)))
    trigger = RecoveredTrigger(picture, picture, picture, picture, 1, 1, 3, 4.25, 0.985, works)
    notes = ("features before the last layer: no evidence, since there is no head",) if missing else ()
    unlike = ("3 colour channels instead of 1",) if missing else ()
    return AuditFinding(found, 3, scores[3], scores, measures, figures, 0, 200, unlike, trigger, notes)


def report(
    *, found: bool = True, classes: int = 10, missing: bool = False, works: bool = True, names: bool = True
) -> AuditReport:
    class_names = tuple(f"<i>class</i> {c}" for c in range(classes)) if names else ()
    return AuditReport(
        created="2025-01-02T03:04:05+00:00",
        model=LoadedModel(name="<b>suspicious</b>.pt", architecture="cnn", parameters=1500),
        samples=500,
        image_shape=(1, 8, 8),
        class_names=class_names,
        seed=0,
        found=finding(found=found, classes=classes, missing=missing, works=works),
        calibration=calibration(),
        seconds=12.3,
        versions=Versions(unbackdoor="0.1.0", torch="2.9.0", python="3.12.3"),
        notes=("the images were in 0..255",),
    )
