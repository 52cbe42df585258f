"""What a named plan came to, as one committed file of records and a table.

    unbackdoor bench --plan seam-two-cores --data-root DATA --out runs/seam
    python benchmarks/plan_table.py collect --results runs/seam      # -> benchmarks/records
    python benchmarks/plan_table.py table --write docs/benchmark.md  # records -> Markdown

A plan may have been stopped: what is there is shown, and the column of seeds says how much that is.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from unbackdoor.bench.exports import lines_bytes, read_lines
from unbackdoor.bench.reading import gather
from unbackdoor.bench.records import CellRecord
from unbackdoor.files import write
from victim_runs import HEADS, markdown, show, table_row

RECORDS = "plan_seam_two_cores.jsonl"


def collect(arguments: argparse.Namespace) -> None:
    """The results' records as one file, sorted by key."""
    found = sorted(gather([arguments.results]).records, key=lambda record: record.key)
    write(arguments.records / RECORDS, lines_bytes(found), force=True)


def tables(records: Path) -> dict[str, str]:
    """A line for each victim, budget and defense: means over the draws of clean samples."""
    groups: dict[tuple[str, str, float, str], list[dict[str, Any]]] = {}
    for record in read_lines(records / RECORDS):
        key = (record.subject.dataset or "", record.subject.attack or "", record.share or 0.0, record.defense)
        groups.setdefault(key, []).append(figures(record))
    rows = [
        [dataset, *table_row(attack or None, share, method, found)]
        for (dataset, attack, share, method), found in sorted(groups.items())
    ]
    return {"plan-seam": markdown(("data", *HEADS), rows)}


def figures(record: CellRecord) -> dict[str, Any]:
    """As :func:`victim_runs.table_row` takes them."""
    if record.result is None:
        return {"error": record.reason}
    before, after = record.result.before, record.result.after
    return {
        "acc_before": before.accuracy,
        "acc_after": after.accuracy,
        "asr_before": before.asr,
        "asr_after": after.asr,
        "ra_after": after.ra,
        "seconds": record.result.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("collect", "table"))
    parser.add_argument("--results", type=Path, help="the folder of the results (collect)")
    parser.add_argument("--records", type=Path, default=Path(__file__).parent / "records")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into a page, instead of printing")
    arguments = parser.parse_args()
    if arguments.stage == "table":
        show(tables(arguments.records), arguments.write)
        return
    if arguments.results is None:
        parser.error("collect needs --results")
    collect(arguments)


if __name__ == "__main__":
    main()
