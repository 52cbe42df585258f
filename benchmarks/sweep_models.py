"""Many small victims, planted and cleaned in one sweep that is killed on the way, and what is there at the end.

    python benchmarks/sweep_models.py run --models 10 --kills 0 --out runs/models-10
    python benchmarks/sweep_models.py run --models 100 --kills 0 --out runs/models-100
    python benchmarks/sweep_models.py run --models 1000 --out runs/models-1000
    python benchmarks/sweep_models.py collect runs/models-10 runs/models-100 runs/models-1000
    python benchmarks/sweep_models.py table --write docs/benchmark.md

Victims are scikit-learn's digits with mixed attacks and a seed each, cleaned by SEAM and ULRL from ten samples of each
class. The sweep runs in processes of its own; ``--kills`` times, spread over it, all of them are ended by SIGKILL and
the sweep is started again. At the end each cell has exactly one record, or the script says which has not. Time that
the sweep spends on starting again, and on what a kill had half done, is counted in.

Memory is that of the whole sweep: the proportional set sizes of its processes, asked for every few seconds. That it is
flat is seen from its mean early (from the first to the second tenth of the time) and late (the last tenth).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unbackdoor.bench.executors import processes
from unbackdoor.bench.plan import Graph, Plan, graph_of
from unbackdoor.bench.records import CellRecord
from unbackdoor.bench.site import Site
from unbackdoor.bench.store import Store
from unbackdoor.bench.sweep import sweep
from unbackdoor.data.named import dataset_info
from unbackdoor.files import write
from victim_runs import markdown, read_records, show, write_records

#: Contaminated data and, the last two, manipulated training; each takes on digits at these settings.
ATTACKS = (
    "badnets(size=2)",
    "badnets(size=2, target=3, rate=0.05)",
    "badnets(size=2, labels=all-to-all)",
    "blended(target=5)",
    "blended(alpha=0.3, rate=0.05)",
    "tact",
    "blind",
    "wanet(s=2, rate=0.2, cross_ratio=0)",
)
DEFENSES = ("seam(recover_images=8000)", "ulrl")
PER_CLASS = 10
#: Seconds between two looks at the memory and at how far the sweep is.
LOOK = 2.0
#: What a sweep leaves beside its store's own files.
FIGURES = "figures.json"


def planned(models: int) -> Graph:
    """``models`` victims, the attacks in turn and a seed for each round of them; two cells each."""
    whole, rest = divmod(models, len(ATTACKS))
    plans = []
    for attacks, seeds in ((ATTACKS, range(whole)), (ATTACKS[:rest], range(whole, whole + 1))):
        if attacks and seeds:
            # What did not take is cleaned too: here it is the sweep that is judged.
            plan = Plan(attacks=attacks, defenses=DEFENSES, per_class=[PER_CLASS], victim_seeds=seeds, min_asr=0.0)
            plans.append(plan)
    return graph_of(plans, lambda name: dataset_info(name).train_count)


def work(arguments: argparse.Namespace) -> None:
    """The sweep itself, in a process group of its own."""
    site = Site(store=str(Path(arguments.out).resolve()), device="cpu", threads=1)
    sweep(planned(arguments.models), site, processes(arguments.workers))


@dataclass
class Watched:
    """What was seen of the sweep: (seconds since the start, MiB) and when it was killed."""

    memory: list[tuple[float, float]] = field(default_factory=list)
    kills: list[dict[str, Any]] = field(default_factory=list)


def run(arguments: argparse.Namespace) -> None:
    graph, out = planned(arguments.models), Path(arguments.out)
    wanted = {cell.key for cell in graph.cells}
    store = Store(out)
    if store.keys() or any(store.victims.iterdir()):
        raise SystemExit(f"{out} holds results already; a sweep that is measured starts from nothing")
    seen, began = Watched(), time.perf_counter()
    total = len(graph.cells) + len(graph.victims)
    # Spread over the whole of it, from the planting on.
    limits = [total * (i + 1) // (arguments.kills + 1) for i in range(arguments.kills)]
    while True:
        goal = limits[len(seen.kills)] if len(seen.kills) < len(limits) else None
        if watch(arguments, store, began, seen, goal):
            break
    seconds = time.perf_counter() - began
    report(arguments, graph, store, seen, seconds)
    missing = wanted - store.keys()
    if missing or store.keys() - wanted:
        raise SystemExit(f"{len(missing)} cells have no record, {len(store.keys() - wanted)} records no cell")


def watch(arguments: argparse.Namespace, store: Store, began: float, seen: Watched, goal: int | None) -> bool:
    """Start the sweep and look on until it is done (True), or until ``goal`` jobs are and it is killed (False)."""
    command = [sys.executable, __file__, "work", "--out", arguments.out, "--models", str(arguments.models)]
    command += ["--workers", str(arguments.workers)]
    running = subprocess.Popen(command, start_new_session=True)
    try:
        while running.poll() is None:
            time.sleep(LOOK)
            now = time.perf_counter() - began
            held = memory_mib(running.pid)
            if held is not None:
                seen.memory.append((now, held))
            done = len(store.keys()) + sum(1 for _ in store.victims.glob("[!.]*"))
            if goal is not None and done >= goal:
                os.killpg(running.pid, signal.SIGKILL)
                running.wait()
                whole = sum(1 for _ in store.records())  # every record there can be read
                seen.kills.append({"after_seconds": round(now), "jobs_done": done, "records": whole})
                print(f"killed after {now:.0f} s, with {done} of the jobs done", flush=True)
                return False
    finally:
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    if running.returncode != 0:
        raise SystemExit(f"the sweep ended with exit code {running.returncode}")
    return True


def memory_mib(group: int) -> float | None:
    """What the processes of a group hold together: memory that they share counts once. Linux alone tells."""
    total, found = 0, False
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with suppress(OSError, ValueError):
            if os.getpgid(int(folder.name)) == group:
                pss = re.search(r"^Pss:\s+(\d+) kB", (folder / "smaps_rollup").read_text(), re.MULTILINE)
                if pss:
                    total, found = total + int(pss[1]), True
    return total / 1024 if found else None


def report(arguments: argparse.Namespace, graph: Graph, store: Store, seen: Watched, seconds: float) -> None:
    records = [store.record(cell.key) for cell in graph.cells if store.has(cell.key)]
    content = {
        "models": len(graph.victims),
        "cells": len(graph.cells),
        "records": len(store.keys()),
        "status": dict(Counter(r.status for r in records)),
        "workers": arguments.workers,
        "seconds": round(seconds, 1),
        "models_per_hour": round(3600 * len(graph.victims) / seconds, 1),
        "kills": seen.kills,
        "seconds_of_defenses_and_planting": round(busy_seconds(records), 1),
        **memory_of(seen.memory),
        "attacks_that_took": sum({r.subject.key: (r.subject.asr or 0) >= 0.8 for r in records}.values()),
        "asr_left": {name: mean_asr(records, name) for name in DEFENSES},
        "hardware": records[0].provenance.hardware,
        "commit": records[0].provenance.commit,
        "torch": records[0].provenance.torch,
    }
    text = json.dumps(content, indent=1) + "\n"
    print(text)
    write(Path(arguments.out) / FIGURES, text.encode(), force=True)


def collect(arguments: argparse.Namespace) -> None:
    """The figures of several sweeps as one JSON-lines file, which is what is committed."""
    found = [json.loads((Path(folder) / FIGURES).read_text()) for folder in arguments.sweeps]
    write_records(Path(arguments.records) / "sweep_models.jsonl", found)


def busy_seconds(records: list[CellRecord]) -> float:
    """What the work itself took, by the records: plantings and removals."""
    planting = {r.subject.key: r.subject.seconds or 0.0 for r in records}
    return sum(planting.values()) + sum(r.result.seconds for r in records if r.result is not None)


def memory_of(samples: list[tuple[float, float]]) -> dict[str, float | None]:
    """Peak, and the means of the second and of the last tenth of the time."""
    if not samples:
        return {"memory_mib_peak": None, "memory_mib_early": None, "memory_mib_late": None}
    end = samples[-1][0]
    early = [m for t, m in samples if 0.1 * end <= t < 0.2 * end] or [samples[0][1]]
    late = [m for t, m in samples if t >= 0.9 * end]
    return {
        "memory_mib_peak": round(max(m for _, m in samples), 1),
        "memory_mib_early": round(statistics.fmean(early), 1),
        "memory_mib_late": round(statistics.fmean(late), 1),
    }


def mean_asr(records: list[CellRecord], defense: str) -> float | None:
    """Mean ASR after the removal, over the victims whose attack took."""
    left = [
        r.result.after.asr
        for r in records
        if r.defense == defense and r.result and r.result.after.asr is not None and (r.subject.asr or 0) >= 0.8
    ]
    return round(statistics.fmean(left), 4) if left else None


HEADS = (
    "models",
    "cells",
    "records",
    "killed",
    "hours",
    "models/hour",
    "MiB early",
    "MiB late",
    "MiB peak",
    *(f"ASR after `{defense}`" for defense in DEFENSES),
)


def tables(records: Path) -> dict[str, str]:
    rows = sorted(read_records(records / "sweep_models.jsonl"), key=lambda row: row["models"])
    return {"sweep-models": markdown(HEADS, map(table_row, rows))}


def table_row(content: dict[str, Any]) -> list[str]:
    return [
        f"{content['models']:,}",
        f"{content['cells']:,}",
        f"{content['records']:,}",
        f"{len(content['kills'])} times",
        f"{content['seconds'] / 3600:.2f}",
        f"{content['models_per_hour']:,.0f}",
        *(f"{content[f'memory_mib_{when}']:,.0f}" for when in ("early", "late", "peak")),
        *(f"{100 * content['asr_left'][defense]:.1f}" for defense in DEFENSES),
    ]


def table(arguments: argparse.Namespace) -> None:
    show(tables(Path(arguments.records)), arguments.write)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = {"run": run, "work": work, "collect": collect, "table": table}
    parser.add_argument("stage", choices=list(stages))
    parser.add_argument("sweeps", nargs="*", help="folders of finished sweeps (collect)")
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", default="runs/models")
    parser.add_argument("--records", default=str(Path(__file__).parent / "records"))
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into a page, instead of printing")
    arguments = parser.parse_args()
    stages[arguments.stage](arguments)


if __name__ == "__main__":
    main()
