"""``report.html``: the page of a removal, made from the record alone."""

from __future__ import annotations

from collections.abc import Sequence

from unbackdoor.evaluation.assessment import Rate
from unbackdoor.evaluation.checks import FLAGS
from unbackdoor.report import plots, wording
from unbackdoor.report.audit_html import score_figure
from unbackdoor.report.page import Figure, template
from unbackdoor.report.record import Report
from unbackdoor.types import Phase, UnitScores

_BEFORE_AFTER = (("ring before", "before"), ("disc after", "after"))
_CELLS = (("cell after", "right"), ("cell bad", "wrong"))


def render(report: Report) -> str:
    """The page as text. The same record gives the same page."""
    return template("report.html").render(
        report=report,
        headline=wording.headline(report),
        summary=wording.summary(report),
        caveat=wording.caveat(report),
        measured_on=wording.measured_on(report),
        tone=_tone(report),
        meanings=FLAGS,
        names=[report.class_name(i) for i in range(report.samples.num_classes)],
        process=_process_figures(report),
        evidence={figure.name: figure for figure in _evidence_figures(report)},
        canaries=_canary_figure(report),
        foretold=wording.foretold(report),
        audits=_audit_figures(report),
        audited=wording.audited(report),
        limits=wording.limits(report),
        inside=_inside_figures(report),
    )


def _tone(report: Report) -> str:
    """The colour of the verdict: "good", "open" or "bad"."""
    if report.verdict in ("destroyed", "backdoor_remains"):
        return "bad"
    serious = any(flag.serious for flag in report.flags)
    return "good" if report.verdict == "cleaned" and not serious else "open"


#: On what a stop rule looked at an epoch's end, by the first part of the figure's name.
_LOOKED_AT = {
    "held_out": "on the held-out share",
    "training": "at an epoch's end on samples that are trained on",
    "forget_set": "at an epoch's end on the samples to forget",
    "recover_set": "at an epoch's end on the samples to recover with",
    "running": "over the epoch",
}


def _lines(phases: Sequence[Phase], kind: str) -> tuple[tuple[str, str], ...]:
    """The legend of a curve: what the thin line is, and the bold one, in the order of the phases."""
    batches = ("dash muted", "on the training batches")
    keys = [key for p in phases for e in p.epochs for key in e.measured if key.endswith(f"_{kind}")]
    names = list(dict.fromkeys(key.removesuffix(f"_{kind}") for key in keys))
    looked_at = ", or ".join(_LOOKED_AT.get(name, f"on {name.replace('_', ' ')}") for name in names)
    return (batches, ("line after", looked_at)) if names else (batches,)


def _process_figures(report: Report) -> list[Figure]:
    """How training went."""
    phases = report.trace.phases
    if not plots.has_losses(phases):
        return []
    chance = 1 / report.samples.num_classes
    spans = ", ".join(f"{p.name} ({len(p.epochs)} epochs)" for p in phases)
    numbers = (("", "; ".join(f"{i} {p.name}" for i, p in enumerate(phases, 1))),)
    ends = [(p.name, p.epochs[0], p.epochs[-1]) for p in phases if p.epochs]
    accuracy = "; ".join(f"{n} from {a.accuracy:.1%} to {b.accuracy:.1%}" for n, a, b in ends)
    loss = "; ".join(f"{n} from {a.loss:.3g} to {b.loss:.3g}" for n, a, b in ends)
    kinds = {kind: _lines(phases, kind) for kind in ("accuracy", "loss")}
    accuracy_drawn, numbered = plots.curves(phases, "accuracy", chance)
    loss_drawn, _ = plots.curves(phases, "loss")
    return [
        Figure(
            "curves-accuracy",
            "Accuracy while training",
            accuracy_drawn,
            f"Phases: {spans}. Accuracy on the training batches: {accuracy}.",
            kinds["accuracy"] + (numbers if numbered else ()),
        ),
        Figure(
            "curves-loss",
            "Loss while training",
            loss_drawn,
            f"Phases: {spans}. Loss on the training batches: {loss}.",
            kinds["loss"] + (numbers if numbered else ()),
        ),
    ]


def _evidence_figures(report: Report) -> list[Figure]:
    """What the network did before and does after."""
    before, after = report.before, report.after
    names = [report.class_name(i) for i in range(report.samples.num_classes)]
    rows = [("accuracy", before.accuracy, after.accuracy)]
    if before.asr and after.asr and before.ra and after.ra:
        rows += [("attack success", before.asr, after.asr), ("robust accuracy", before.ra, after.ra)]
    drawn, shown = plots.per_class(before, after, names)
    part = f"The {shown} classes that changed most, of {len(names)}. " if shown < len(names) else ""
    figures = [
        Figure(
            "rates",
            "Before and after, with 95% intervals",
            plots.rates(rows),
            "; ".join(f"{name.capitalize()}: {_rate(b)} before, {_rate(a)} after" for name, b, a in rows) + ".",
            _BEFORE_AFTER,
        ),
        Figure(
            "per-class",
            "Accuracy of each class",
            drawn,
            f"{part}The table holds all of them." if part else "The table holds the values.",
            (*_BEFORE_AFTER, ("line bad", "lost more than 10 points")),
        ),
    ]
    for which, found in (("before", before), ("after", after)):
        wrong = sorted((cell for cell in found.confusion if cell[0] != cell[1]), key=lambda cell: -cell[2])[:3]
        most = "; ".join(f"{names[t]} for {names[p]} ({n})" for t, p, n in wrong) or "nothing"
        figures.append(
            Figure(
                f"confusion-{which}",
                f"Confusion {which}",
                plots.confusion(found, names, which),
                f"A row is a true class, a column the answer. Most often mistaken: {most}.",
                _CELLS,
            )
        )
    return figures


