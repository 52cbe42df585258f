"""Every defense on the CIFAR-10 victims of ``attack_table.py``, beside the means that a public leaderboard gives.

    python benchmarks/defense_table.py cells --data-root DATA --out runs                # clean what is missing
    python benchmarks/defense_table.py cells --out runs --methods anp fst --budgets 0.05
    python benchmarks/defense_table.py published --leaderboard CSV                      # -> benchmarks/records
    python benchmarks/defense_table.py collect --out runs                               # -> benchmarks/records
    python benchmarks/defense_table.py table --write docs/results.md                    # records -> Markdown

Victims whose attack did not take are left out. ``--part I/N`` shares the work between single-threaded processes. The
leaderboard's file has the columns dataset, poison_ratio, model, attack, defense, acc, asr and ra, in percent.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from attack_table import ATTACKS
from auto_split import JUDGED_ON
from unbackdoor import specs
from unbackdoor.data.named import dataset_info
from unbackdoor.evaluation.metrics import der
from victim_runs import Cell, markdown, part, read_records, run_cell, run_cells, show, write_records

SETTING = "cifar10"
#: Adaptive attacks have a table of their own.
ADAPTIVE = ("entangled", "uniform_row", "ewc", "latent", "parameter_stealth")
#: Lengths that suit a network of this size where the default's are those of large ones.
LENGTHS = {"ft": {"epochs": 20}}
#: Forms beside the default; of our own method, what is left of it without its triggers.
MORE = ("ulrl(preset=authors-v1)", "inoculation(triggered=0)")

#: The leaderboard's names, and which of its defenses were tuned with knowledge of the trigger.
PUBLISHED_METHODS = {
    "ft": "FT",
    "fp": "FP",
    "nad": "NAD",
    "nc": "NC",
    "anp": "ANP",
    "clp": "CLP",
    "ibau": "i-BAU",
    None: "No Defense",
}
PUBLISHED_ATTACKS = {
    "badnets": "BadNet",
    "blended": "Blended",
    "bpp": "BPP",
    "input_aware": "InputAware",
    "low_frequency": "LF",
    "ssba": "SSBA",
    "trojannn": "TrojanNN",
    "wanet": "WaNet",
}
ORACLES = ("anp",)


def method_texts(names: Iterable[str]) -> list[str]:
    """Each method at its defaults, with the augmentation that suits the data and a length that suits the network."""
    augment, texts = dataset_info(SETTING).augmentation, []
    for text in (*names, *(m for m in MORE if specs.parse(m)[0] in names)):
        name, given = specs.parse(text)
        fields = {f.name for f in dataclasses.fields(specs.lookup("defense", name))}
        extra = LENGTHS.get(name, {}) if not given else {}
        settings = {**given, **extra, **({"augment": augment} if "augment" in fields else {})}
        texts.append(f"{name}({', '.join(f'{k}={v}' for k, v in settings.items())})" if settings else name)
    return texts


def planned(names: Iterable[str], budgets: Iterable[float], seeds: int) -> Iterator[Cell]:
    """All cells: one seed for everything first."""
    names = list(names)
    for seed in range(seeds):
        for budget in budgets:
            for attack in ATTACKS:
                if attack is None or specs.parse(attack)[0] not in ADAPTIVE:
                    for method in method_texts(names):
                        yield Cell(setting=SETTING, attack=attack, method=method, budget=budget, seed=seed)


def cells(arguments: argparse.Namespace) -> None:
    wanted = list(planned(arguments.methods, arguments.budgets, arguments.seeds))
    run_cells(part(wanted, arguments.part), Path(arguments.out), arguments.data_root, run_cell)


def collect(arguments: argparse.Namespace) -> None:
    """The cells as a JSON-lines file, which is what is committed."""
    names = {f"{cell.name}.json" for cell in planned(arguments.methods, arguments.budgets, arguments.seeds)}
    found = (json.loads(p.read_text()) for p in (Path(arguments.out) / "cells").glob("*.json") if p.name in names)
    write_records(Path(arguments.records) / "defense_table.jsonl", found)


def published(arguments: argparse.Namespace) -> None:
    """The leaderboard's cells of the same data set and rate and of the full-width network, in its own names."""
    with Path(arguments.leaderboard).open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if (r["dataset"], r["model"]) == ("cifar10", "PreActResNet-18")]
    kept = [
        {"attack": r["attack"], "defense": r["defense"], **{k: float(r[k]) for k in ("acc", "asr", "ra")}}
        for r in rows
        if float(r["poison_ratio"]) == 0.1
        and r["defense"] in PUBLISHED_METHODS.values()
        and r["attack"] in PUBLISHED_ATTACKS.values()
    ]
    write_records(Path(arguments.records) / "published.jsonl", kept)


HEADS = (
    "method",
    "victims",
    "ACC",
    "ASR",
    "RA",
    "DER",
    "lost on a clean network",
    "s",
    "MiB",
    "published ACC/ASR/RA/DER",
)


