"""The benchmarks of the engine: what they plan, and what they make of what they saw."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import harness_overhead
import sweep_models
import victim_runs
from unbackdoor.bench.plan import Plan, graph_of


@pytest.mark.parametrize("models", [1, 8, 20])
def test_as_many_victims_are_planned_as_are_asked_for(models: int) -> None:
    graph = sweep_models.planned(models)
    assert len(graph.victims) == len({v.key for v in graph.victims}) == models
    assert len(graph.cells) == 2 * models
    if models >= 8:
        assert {v.attack for v in graph.victims} == {v.attack for v in sweep_models.planned(8).victims}
        assert len({v.attack for v in graph.victims}) == len(sweep_models.ATTACKS)


def test_memory_early_and_late() -> None:
    samples = [(float(t), 100.0 if t < 90 else 130.0) for t in range(101)]
    assert sweep_models.memory_of(samples) == {
        "memory_mib_peak": 130.0,
        "memory_mib_early": 100.0,
        "memory_mib_late": 130.0,
    }
    assert sweep_models.memory_of([])["memory_mib_peak"] is None


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux alone tells")
def test_memory_of_this_process_group() -> None:
    held = sweep_models.memory_mib(os.getpgid(0))
    assert held is not None
    assert held > 10


SIZES = ((1000, 3), (20, 0))


def test_the_tables_are_made_of_the_records(tmp_path: Path) -> None:
    seen = {"seconds": 7200.0, "models_per_hour": 500.0, "asr_left": dict.fromkeys(sweep_models.DEFENSES, 0.123)}
    memory = {"memory_mib_early": 900.4, "memory_mib_late": 905.0, "memory_mib_peak": 1000.0}
    rows = ({"models": n, "cells": 2 * n, "records": 2 * n, **seen, **memory, "kills": [{}] * k} for n, k in SIZES)
    victim_runs.write_records(tmp_path / "sweep_models.jsonl", rows)
    few, many = sweep_models.tables(tmp_path)["sweep-models"].splitlines()[-2:]
    assert few.startswith("| 20 | 40 | 40 | 0 times |")
    assert many == "| 1,000 | 2,000 | 2,000 | 3 times | 2.00 | 500 | 900 | 905 | 1,000 | 12.3 | 12.3 |"
    times = {"engine": [10.1, 10.3], "loop": [10.0, 10.2]}
    content = {"data": "digits", "victims": 2, "cells": 12, "processor_seconds": times, "ratio": 1.01}
    (tmp_path / "harness_overhead.json").write_text(json.dumps(content))
    row = harness_overhead.tables(tmp_path)["harness-overhead"].splitlines()[-1]
    assert row == "| digits | 2 | 12 | 10.1 | 10.2 | 1.010 |"


def test_the_engine_and_the_plain_loop_do_the_same_work() -> None:
    plan = Plan(
        attacks=["badnets(size=2)"],
        defenses=["ft(epochs=1, batch_size=64, steady=false)"],
        per_class=[5],
        recipe={"epochs": 2},
        min_asr=0.0,
    )
    graph = graph_of(plan, lambda name: 1297)
    found = harness_overhead.with_the_engine(graph, None)
    assert found == harness_overhead.in_a_plain_loop(graph, None)
    assert set(found) == {graph.cells[0].key}
