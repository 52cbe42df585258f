"""What the page's script works on: the board as plain JSON, with every text that the script would have to invent."""

from __future__ import annotations

import math
from typing import Any

from unbackdoor import specs
from unbackdoor.bench.intervals import Estimate, quantile
from unbackdoor.bench.records import CellRecord, Provenance
from unbackdoor.bench.standings import Arena, Board, Row
from unbackdoor.errors import ConfigError
from unbackdoor.report.leaderboard import wording as w
from unbackdoor.report.leaderboard.flat import flat
from unbackdoor.report.leaderboard.marks import COVERAGE, all_marks, of_row

#: Colours that are easy to tell apart; defenses beyond the best so many share a quiet one.
COLOURS = 8
#: Marks of the forms of one defense, which share its colour; further ones take turns.
SHAPES = ("circle", "square", "triangle", "diamond", "point", "plus", "star")

#: Degrees of freedom that the script has Student's quantile for; beyond, a series gives it to eight digits.
_MOST_FREEDOM = 200
_ESTIMATES = ("accuracy", "lost", "asr", "ra", "der", "seconds")
#: What can be filtered by: a row's field, and what the page calls it.
_FACETS = (
    ("dataset", "data set"),
    ("arch", "network"),
    ("attack", "attack"),
    ("rate_text", "rate"),
    ("budget", "budget"),
    ("defense", "defense"),
)


def content(board: Board) -> dict[str, Any]:
    """Plain data: dicts, lists, texts without control characters, finite numbers and None."""
    arenas = board.arenas
    provenance: dict[str, int] = {}
    rows = [_row(row, arenas, provenance) for row in (*board.baselines, *board.rows)]
    return {
        "quantiles": [quantile(freedom) for freedom in range(1, _MOST_FREEDOM + 1)],
        "arenas": [_arena(board, arena) for arena in arenas],
        "defenses": _defenses(board),
        "no_defense": w.NO_DEFENSE,
        "marks": {
            m.name: {"letter": m.letter, "text": m.text, "serious": m.serious} for m in all_marks(board).values()
        },
        "coverage": COVERAGE,
        "facets": [{"field": field, "label": label, "values": _values(rows, field)} for field, label in _FACETS],
        "columns": list(flat(board.baselines[0])),
        "rows": rows,
        "provenance": list(provenance),
    }


def _arena(board: Board, arena: Arena) -> dict[str, Any]:
    share = f"{w.share(arena.share)} clean samples" if arena.share is not None else ""
    each = w.each_class(arena.per_class)
    return {
        "place": w.place(arena.dataset, arena.arch),
        "budget": f"{share}, {arena.per_class:,} a class" if share else each,
        "labels": _short_names([s.defense for s in board.standings if s.arena == arena and s.defense is not None]),
    }


def _short_names(defenses: list[str]) -> dict[str, str]:
    """Defense -> the shortest name that tells it from the others: "seam", "seam plain", or all of its settings."""
    short = {text: _with_preset(text) for text in defenses}
    names = list(short.values())
    return {w.defense(t): w.clean(name if names.count(name) == 1 else t) for t, name in short.items()}


def _with_preset(text: str) -> str:
    try:
        name, settings = specs.parse(text)
    except ConfigError:
        return text
    return f"{name} {settings['preset']}" if "preset" in settings else name


def _defenses(board: Board) -> dict[str, dict[str, Any]]:
    """Defense -> its name, colour (−1: the quiet one) and shape. The best get the colours, whatever is shown."""
    ratings: dict[str, list[float]] = {}
    forms: dict[str, dict[str, str]] = {}
    for s in board.standings:
        if s.defense is None:
            continue
        name, text = w.clean(s.defense.partition("(")[0]), w.defense(s.defense)
        ratings.setdefault(name, []).append(s.der.mean if s.der and s.victims == s.possible else 0.0)
        forms.setdefault(name, {})[text] = w.clean(_with_preset(s.defense))
    best = sorted(ratings, key=lambda name: (-sum(ratings[name]) / len(ratings[name]), name))
    colours = {name: i if i < COLOURS else -1 for i, name in enumerate(best)}
    made = {}
    for name in best:
        # A form is a preset: what else differs, such as the augmentation that suits a data set, is no other mark.
        order = sorted(set(forms[name].values()), key=lambda form: (len(form), form))
        for text, form in forms[name].items():
            made[text] = {"name": name, "colour": colours[name], "shape": SHAPES[order.index(form) % len(SHAPES)]}
    return made