def tables(records: Path) -> dict[str, str]:
    """For each budget the means over victims, and below them the ASR left on each victim."""
    rows, leaderboard = read_records(records / "defense_table.jsonl"), read_records(records / "published.jsonl")
    made = []
    for budget in sorted({r["budget"] for r in rows}):
        of_budget = [r for r in rows if r["budget"] == budget]
        methods = sorted({r["method"] for r in of_budget})
        summary = (summary_row(m, [r for r in of_budget if r["method"] == m], leaderboard) for m in methods)
        attacks = [a for a in ATTACKS if a is not None and any(r["attack"] == a for r in of_budget)]
        each = (victim_row(a, [r for r in of_budget if r["attack"] == a], methods) for a in attacks)
        unseen = [r for r in of_budget if r["attack"] is not None and specs.parse(r["attack"])[0] in JUDGED_ON]
        judged = (
            summary_row(m, rows, leaderboard) for m in methods if (rows := [r for r in unseen if r["method"] == m])
        )
        made += [
            f"**{budget:.0%} clean samples.** Means over the victims.",
            markdown(HEADS, summary),
            "Means over the attacks alone that our own method was not developed on.",
            markdown(HEADS, judged),
            "ASR left on each victim.",
            markdown(("victim", "before", *(f"`{m}`" for m in methods)), each),
        ]
    return {"defenses": "\n\n".join(made)}


def mean(rows: list[dict[str, Any]], name: str) -> float:
    """Over victims, of the means over seeds: a victim with more seeds counts no more."""
    by_victim: dict[str | None, list[float]] = {}
    for row in rows:
        by_victim.setdefault(row["attack"], []).append(row[name])
    return statistics.fmean(statistics.fmean(values) for values in by_victim.values())


def summary_row(method: str, rows: list[dict[str, Any]], leaderboard: list[dict[str, Any]]) -> list[str]:
    done = [r for r in rows if "error" not in r]
    poisoned, clean = [r for r in done if r["attack"] is not None], [r for r in done if r["attack"] is None]
    lost = f"{100 * (mean(clean, 'acc_before') - mean(clean, 'acc_after')):.1f}" if clean else "–"
    if not poisoned:
        failed = next((f"failed: {r['error']}" for r in rows if "error" in r), "–")
        return [f"`{method}`", "0", failed, *["–"] * 3, lost, *["–"] * 3]
    for row in poisoned:
        row["der"] = der(row["acc_before"], row["asr_before"], row["acc_after"], row["asr_after"])
    rates = [f"{100 * mean(poisoned, name):.1f}" for name in ("acc_after", "asr_after", "ra_after", "der")]
    seconds, memory = mean(done, "seconds"), max(r["peak_memory_mib"] for r in done)
    victims = len({r["attack"] for r in poisoned})
    return [f"`{method}`", str(victims), *rates, lost, f"{seconds:.0f}", str(memory), reported(method, leaderboard)]


def reported(method: str, leaderboard: list[dict[str, Any]]) -> str:
    """The leaderboard's means for a method in its default form."""
    name, given = specs.parse(method)
    theirs = PUBLISHED_METHODS.get(name)
    if theirs is None or "preset" in given:
        return "–"
    before = {r["attack"]: r for r in leaderboard if r["defense"] == PUBLISHED_METHODS[None]}
    after = [r for r in leaderboard if r["defense"] == theirs and r["attack"] in before]
    if not after:
        return "–"
    rates = [statistics.fmean(r[k] for r in after) for k in ("acc", "asr", "ra")]
    scores = []
    for row in after:
        was = before[row["attack"]]
        scores.append(100 * der(was["acc"] / 100, was["asr"] / 100, row["acc"] / 100, row["asr"] / 100))
    oracle = " (oracle)" if name in ORACLES else ""
    return " / ".join(f"{value:.1f}" for value in (*rates, statistics.fmean(scores))) + oracle


def victim_row(attack: str, rows: list[dict[str, Any]], methods: list[str]) -> list[str]:
    done = [r for r in rows if "error" not in r]
    before = f"{100 * mean(done, 'asr_before'):.1f}" if done else "–"
    found = ([r for r in done if r["method"] == m] for m in methods)
    return [f"`{attack}`", before, *(f"{100 * mean(rs, 'asr_after'):.1f}" if rs else "–" for rs in found)]


def table(arguments: argparse.Namespace) -> None:
    show(tables(Path(arguments.records)), arguments.write)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = {"cells": cells, "published": published, "collect": collect, "table": table}
    parser.add_argument("stage", choices=list(stages))
    parser.add_argument("--data-root", default=os.environ.get("UNBACKDOOR_DATA"))
    parser.add_argument("--out", default="runs")
    parser.add_argument("--records", default=str(Path(__file__).parent / "records"))
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into a page, instead of printing")
    parser.add_argument("--leaderboard", type=Path, metavar="CSV", help="of 'published'")
    parser.add_argument("--methods", nargs="+", default=specs.names("defense"), choices=specs.names("defense"))
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.05, 0.01])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--part", default="0/1", help="I/N: every N-th item, starting with the I-th")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.stage == "published" and arguments.leaderboard is None:
        parser.error("published needs --leaderboard CSV")
    torch.set_num_threads(arguments.threads)
    stages[arguments.stage](arguments)


if __name__ == "__main__":
    main()
