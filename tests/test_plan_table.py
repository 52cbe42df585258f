"""The table of a plan's records: means over seeds, and what failed says so."""

from __future__ import annotations

import argparse
from pathlib import Path

import plan_table
from cell_records import cell
from unbackdoor.bench.exports import lines_bytes


def test_records_are_collected_and_shown_by_victim_and_method(tmp_path: Path) -> None:
    made = [cell("seam", share=0.01, seed=seed, asr=(1.0, seed / 10)) for seed in range(2)]
    made += [cell("ulrl", share=0.01, failed="TrainingDiverged: too fast"), cell("ulrl", None, share=0.01)]
    source = tmp_path / "given.jsonl"
    source.write_bytes(lines_bytes(made))
    (tmp_path / "records").mkdir()
    plan_table.collect(argparse.Namespace(results=source, records=tmp_path / "records"))
    (table,) = plan_table.tables(tmp_path / "records").values()
    lines = table.splitlines()[2:]
    assert lines[0].startswith("| digits | clean network | 1% | `ulrl` | 1 | 98.0 | 96.0 | – | – |")
    assert lines[1].startswith("| digits | badnets(rate=0.1, target=0) | 1% | `seam` | 2 | 98.0 | 96.0 | 100.0 | 5.0 |")
    assert "`ulrl` | 0 | failed: TrainingDiverged: too fast |" in lines[2]
    assert len(lines) == 3
