"""What attackers who know the defenses gain: removals of their victims beside those of the plain attack's.

    python benchmarks/adaptive_table.py victims --data-root DATA --out runs     # plant what is missing
    python benchmarks/adaptive_table.py cells   --data-root DATA --out runs     # clean what is missing
    python benchmarks/adaptive_table.py collect --out runs                      # -> benchmarks/records
    python benchmarks/adaptive_table.py table --write docs/attacks.md           # records -> Markdown

The adaptive victims carry the plain one's trigger and poisoned samples. A row "polluted" is the plain victim, cleaned
with a clean set of which a share carries the trigger and the attacker's label. After each removal the attacker tries to
have the backdoor back: by fine-tuning on the clean samples with a few poisoned ones among them, and by a universal
perturbation on top of the trigger (8/255, with the weights), beside which stands what that perturbation does without
the trigger. ``--part I/N`` shares the work between single-threaded processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unbackdoor.evaluation.reactivation import polluted, reactivate, retune
from unbackdoor.rng import Rng
from unbackdoor.types import Attack, Samples
from victim_runs import (
    Cell,
    halves,
    markdown,
    methods,
    part,
    plant_missing,
    read_records,
    remove,
    run_cells,
    show,
    took,
    victim_folder,
    write_records,
)

SETTING, BUDGET = "mnist", 0.01
PLAIN = "badnets(rate=0.1, target=0)"
ADAPTIVE = ("entangled", "uniform_row", "ewc", "latent", "parameter_stealth")
#: Shares of the defender's samples.
POLLUTION = (0.01, 0.04)
#: Beside the usual methods: the published form of the one that ``ewc`` is made against.
PUBLISHED = "seam(preset=authors-cifar10)"
#: Poisoned samples among those that a cleaned network is fine-tuned on.
RETUNED = (0, 5, 50)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial(Cell):
    """A cell whose clean set may be spoilt."""

    polluted: float = 0.0


def planned(seeds: int) -> Iterator[Trial]:
    victims = [(PLAIN, 0.0), *((attack, 0.0) for attack in ADAPTIVE), *((PLAIN, share) for share in POLLUTION)]
    for seed in range(seeds):
        for attack, share in victims:
            for method in (*methods(SETTING), PUBLISHED):
                yield Trial(setting=SETTING, attack=attack, method=method, budget=BUDGET, seed=seed, polluted=share)


def run(trial: Trial, model: nn.Module, attack: Attack, test: Samples, train_size: int) -> dict[str, Any]:
    """Clean, measure, and let the attacker try again."""
    rng, (_, judged) = Rng(trial.seed), halves(test)

    def spoil(clean: Samples) -> Samples:
        return polluted(clean, attack, trial.polluted, rng.child("pollute")) if trial.polluted else clean

    record, removal, clean = remove(trial, model, attack, test, train_size, spoil)
    if removal is None:
        return record
    retuned = retune(removal.model, attack, clean, judged, rng.child("retune"), counts=RETUNED)
    again = reactivate(removal.model, attack, clean, judged, rng.child("reactivate"))
    return record | {
        "retuned": {str(r.poisoned): r.asr.value for r in retuned},
        "reactivated": again.asr.value,
        "reactivated_alone": again.asr_alone.value,
    }


def victims(arguments: argparse.Namespace) -> None:
    for attack in part([PLAIN, *ADAPTIVE], arguments.part):
        plant_missing(SETTING, attack, arguments.data_root, Path(arguments.out))


def cells(arguments: argparse.Namespace) -> None:
    trials = part(list(planned(arguments.seeds)), arguments.part)
    run_cells(trials, Path(arguments.out), arguments.data_root, run, "adaptive")


def collect(arguments: argparse.Namespace) -> None:
    """Cells and cards as JSON-lines files, which are what is committed."""
    out, records = Path(arguments.out), Path(arguments.records)
    write_records(
        records / "adaptive_table.jsonl", (json.loads(p.read_text()) for p in (out / "adaptive").glob("*.json"))
    )
    cards = [victim_folder(out, SETTING, attack) / "victim.json" for attack in (PLAIN, *ADAPTIVE)]
    found = (json.loads(card.read_text()) for card in cards if card.is_file())
    write_records(records / "adaptive_table_victims.jsonl", found)


HEADS = ("victim", "method", "seeds", "ACC after", "ASR after", *(f"retuned on {n}" for n in RETUNED), "woken", "alone")


def tables(records: Path) -> dict[str, str]:
    """The victims, and below them what each method made of them and what the attacker made of that."""
    rows, cards = (read_records(records / f"adaptive_table{end}.jsonl") for end in ("", "_victims"))
    order = (PLAIN, *ADAPTIVE)
    groups: dict[tuple[int, float, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((order.index(row["attack"]), row["polluted"], row["method"]), []).append(row)
    cleaned = []
    for (index, share, method), found in sorted(groups.items()):
        name = f"`{order[index]}`" + (f", {share:.0%} polluted" if share else "")
        cleaned.append(table_row(name, method, found))
    planted = map(victim_row, sorted(cards, key=lambda c: order.index(c["attack"])))
    return {
        "adaptive": "\n\n".join((markdown(("victim", "ACC", "ASR", "planted in s"), planted), markdown(HEADS, cleaned)))
    }


def victim_row(card: dict[str, Any]) -> list[str]:
    asr = f"{100 * card['asr']:.1f}" + ("" if took(card["asr"]) else " (did not take)")
    return [f"`{card['attack']}`", f"{100 * card['accuracy']:.1f}", asr, f"{card['seconds']:.0f}"]


def table_row(name: str, method: str, rows: list[dict[str, Any]]) -> list[str]:
    """The cells of one line: means over seeds, and the lowest and highest."""
    done = [r for r in rows if "error" not in r]
    if not done:
        return [name, f"`{method}`", "0", f"failed: {rows[0]['error']}", *[""] * (len(HEADS) - 4)]

    def shown(values: list[float]) -> str:
        mean = f"{100 * statistics.fmean(values):.1f}"
        return mean if len(values) == 1 else f"{mean} ({100 * min(values):.0f}–{100 * max(values):.0f})"

    columns = [
        [r["acc_after"] for r in done],
        [r["asr_after"] for r in done],
        *([r["retuned"][str(n)] for r in done] for n in RETUNED),
        [r["reactivated"] for r in done],
        [r["reactivated_alone"] for r in done],
    ]
    return [name, f"`{method}`", str(len(done)), *map(shown, columns)]


def table(arguments: argparse.Namespace) -> None:
    show(tables(Path(arguments.records)), arguments.write)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = {"victims": victims, "cells": cells, "collect": collect, "table": table}
    parser.add_argument("stage", choices=list(stages))
    parser.add_argument("--data-root", default=os.environ.get("UNBACKDOOR_DATA"))
    parser.add_argument("--out", default="runs")
    parser.add_argument("--records", default=str(Path(__file__).parent / "records"))
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into a page, instead of printing")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--part", default="0/1", help="I/N: every N-th item, starting with the I-th")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    stages[arguments.stage](arguments)


if __name__ == "__main__":
    main()
