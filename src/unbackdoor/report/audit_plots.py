"""The figures of an audit: the score of each class, and how each kind of evidence sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from unbackdoor.report.canvas import (
    AFTER,
    BAD,
    INK,
    ROW,
    SMALL,
    canvas,
    dot,
    few_ticks,
    label_room,
    rows_axis,
    style,
    svg,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Classes drawn one by one; the table holds all.
MOST_CLASSES = 24


def shown_classes(scores: Sequence[float]) -> list[int]:
    """The classes that are drawn: all, or those with the highest scores, in their own order."""
    return sorted(sorted(range(len(scores)), key=lambda c: -scores[c])[:MOST_CLASSES])


@style()
def scores(values: Sequence[float], names: Sequence[str], suspect: int, threshold: float, name: str) -> str:
    """A bar a class, and the threshold; the suspected class is red where its bar goes beyond it."""
    chosen = shown_classes(values)
    figure, axes = canvas(ROW * len(chosen) + 54, left=label_room([names[c] for c in chosen]), right=16, top=18)
    _bars(axes, [values[c] for c in chosen], [c == suspect and values[c] > threshold for c in chosen])
    rows_axis(axes, [names[c] for c in chosen])
    axes.axvline(threshold, color=BAD, lw=1, ls=(0, (3, 2)))
    above = axes.get_xaxis_transform()
    axes.text(threshold, 1.02, "threshold", transform=above, ha="center", va="bottom", color=BAD, fontsize=SMALL)
    axes.xaxis.set_major_locator(few_ticks())
    axes.set_xlabel("score")
    return svg(figure, name)


@style()
def figures(kind: str, values: Sequence[float], chosen: Sequence[int], names: Sequence[str], suspect: int) -> str:
    """A bar a class for one kind of evidence: to the right of 0 is the suspicious side."""
    figure, axes = canvas(ROW * len(chosen) + 44, left=label_room([names[c] for c in chosen]), right=16, top=6)
    _bars(axes, [values[c] for c in chosen], [c == suspect for c in chosen])
    rows_axis(axes, [names[c] for c in chosen])
    axes.xaxis.set_major_locator(few_ticks())
    axes.set_xlabel("logarithm of the ratio to the other classes")
    return svg(figure, f"audit-{kind}")


def _bars(axes: Axes, values: Sequence[float], red: Sequence[bool]) -> None:
    axes.axvline(0, color=INK, lw=0.8)
    for row, (value, bad) in enumerate(zip(values, red, strict=True)):
        colour = BAD if bad else AFTER
        axes.plot([0, value], [row, row], color=colour, lw=1.6, alpha=0.6, solid_capstyle="butt")
        dot(axes, value, row, colour, filled=True, size=6 if bad else 4.2)