def _canary_figure(report: Report) -> Figure | None:
    """What the removal left of backdoors that were planted for it to remove."""
    if report.canaries is None:
        return None
    kinds = [canary.spec.partition("(")[0] for canary in report.canaries.canaries]
    names = [f"{kind} {kinds[: i + 1].count(kind)}" if kinds.count(kind) > 1 else kind for i, kind in enumerate(kinds)]
    rows = [(name, c.planted, c.left) for name, c in zip(names, report.canaries.canaries, strict=True)]
    return Figure(
        "canaries",
        "Success of the planted triggers, with 95% intervals",
        plots.rates(rows, "canaries"),
        "; ".join(f"{name.capitalize()}: {_rate(p)} planted, {_rate(left)} left" for name, p, left in rows) + ".",
        (("ring before", "planted in a copy"), ("disc after", "left in it after the same removal")),
    )


def _audit_figures(report: Report) -> list[Figure]:
    """The score of each class before and after."""
    if report.audit is None:
        return []
    names = [report.class_name(i) for i in range(report.samples.num_classes)]
    found = {"before": report.audit.before, "after": report.audit.after}
    return [score_figure(f, report.audit.calibration, names, which) for which, f in found.items() if f is not None]


def _attention_figure(layers: Sequence[UnitScores], threshold: float | None) -> Figure:
    most = max(len(layer.scores) for layer in layers)
    drawn, shown = plots.unit_scores(layers, threshold, [f"head {i}" for i in range(most)], "head-scores")
    apart = "; ".join(f"{layer.layer}: {', '.join(map(str, layer.flagged))}" for layer in layers if layer.flagged)
    part = f" Drawn are the {shown} with the farthest heads." if shown < len(layers) else ""
    where = "one layer" if len(layers) == 1 else f"{len(layers)} layers"
    return Figure(
        "head-scores",
        "How far the attention heads moved",
        drawn,
        f"{sum(len(layer.scores) for layer in layers)} heads in {where} of attention, each by the sum of its "
        f"queries', keys' and values' scores.{part} Standing out: {apart or 'none'}. "
        "Units are reset by their own scores.",
        (("disc bad", "stands out"), ("disc after" if len(layers) == 1 else "disc muted", "other heads")),
    )


def _inside_figures(report: Report) -> list[Figure]:
    """What happened inside the network: scores of units and of attention heads, and weights."""
    figures = []
    scores = report.trace.scores
    if any(layer.scores for layer in scores):
        names = [report.class_name(i) for i in range(report.samples.num_classes)]
        drawn, shown = plots.unit_scores(scores, _threshold(report), names)
        units = sum(len(layer.scores) for layer in scores)
        layers = "one scored layer" if len(scores) == 1 else f"{len(scores)} scored layers"
        flagged = "; ".join(
            f"{layer.layer}: {', '.join(map(str, layer.flagged[:12]))}{'…' if len(layer.flagged) > 12 else ''}"
            for layer in scores
            if layer.flagged
        )
        part = f" Drawn are the {shown} layers with the farthest units." if shown < len(scores) else ""
        figures.append(
            Figure(
                "unit-scores",
                "Suspicion scores of the units",
                drawn,
                f"{units:,} units in {layers}.{part} Flagged and reset: {flagged or 'none'}.",
                (("disc bad", "flagged"), ("disc after", "other units; many units as a density")),
            )
        )
    if report.trace.heads:
        figures.append(_attention_figure(report.trace.heads, _threshold(report)))
    moved = [c for c in report.weights if c.relative is not None and not c.buffer and len(c.shape) >= 2]
    if moved:
        drawn, shown = plots.weight_changes(report.weights)
        most = max(moved, key=lambda c: c.relative or 0.0)
        part = f" Drawn are the {shown} that changed most." if shown < len(moved) else ""
        figures.append(
            Figure(
                "weights",
                "How far the weights moved",
                drawn,
                f"Relative change of {len(moved)} weight tensors, first layers on top.{part} "
                f"Most: {most.name}, {most.relative:.3g}.",
            )
        )
    return figures


def _threshold(report: Report) -> float | None:
    """The number of robust deviations from which units are flagged, where the method states one."""
    for found in (report.trace.values.get("threshold"), report.method.fields.get("threshold")):
        if isinstance(found, int | float) and not isinstance(found, bool):
            return float(found)
    return None


def _rate(rate: Rate) -> str:
    return f"{rate.value:.1%} ({rate.interval.low:.1%} to {rate.interval.high:.1%})"
