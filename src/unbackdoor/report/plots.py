"""The report's figures as SVG, the same bytes for the same record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from unbackdoor.evaluation.assessment import Assessment, Rate
from unbackdoor.evaluation.weights import WeightChange
from unbackdoor.report.canvas import (
    AFTER,
    BAD,
    BEFORE,
    FONT,
    INK,
    MUTED,
    PAPER,
    ROW,
    RULE,
    SMALL,
    WIDTH,
    canvas,
    clean_text,
    dot,
    few_ticks,
    finite,
    label_room,
    line,
    percent_axis,
    rows_axis,
    short,
    style,
    svg,
)
from unbackdoor.types import Phase, UnitScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: More rows than this would make a figure longer than anybody reads; the page's tables hold all.
MOST_ROWS = 40
#: Classes drawn one by one; the table beside the figure holds all.
MOST_CLASSES = 24
#: Units of a layer up to here are drawn one by one; above, as a density.
_DOTS = 40
_BINS = 48


@style()
def rates(rows: Sequence[tuple[str, Rate, Rate]], name: str = "rates") -> str:
    """Rates before and after as dots with their 95 % intervals; a row each of (label, before, after)."""
    figure, axes = canvas(34.0 * len(rows) + 30, left=label_room([r[0] for r in rows]), right=16, top=6)
    for row, (_, before, after) in enumerate(rows):
        for rate, colour, offset, filled in ((before, BEFORE, -0.2, False), (after, AFTER, 0.2, True)):
            y = row + offset
            axes.plot([rate.interval.low, rate.interval.high], [y, y], color=colour, lw=2.2, solid_capstyle="round")
            dot(axes, rate.value, y, colour, filled=filled, size=6.5)
            right = rate.interval.high < 0.8
            x = rate.interval.high + 0.025 if right else rate.interval.low - 0.025
            axes.text(x, y, f"{rate.value:.1%}", va="center", ha="left" if right else "right", color=colour)
    rows_axis(axes, [r[0] for r in rows], font=FONT)
    percent_axis(axes)
    return svg(figure, name)


@style()
def curves(phases: Sequence[Phase], what: Literal["accuracy", "loss"], chance: float | None = None) -> tuple[str, bool]:
    """Accuracy or loss of every epoch, phase after phase; what was measured at epoch ends is the bolder line.

    The second value says whether the phases are numbered, because their names did not fit.
    """
    figure, axes = canvas(190, left=40, right=10, top=24)
    start = 0
    total = sum(len(p.epochs) for p in phases)
    room = (WIDTH - 50) / max(1, total)
    numbered = any(len(p.name) * FONT * 0.55 > len(p.epochs) * room for p in phases)
    for number, phase in enumerate(phases, 1):
        xs = [start + i + 1 for i in range(len(phase.epochs))]
        train = [finite(e.accuracy if what == "accuracy" else e.loss) for e in phase.epochs]
        line(axes, xs, train, MUTED, 1.4, "--")
        for key in sorted({k for e in phase.epochs for k in e.measured if k.endswith(what)}):
            line(axes, xs, [finite(e.measured.get(key, math.nan)) for e in phase.epochs], AFTER, 2.2, "-")
        if start:
            axes.axvline(start + 0.5, color=RULE, lw=1)
        name = str(number) if numbered else clean_text(phase.name)
        axes.text(start + len(xs) / 2 + 0.5, 1.03, name, transform=axes.get_xaxis_transform(), ha="center", color=INK)
        start += len(xs)
    axes.set_xlim(0.5, max(1.5, total + 0.5))
    axes.xaxis.set_major_locator(few_ticks(integer=True))
    axes.set_xlabel("epoch")
    axes.yaxis.grid(True, color=RULE, lw=0.7)
    if what == "accuracy":
        if chance is not None:
            axes.axhline(chance, color=BAD, lw=1, ls=(0, (1, 2)))
            axes.text(total + 0.4, chance + 0.015, "chance", color=BAD, ha="right", va="bottom", fontsize=SMALL)
        axes.set_ylim(-0.02, 1.02)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    else:
        losses = [abs(finite(e.loss)) for p in phases for e in p.epochs if math.isfinite(e.loss)]
        # Gradient ascent and random labels reach losses that would flatten everything else.
        if losses and max(losses) > 20:
            axes.set_yscale("symlog", linthresh=1)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
            axes.minorticks_off()
    return svg(figure, f"curves-{what}"), numbered


def has_losses(phases: Sequence[Phase]) -> bool:
    """Whether there is any epoch to draw."""
    return any(phase.epochs for phase in phases)


@style()
def per_class(before: Assessment, after: Assessment, names: Sequence[str]) -> tuple[str, int]:
    """Each class's accuracy before (ring) and after (dot), and how many classes are drawn.

    Of more than :data:`MOST_CLASSES` classes, those that changed most, in their own order.
    """
    pairs = [(c, b, a) for c, (b, a) in enumerate(zip(before.per_class, after.per_class, strict=True))]
    known = [(c, b, a) for c, b, a in pairs if b is not None and a is not None]
    chosen = sorted(sorted(known, key=lambda row: (-abs(row[2] - row[1]), row[0]))[:MOST_CLASSES])
    labels = [names[c] for c, _, _ in chosen]
    figure, axes = canvas(ROW * len(chosen) + 36, left=label_room(labels), right=16, top=6)
    for row, (_, b, a) in enumerate(chosen):
        axes.plot([b, a], [row, row], color=BAD if a < b - 0.1 else RULE, lw=2.2, zorder=1)
        dot(axes, b, row, BEFORE, filled=False)
        dot(axes, a, row, AFTER, filled=True, size=4.2)
    rows_axis(axes, labels)
    percent_axis(axes)
    return svg(figure, "per-class"), len(chosen)


@style()
def confusion(assessment: Assessment, names: Sequence[str], which: str) -> str:
    """The confusion matrix: a cell's darkness is its share of the true class's samples; wrong cells are red."""
    from matplotlib.patches import Rectangle

    classes = assessment.num_classes
    few = classes <= 20
    room = label_room(list(names), widest=84) if few else 34
    figure, axes = canvas(WIDTH - 10 - room + 34, left=room, right=10, top=6, bottom=28)
    totals = [0] * classes
    for true, _, count in assessment.confusion:
        totals[true] += count
    for true, answer, count in assessment.confusion:
        share = count / totals[true]
        colour = AFTER if true == answer else BAD
        # The square root keeps rare confusions visible.
        alpha = round(max(0.08, share**0.5), 3)
        axes.add_patch(Rectangle((answer - 0.5, true - 0.5), 1, 1, facecolor=colour, alpha=alpha, linewidth=0))
        if classes <= 12:
            strong = alpha > 0.62
            axes.text(
                answer, true, str(count), ha="center", va="center", fontsize=SMALL, color=PAPER if strong else INK
            )
    axes.set_xlim(-0.5, classes - 0.5)
    axes.set_ylim(classes - 0.5, -0.5)
    ticks = range(classes) if few else range(0, classes, math.ceil(classes / 10))
    axes.set_yticks(list(ticks), [clean_text(names[c], 13) if few else str(c) for c in ticks], fontsize=SMALL)
    axes.set_xticks(list(ticks), [str(c) for c in ticks], fontsize=SMALL)
    axes.set_xlabel("predicted class")
    for spine in axes.spines.values():
        spine.set_visible(True)
    return svg(figure, f"confusion-{which}")


@style()
def unit_scores(
    layers: Sequence[UnitScores], threshold: float | None, names: Sequence[str], key: str = "unit-scores"
) -> tuple[str, int]:
    """How far each unit's score lies from its layer's median, in robust deviations; flagged units are red.

    One layer of few units is drawn a row a unit. Otherwise a layer is a row: few units as dots, many as a density.
    Returns the picture, whose identifiers begin with ``key``, and how many layers are drawn (at most
    :data:`MOST_ROWS`, those with the farthest units).
    """
    if len(layers) == 1 and len(layers[0].scores) <= MOST_ROWS:
        return _units_of_one(layers[0], threshold, names, key), 1
    order = sorted(range(len(layers)), key=lambda i: (-len(layers[i].flagged), -_farthest(layers[i]), i))
    chosen = [layers[i] for i in sorted(order[:MOST_ROWS])]
    labels = [layer.layer for layer in chosen]
    height = max(ROW, 46.0 / len(chosen))
    figure, axes = canvas(height * len(chosen) + 40, left=label_room(labels), right=12, top=16)
    spread = [_signed(layer) for layer in chosen]
    finite = [v for row in spread for v in row]
    low, high = min([-1.0, *finite]), max([1.0, threshold or 0.0, *finite])
    margin = 0.04 * (high - low)
    for row, (layer, values) in enumerate(zip(chosen, spread, strict=True)):
        flagged = set(layer.flagged)
        if len(values) > _DOTS:
            _density(axes, row, [v for i, v in enumerate(values) if i not in flagged], low, high)
        for unit, value in enumerate(values):
            if unit in flagged:
                axes.plot(value, row, "o", ms=4.5, color=BAD, mec=PAPER, mew=0.6, zorder=4)
            elif len(values) <= _DOTS:
                axes.plot(value, row, "o", ms=2.8, color=MUTED, alpha=0.55, mew=0)
    rows_axis(axes, labels)
    axes.set_xlim(low - margin, high + margin)
    axes.set_xlabel("robust deviations from the layer's median")
    _threshold_line(axes, threshold)
    return svg(figure, key), len(chosen)


@style()
def weight_changes(changes: Sequence[WeightChange]) -> tuple[str, int]:
    """‖W₁ − W₀‖ / ‖W₀‖ of the weight tensors (two axes or more) in depth order, and how many are drawn."""
    weights = [(i, c) for i, c in enumerate(changes) if not c.buffer and len(c.shape) >= 2 and c.relative is not None]
    largest = sorted(weights, key=lambda item: -(item[1].relative or 0.0))[:MOST_ROWS]
    chosen = [c for _, c in sorted(largest, key=lambda item: item[0])]
    labels = [c.name.removesuffix(".weight") for c in chosen]
    figure, axes = canvas(ROW * len(chosen) + 40, left=label_room(labels), right=44, top=6)
    for row, change in enumerate(chosen):
        value = change.relative or 0.0
        axes.plot([0, value], [row, row], color=AFTER, lw=1.6, alpha=0.45, solid_capstyle="butt")
        dot(axes, value, row, AFTER, filled=True, size=4.2)
        axes.annotate(
            short(value), (value, row), (6, 0), textcoords="offset points", va="center", color=MUTED, fontsize=SMALL
        )
    rows_axis(axes, labels)
    axes.set_xlim(0, max([1e-6, *((c.relative or 0.0) for c in chosen)]) * 1.04)
    axes.set_xlabel("relative change (L2)")
    axes.xaxis.set_major_locator(few_ticks())
    return svg(figure, "weights"), len(chosen)


def _units_of_one(layer: UnitScores, threshold: float | None, names: Sequence[str], key: str) -> str:
    scores = [finite(s) for s in layer.scores]
    labels = list(names) if len(names) == len(scores) else [f"unit {i}" for i in range(len(scores))]
    figure, axes = canvas(ROW * len(scores) + 54, left=label_room(labels), right=16, top=18)
    flagged = set(layer.flagged)
    axes.axvline(layer.median, color=MUTED, lw=1)
    for row, score in enumerate(scores):
        colour = BAD if row in flagged else AFTER
        axes.plot([layer.median, score], [row, row], color=colour, lw=1.6, alpha=0.6, solid_capstyle="butt")
        dot(axes, score, row, colour, filled=True, size=6 if row in flagged else 4.2)
    rows_axis(axes, labels)
    axes.xaxis.set_major_locator(few_ticks())
    axes.set_xlabel("weight change under unlearning")
    limit = None if threshold is None else layer.median + threshold * 1.4826 * layer.mad
    _threshold_line(axes, limit)
    axes.text(
        layer.median,
        1.02,
        "median ",
        transform=axes.get_xaxis_transform(),
        ha="right" if limit is not None else "center",
        va="bottom",
        color=MUTED,
        fontsize=SMALL,
    )
    return svg(figure, key)


def _threshold_line(axes: Axes, at: float | None) -> None:
    if at is None or not math.isfinite(at):
        return
    axes.axvline(at, color=BAD, lw=1, ls=(0, (3, 2)))
    low, high = axes.get_xlim()
    side: Literal["left", "right", "center"] = "left" if at < (low + high) / 2 else "right"
    axes.text(
        at,
        1.02,
        " threshold" if side == "left" else "threshold ",
        transform=axes.get_xaxis_transform(),
        ha=side,
        va="bottom",
        color=BAD,
        fontsize=SMALL,
    )


def _density(axes: Axes, row: int, values: Sequence[float], low: float, high: float) -> None:
    from matplotlib.patches import Rectangle

    step = (high - low) / _BINS or 1.0
    counts = [0] * _BINS
    for value in values:
        counts[min(_BINS - 1, max(0, int((value - low) / step)))] += 1
    most = max(counts, default=0)
    for index, count in enumerate(counts):
        if count:
            alpha = round(0.12 + 0.7 * (count / most) ** 0.5, 2)
            axes.add_patch(
                Rectangle((low + index * step, row - 0.36), step, 0.72, facecolor=AFTER, alpha=alpha, linewidth=0)
            )


def _signed(layer: UnitScores) -> list[float]:
    """Deviations with the sign of score − median. What is not finite is drawn at the farthest finite one."""
    far = max((abs(d) for d in layer.deviations if math.isfinite(d)), default=1.0)
    both = zip(layer.scores, layer.deviations, strict=True)
    return [math.copysign(abs(d) if math.isfinite(d) else far, s - layer.median) for s, d in both]


def _farthest(layer: UnitScores) -> float:
    return max((abs(v) for v in _signed(layer)), default=0.0)
