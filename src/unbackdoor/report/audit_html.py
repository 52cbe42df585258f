"""``audit.html``: the page of an audit, made from the record alone."""

from __future__ import annotations

from unbackdoor.analysis.audit.calibration import Calibration
from unbackdoor.analysis.audit.evidence import KINDS
from unbackdoor.report import audit_plots as plots
from unbackdoor.report import audit_wording as wording
from unbackdoor.report.audit_finding import AuditFinding
from unbackdoor.report.audit_record import AuditReport
from unbackdoor.report.page import Figure, template


def render_audit(report: AuditReport) -> str:
    """The page as text. The same record gives the same page."""
    found, calibration = report.found, report.calibration
    names = [report.class_name(c) for c in range(len(found.scores))]
    suspect = names[found.suspect]
    return template("audit.html").render(
        report=report,
        found=found,
        calibration=calibration,
        names=names,
        suspect=suspect,
        headline=wording.headline(found, suspect),
        summary=wording.summary(found, calibration, suspect),
        performance=wording.performance(calibration),
        unlike=wording.unlike(found.unlike, calibration),
        limits=wording.limits(found),
        tone="bad" if found.found else "open",
        scores=score_figure(found, calibration, names),
        by_kind=_by_kind(found, calibration, names),
        kinds={kind: about for kind, about in KINDS.items() if kind in found.measures},
    )


def score_figure(found: AuditFinding, calibration: Calibration, names: list[str], which: str = "") -> Figure:
    """The score of each class; ``which`` tells several on one page apart ("before")."""
    drawn = plots.shown_classes(found.scores)
    part = f" Drawn are the {len(drawn)} classes with the highest." if len(drawn) < len(names) else ""
    name = f"audit-scores-{which}" if which else "audit-scores"
    return Figure(
        name,
        f"Score of each class{', ' * bool(which)}{which}",
        plots.scores(found.scores, names, found.suspect, calibration.threshold, name),
        f"Highest: {names[found.suspect]}, {found.statistic:.2f}; threshold {calibration.threshold:.2f}.{part}",
        (("disc bad", "above the threshold"), ("disc after", "other classes")),
    )


def _by_kind(found: AuditFinding, calibration: Calibration, names: list[str]) -> list[Figure]:
    """The kinds of evidence that count."""
    made = []
    chosen = plots.shown_classes(found.scores)
    for kind, weight in calibration.weights.items():
        if kind not in found.figures:
            continue
        values, about = found.figures[kind], KINDS[kind]
        top = max(range(len(values)), key=lambda c: values[c])
        made.append(
            Figure(
                f"audit-{kind}",
                about.title,
                plots.figures(kind, values, chosen, names, found.suspect),
                f"{about.meaning} Stands out most: {names[top]}, {values[top]:.2f}. Weight: {weight:.2f}.",
                (("disc bad", "the suspected class"), ("disc after", "other classes")),
            )
        )
    return made
