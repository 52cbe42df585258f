"""The audit's records as Markdown: how it does on networks that were not used for its calibration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from audit_fit import METHODS, Judged, area, cross_validated, interval, judged, networks
from unbackdoor.analysis.audit.calibration import Calibration, shipped
from unbackdoor.analysis.audit.evidence import KINDS
from unbackdoor.evaluation.metrics import wilson_interval
from victim_runs import markdown, read_records

WORDS = {"sum": "weighted sum (a logistic regression)", "largest": "largest, each in units of its spread"}
HEADS = ("networks", "number", "flagged", "class right", "AUROC", "95 % interval")


def tables(records: Path) -> dict[str, str]:
    found, calibration = read_records(records / "audit.jsonl"), shipped()
    held_out = judged(calibration, networks(found, "held-out"))
    used = judged(calibration, networks(found, "calibration"))
    return {
        "audit-summary": summary(calibration, used, held_out),
        "audit": markdown(HEADS, [*rows(held_out)]),
        "audit-settings": markdown(HEADS, [*by_setting(held_out)]),
        "audit-kinds": markdown(
            ("evidence", "weight", "calibration: AUROC", "held out: AUROC"), kinds(calibration, used, held_out)
        ),
    }


def summary(calibration: Calibration, used: Sequence[Judged], held_out: Sequence[Judged]) -> str:
    """What the figures come to, in sentences."""
    known, clean = calibration.held_out, len(calibration.clean)
    areas = {method: cross_validated(method, [each.net for each in used]) for method in METHODS}
    other = next(method for method in METHODS if method != calibration.method)
    first = sum(each.suspect == each.net.target for each in held_out if each.net.target is not None)
    chance = wilson_interval(known.flagged_clean, known.clean)
    return (
        f"The calibration used {clean} clean networks and {calibration.backdoored} victims; its threshold is for a "
        f"false-positive rate of {calibration.rate:.0%}. On networks that it had not seen, the audit flagged "
        f"{known.flagged_clean} of {known.clean} clean ones (95 % interval {chance.low:.0%} to {chance.high:.0%}) and "
        f"{known.flagged} of {known.backdoored} victims with one target, with the right class in {known.right}; the "
        f"target had the highest score, flagged or not, in {first}. AUROC: {known.auroc:.2f} "
        f"({known.low:.2f} to {known.high:.2f}). "
        f"Figures are combined by their {WORDS[calibration.method]}: cross-validated within the calibration its AUROC "
        f"is {areas[calibration.method]:.2f}, that of the {WORDS[other]} {areas[other]:.2f}."
    )


def rows(found: Sequence[Judged]) -> list[list[str]]:
    """The clean networks, all victims with one target, and each attack."""
    clean = [each for each in found if each.net.clean]
    victims = [each for each in found if each.net.target is not None]
    made = [_row("clean", clean, clean), _row("all with one target", victims, clean)]
    groups = sorted({each.net.group for each in found if not each.net.clean})
    return made + [_row(f"`{group}`", [e for e in found if e.net.group == group], clean) for group in groups]


def by_setting(found: Sequence[Judged]) -> list[list[str]]:
    """For each data set and network the clean ones and the victims, compared with each other."""
    made = []
    for setting, arch in sorted({(each.net.record["setting"], each.net.record["arch"]) for each in found}):
        mine = [e for e in found if (e.net.record["setting"], e.net.record["arch"]) == (setting, arch)]
        clean, victims = [e for e in mine if e.net.clean], [e for e in mine if e.net.target is not None]
        made.append(_row(f"{setting}, {arch}: clean", clean, clean))
        if victims:
            made.append(_row(f"{setting}, {arch}: victims", victims, clean))
    return made


def kinds(calibration: Calibration, used: Sequence[Judged], held_out: Sequence[Judged]) -> list[list[str]]:
    """What each kind of evidence would do alone: the largest figure over the classes."""
    made = []
    for kind, about in KINDS.items():
        cells = []
        for found in (used, held_out):
            values = [
                [max(e.net.figures[kind]) for e in found if want(e)]
                for want in (lambda e: e.net.clean, lambda e: e.net.target is not None)
            ]
            cells.append(f"{area(*values):.2f}")
        weight = calibration.weights.get(kind)
        made.append([about.title.lower(), "–" if weight is None else f"{weight:.2f}", *cells])
    return made


def _row(name: str, found: Sequence[Judged], clean: Sequence[Judged]) -> list[str]:
    head = [name, str(len(found)), str(sum(each.flagged for each in found))]
    if found is clean:
        return [*head, "–", "–", "–"]
    values = [each.statistic for each in clean], [each.statistic for each in found]
    low, high = interval(*values)
    right = "–" if any(each.net.target is None for each in found) else str(sum(each.right for each in found))
    return [*head, right, f"{area(*values):.2f}", f"{low:.2f} to {high:.2f}"]
