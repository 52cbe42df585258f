"""The record and the page of an audit, and the sentences computed for it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import audit_examples
from factories import linear, samples
from unbackdoor.analysis.audit import AuditResult
from unbackdoor.analysis.audit.evidence import Evidence
from unbackdoor.defenses.inversion import InvertedTrigger
from unbackdoor.errors import DataError, OutputExists
from unbackdoor.inference import predict
from unbackdoor.report import audit_wording as wording
from unbackdoor.report.audit_html import render_audit
from unbackdoor.report.audit_plots import MOST_CLASSES, shown_classes
from unbackdoor.report.audit_record import AuditReport
from unbackdoor.report.audited import finding_of

KINDS: dict[str, dict[str, Any]] = {
    "evidence": {},
    "none": {"found": False},
    "unlike, with a kind missing": {"missing": True, "found": False},
    "many classes without names": {"classes": 60, "names": False},
    "no patch works": {"works": False},
}


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    for how in KINDS.values():
        report = audit_examples.report(**how)
        assert AuditReport.load(report.save(tmp_path / "audit.json", force=True)) == report
    with pytest.raises(OutputExists):
        report.save(tmp_path / "audit.json")


def test_another_file_is_no_audit(tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    path.write_text('{"schema_version": 2}')
    with pytest.raises(DataError, match="schema version 2; this release reads version 1"):
        AuditReport.load(path)
    path.write_text('{"schema_version": 1, "created": "now"}')
    with pytest.raises(DataError, match="is not an audit: model: Field required"):
        AuditReport.load(path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_is_whole_and_asks_for_nothing(kind: str) -> None:
    report = audit_examples.report(**KINDS[kind])
    page = render_audit(report)
    assert page == render_audit(report)
    assert page.count("<figure") == 1 + len(report.calibration.weights)
    assert page.count("data:image/png;base64,") == 4
    assert "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!#|data:)', page)
    assert "&lt;b&gt;suspicious&lt;/b&gt;.pt" in page
    assert "<b>suspicious" not in page
    assert "<i>class" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert ("no evidence, since there is no head" in page) == (kind.startswith("unlike"))
    assert ("3 colour channels instead of 1" in page) == (kind.startswith("unlike"))
    assert ("the last that was tried" in page) == (kind == "no patch works")


@pytest.mark.parametrize("found", [True, False])
def test_the_verdict_is_in_plain_words_and_never_clean(found: bool) -> None:
    page = render_audit(audit_examples.report(found=found))
    said = wording.headline(audit_examples.finding(found=found), "three")
    assert said == (
        "Evidence of a backdoor towards class three."
        if found
        else "No evidence found, which is not proof of a clean network."
    )
    for claim in ("is clean", "no backdoor was found", "the network is safe", "free of"):
        assert claim not in page.lower()


def test_the_calibration_stands_beside_the_verdict() -> None:
    found, calibration = audit_examples.finding(), audit_examples.calibration()
    assert "above the threshold of 1.00" in wording.summary(found, calibration, "3")
    assert "Of the 4 networks without a backdoor that the calibration used, none came as high" in wording.summary(
        found, calibration, "3"
    )
    said = wording.performance(calibration)
    assert "flagged 15 of 17 with a backdoor (the right class in 14) and 1 of 18 without one" in said
    assert "AUROC 0.95 (95 % interval 0.87 to 1.00)" in said
    assert wording.unlike((), calibration) is None
    warned = wording.unlike(("4 classes instead of 10",), calibration)
    assert warned is not None
    assert "small ones): 4 classes instead of 10." in warned


def test_of_many_classes_the_most_suspicious_are_drawn() -> None:
    scores = [float(c % 50) for c in range(100)]
    drawn = shown_classes(scores)
    assert len(drawn) == MOST_CLASSES
    assert drawn == sorted(drawn)
    assert min(scores[c] for c in drawn) >= max(scores[c] for c in range(100) if c not in drawn)


def test_the_pictures_show_what_the_network_was_asked() -> None:
    model: nn.Module = linear()
    clean = samples(12)
    size = clean.image_shape
    mask, pattern = clean.images(slice(0, 1))[0, 0], clean.images(slice(1, 2))[0]
    triggers = tuple(InvertedTrigger(c, mask, pattern, 0.5, True) for c in range(4))
    measures = {"pixel_mask": (4.0, 1.0, 4.0, 4.0), "perturbation": (1.0, 1.0, 1.0, 1.0)}
    calibration = audit_examples.calibration()
    evidence = Evidence(measures, triggers, 12)
    result = AuditResult(evidence, calibration.scores(evidence.figures), (), calibration)
    found = finding_of(result, model, clean)
    assert found.suspect == 1
    assert found.found
    assert found.statistic == pytest.approx(1.386294, abs=1e-6)  # ln 4
    shown = clean.select((clean.labels != 1).nonzero()[:1, 0])
    assert found.trigger.label == int(shown.labels[0])
    assert found.trigger.before == int(predict(model, shown).argmax())
    assert found.trigger.after == int(predict(model, shown, transform=triggers[1]).argmax())
    assert found.trigger.size == pytest.approx(float(mask.sum()))
    assert size == (3, 8, 8)
