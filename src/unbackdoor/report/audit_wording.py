"""What an audit says in plain words, for page and terminal alike. "No evidence" is never put as "clean"."""

from __future__ import annotations

from collections.abc import Sequence

from unbackdoor.analysis.audit.calibration import Calibration
from unbackdoor.report.audit_finding import AuditFinding


def headline(found: AuditFinding, name: str) -> str:
    """The verdict as one sentence.

    Args:
        name: of the suspected class.
    """
    if found.found:
        return f"Evidence of a backdoor towards class {name}."
    return "No evidence found, which is not proof of a clean network."


def summary(found: AuditFinding, calibration: Calibration, name: str) -> str:
    """The statistic, the threshold, and how many clean networks come as high."""
    side = "above" if found.found else "not above"
    known = len(calibration.clean)
    return (
        f"The most suspicious class is {name}: its score is {found.statistic:.2f}, {side} the threshold of "
        f"{calibration.threshold:.2f}. Of the {known} networks without a backdoor that the calibration used, "
        f"{found.as_high or 'none'} came as high."
    )


def performance(calibration: Calibration) -> str:
    """How often the audit was right about networks that its calibration had not seen."""
    known = calibration.held_out
    return (
        f"On other networks than those of its calibration the audit flagged {known.flagged} of {known.backdoored} with "
        f"a backdoor (the right class in {known.right}) and {known.flagged_clean} of {known.clean} without one; AUROC "
        f"{known.auroc:.2f} (95 % interval {known.low:.2f} to {known.high:.2f})."
    )


def unlike(parts: Sequence[str], calibration: Calibration) -> str | None:
    """A warning where network or samples are unlike those of the calibration; None where they are like them."""
    if not parts:
        return None
    return (
        f"Unlike the networks of the calibration ({calibration.conditions.networks}): {'; '.join(parts)}. Threshold "
        "and error rates are not known to hold here; the order of the classes says more than the verdict"
    )


def limits(found: AuditFinding) -> tuple[str, ...]:
    """What stays open, a sentence each."""
    said = [
        "No evidence is no proof: an audit looks for classes that are easier to reach than others, and a backdoor need "
        "not make its target so. One with a target for each class, or one built against such tests, may stay unseen.",
        "Evidence is no proof either: some classes of a network without a backdoor are easy to reach, and some data "
        "sets hold natural patches for a class.",
        "The recovered trigger is the smallest patch that the search found. It need not look like the attacker's, and "
        "of a trigger that fills the picture or bends it, it cannot.",
    ]
    if not found.trigger.works:
        said.append("No patch was found that works on the suspected class; the one shown is the last that was tried.")
    return (*said, *(f"{note[:1].upper()}{note[1:]}." for note in found.notes))
