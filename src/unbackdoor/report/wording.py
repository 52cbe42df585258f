"""The verdict in plain words, for the page and for the terminal alike."""

from __future__ import annotations

from unbackdoor.evaluation.verdict import GONE_BELOW
from unbackdoor.report.audit_finding import AuditFinding
from unbackdoor.report.record import Report


def headline(report: Report) -> str:
    """The verdict as one short sentence."""
    raised = {flag.name for flag in report.flags}
    if "accuracy_at_chance" in raised and report.verdict != "destroyed":
        return "Nothing can be said: the network does not work on these samples."
    works = "works, but less well" if "accuracy_fell" in raised else "still works"
    match report.verdict:
        case "cleaned":
            return f"The backdoor is gone, and the network {works}."
        case "unproven":
            return f"The network {works}. That a backdoor is gone is not proven."
        case "backdoor_remains":
            return "The backdoor is still there."
        case "unchanged":
            return "Nothing was changed."
        case "destroyed":
            return "The network was destroyed. Do not use it."


def summary(report: Report) -> str:
    """What was measured, in two or three sentences."""
    before, after = report.before, report.after
    kept = (
        f"On {_samples(report)}, accuracy went from {before.accuracy.value:.1%} to {after.accuracy.value:.1%} "
        f"(95% interval {after.accuracy.interval.low:.1%} to {after.accuracy.interval.high:.1%})."
    )
    if report.verdict == "unchanged":
        kept = (
            f"The method left every weight as it was. On {_samples(report)}, accuracy is {before.accuracy.value:.1%}."
        )
    if before.asr is None or after.asr is None:
        return kept
    return (
        f"{kept} The known trigger worked on {before.asr.value:.1%} of {before.asr.count} {report.things} before "
        f"and on {after.asr.value:.1%} after."
    )


def caveat(report: Report) -> str:
    """What the figures do not show."""
    if report.verdict == "destroyed":
        reasons = [flag.message for flag in report.flags if flag.name == "destroyed"]
        text = f"Reason: {'; '.join(reasons)}." if reasons else "The figures below show how."
        return f"{text} Keep the network you had, and try again with more clean samples or a gentler method."
    if report.attack is None:
        return (
            "What is measured here is the accuracy that was retained. No trigger is known, so nothing in this report "
            "shows that a backdoor was there, or that it is gone. Before you rely on the network, test it with the "
            "triggers that you fear."
        )
    if report.verdict == "unproven":
        return (
            "The trigger that was tried did not work before the removal either: its failure afterwards proves nothing."
        )
    if report.verdict == "backdoor_remains":
        return "Do not use this network where somebody may hold the trigger. Try another method or more clean samples."
    return "This was measured with one known trigger. A second backdoor with another trigger would not have been seen."


def foretold(report: Report) -> str | None:
    """What became of the canaries, in two or three sentences; None without canaries."""
    if report.canaries is None:
        return None
    found = [c for c in report.canaries.canaries if c.took]
    if not found or report.canaries.worst is None:
        return "None of the known backdoors that were planted in a copy took: the removal could not be tried on them."
    gone = sum(c.left.value <= GONE_BELOW for c in found)
    text = (
        f"{_count(len(found), 'known backdoor')} {'was' if len(found) == 1 else 'were'} planted in a copy of the "
        f"network and put through the same removal. It left the worst of them working on {report.canaries.worst:.1%} "
        f"of the images; {gone} of {len(found)} fell to {GONE_BELOW:.0%} or below."
    )
    absent = len(report.canaries.canaries) - len(found)
    if absent:
        text += f" {_count(absent, 'more')} did not take and {'says' if absent == 1 else 'say'} nothing."
    return text


def audited(report: Report) -> str | None:
    """What the audit found before and after, in a few sentences; None without one."""
    if report.audit is None:
        return None
    before, after = report.audit.before, report.audit.after
    threshold = report.audit.calibration.threshold
    text = f"Audit before: {_evidence(before, report)}."
    if after is None:
        return f"{text} Audit after: not possible."
    text += f" Audit after: {_evidence(after, report)}. The threshold is {threshold:.2f}"
    known = len(report.audit.calibration.clean)
    return f"{text}; it comes from {known} clean networks as they were trained, not from cleaned ones."


def _evidence(found: AuditFinding, report: Report) -> str:
    name = report.class_name(found.suspect)
    if found.found:
        return f"evidence of a backdoor towards class {name} (score {found.statistic:.2f})"
    return f"no evidence found, which is no proof (highest score {found.statistic:.2f}, class {name})"


def _count(number: int, what: str) -> str:
    plural = what if what == "more" or number == 1 else f"{what}s"
    return f"{'One' if number == 1 else number} {plural}"


def limits(report: Report) -> tuple[str, ...]:
    """What stays open even when nothing went wrong, a sentence each."""
    same = f"Accuracy was measured on {report.measured.count:,} samples; on inputs of another kind it may differ."
    if report.verdict == "destroyed":
        return ("The network is unusable, so nothing else was judged.",)
    if report.attack is None:
        backdoor = "Whether there was a backdoor, and whether one is left: without a trigger neither can be measured."
    else:
        backdoor = "Whether there was a second backdoor, with another trigger than the one that was tried."
    canaries = (
        "Whether the backdoor that you fear is as easy to remove as those that were planted: one that was trained in "
        "from the start tends to sit deeper.",
    )
    return (
        backdoor,
        *(canaries if report.canaries else ()),
        "Whether an attacker who knew of this method built the backdoor to survive it.",
        "Whether the clean samples were clean: a triggered image among them can keep a backdoor alive.",
        same,
    )


def measured_on(report: Report) -> str:
    """On which samples before and after were measured, as a sentence."""
    count = report.measured.count
    match report.measured.source:
        case "test":
            return f"Measured on a separate test set of {count:,} samples that the defense never saw."
        case "held_out":
            return (
                f"Measured on {count:,} of your {report.samples.count:,} clean samples, set aside before the defense "
                "started and never seen by it."
            )
        case "given":
            return (
                f"Measured on all {count:,} clean samples, which the defense has trained on: the accuracy afterwards "
                "is optimistic."
            )


def _samples(report: Report) -> str:
    kind = {
        "test": "separate test samples",
        "held_out": "samples set aside",
        "given": "samples that the defense trained on",
    }
    return f"{report.measured.count:,} {kind[report.measured.source]}"
