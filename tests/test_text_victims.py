"""The benchmark of texts: its cells, what it keeps of them, and its table."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import text_victims
from text_victims import Cell


def test_each_victim_comes_before_its_removals_and_each_seed_is_whole_before_the_next() -> None:
    found = list(text_victims.cells(["encoder", "head"], ["words"], ["ft", "seam"], 2))
    assert len(found) == len({cell.file for cell in found}) == 2 * 2 * (1 + 1 + 2 * 2)
    assert [cell.seed for cell in found] == sorted(cell.seed for cell in found)
    seen: set[tuple[str, str | None, int]] = set()
    for cell in found:
        if cell.method is not None:
            assert (cell.network, cell.attack, cell.seed) in seen
        seen.add((cell.network, cell.attack, cell.seed))


def kept(folder: Path, cell: Cell, **result: object) -> None:
    folder.mkdir(exist_ok=True)
    (folder / cell.file).write_text(json.dumps({"cell": asdict(cell), "result": result}))


def test_the_table_holds_means_over_seeds_and_what_the_clean_network_gets_wrong(tmp_path: Path) -> None:
    runs, records = tmp_path / "runs", tmp_path / "records"
    records.mkdir()
    for seed in range(2):
        kept(runs, Cell("head", None, seed), accuracy=0.8, asr=None, ra=None, **{"asr words": 0.2 + seed / 10})
        kept(runs, Cell("head", "words", seed), accuracy=0.8, asr=1.0, ra=0.0)
        kept(runs, Cell("head", "words", seed, "seam", 0.05), accuracy=0.75, asr=0.3 + seed / 5, ra=0.5, notes=["a"])
    kept(runs, Cell("head", "words", 0, "seam", 0.01), accuracy=0.7, asr=0.5, ra=0.5, notes=["b"])
    text_victims.collect(runs, records)
    assert "notes" not in (records / "text_victims.jsonl").read_text()
    assert text_victims.tables(records)["texts"].splitlines()[2:] == [
        "| head | words |  | none | 2 | 80.0 | 100.0 | 0.0 | 25.0 |",
        "| head | words | 1% | `seam` | 1 | 70.0 | 50.0 | 50.0 | 20.0 |",
        "| head | words | 5% | `seam` | 2 | 75.0 | 40.0 | 50.0 | 25.0 |",
    ]