def _row(row: Row, arenas: tuple[Arena, ...], provenance: dict[str, int]) -> dict[str, Any]:
    arena, victim = row.arena, row.victim
    identity = [*victim, row.defense, row.per_class, row.share]
    return {
        **flat(row),
        "id": specs.key(identity)[:10],
        "arena": None if arena is None else arenas.index(arena),
        "place": w.place(victim.dataset, victim.arch),
        "arch": None if victim.arch is None else w.clean(victim.arch),
        "rate_text": None if victim.rate is None else w.share(victim.rate),
        "budget": None if row.per_class is None else w.budget(row.per_class, row.share),
        "baseline": row.defense is None,
        "clean": victim.clean,
        "given": bool(victim.given),
        "counted": row.counted,
        "seeds": w.seeds(row),
        "why": "" if row.status == "done" else w.why(row),
        "published": "" if row.published is None else w.published(row),
        "published_note": "" if row.published is None else w.clean(row.published.note),
        "published_on": "" if row.published is None else w.clean(row.published.arch),
        "marks": list(of_row(row)),
        "estimates": {name: _estimate(getattr(row, name)) for name in _ESTIMATES},
        "records": [_run(run, provenance) for run in row.runs],
    }


def _estimate(found: Estimate | None) -> list[float | None] | None:
    return None if found is None else [found.mean, found.half, found.count]


def _run(run: CellRecord, provenance: dict[str, int]) -> dict[str, Any]:
    """What the details of a row show of each run."""
    made: dict[str, Any] = {
        "key": run.key,
        "seed": run.seed,
        "network": run.subject.seed,
        "name": w.clean(run.subject.name),
        "status": run.status,
        "reason": None if run.reason is None else w.clean(run.reason),
        "flags": [w.clean(flag).replace("_", " ") for flag in run.flags],
        "where": provenance.setdefault(_where(run.provenance), len(provenance)),
    }
    if run.result is not None:
        before, after = run.result.before, run.result.after
        made |= {
            "accuracy": [_finite(before.accuracy), _finite(after.accuracy)],
            "asr": [_finite(before.asr), _finite(after.asr)],
            "ra": [_finite(before.ra), _finite(after.ra)],
            "der": _finite(run.result.der),
            "seconds": _finite(run.result.seconds),
            "images": run.result.images,
            "memory": _finite(run.result.peak_memory_mib),
            "values": {w.clean(k): w.clean(_value(v)) for k, v in run.result.values.items()},
            "notes": [w.clean(note) for note in run.result.notes],
        }
    return made


def _where(p: Provenance) -> str:
    """Versions and machine, as far as they are known."""
    threads = "1 thread" if p.threads == 1 else f"{p.threads} threads"
    parts = {"unbackdoor": p.unbackdoor, "torch": p.torch, "Python": p.python, "on": p.device, "hardware": p.hardware}
    known = [f"{name} {value}" for name, value in parts.items() if value != w.UNKNOWN]
    unknown = [name for name, value in parts.items() if value == w.UNKNOWN]
    rest = f"; not recorded: {', '.join(unknown)}" if unknown else ""
    return w.clean(", ".join([*known, threads]) + rest)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _values(rows: list[dict[str, Any]], field: str) -> list[str]:
    """What a field is in any row, numbers by their size; the victims as they were are no defense to choose."""
    found = {row[field] for row in rows if row[field] is not None and not (field == "defense" and row["baseline"])}
    return sorted(found, key=_by_size)


def _by_size(text: str) -> tuple[float, str]:
    number = text.partition("%")[0].partition(" ")[0].replace(",", "")
    try:
        return float(number), text
    except ValueError:
        return 0.0, text.casefold()
