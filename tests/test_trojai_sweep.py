"""The sweep over TrojAI-like folders: through the benchmark's engine, taken up where it was, and its table."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

import trojai_sweep
from trojai_roots import root_of
from trojai_spoilt import truncated, without_examples
from unbackdoor.bench import sweep as sweeping
from unbackdoor.bench.exports import read_lines

QUICK = "ft(epochs=1, steady=False)"
NAMES = ["id-00000000", "id-00000001"]


def test_the_sweep_goes_on_and_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "runs"
    shutil.copytree(root_of("cyber"), out / "cyber")
    shutil.copytree(root_of("cyber"), out / "spoilt")
    truncated(out / "spoilt" / "models" / NAMES[0])
    without_examples(out / "spoilt" / "models" / NAMES[1])
    assert trojai_sweep.clean(out, [QUICK]).counts == {"done": 2, "failed": 2}
    records = {r.subject.name: r for r in trojai_sweep.read(out)}
    assert sorted(records) == [f"{root}/models/{name}" for root in ("cyber", "spoilt") for name in NAMES]
    poisoned = records["cyber/models/id-00000001"].result
    assert poisoned is not None
    assert poisoned.before.asr is not None
    assert poisoned.before.asr > 0.8
    assert any("held back" in note for note in poisoned.notes)

    monkeypatch.setattr(sweeping, "perform", lambda *_: pytest.fail("there is nothing to do"))
    assert trojai_sweep.clean(out, [QUICK]).counts == {"done": 2, "failed": 2}

    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in trojai_sweep.table([*records.values()]).splitlines()
    ]
    assert rows[0] == list(trojai_sweep.HEADS)
    assert [row[:4] for row in rows[2:]] == [
        ["a tabular cyber round", "clean", f"`{QUICK}`", "1 of 2"],
        ["a tabular cyber round", "poisoned", f"`{QUICK}`", "1 of 1"],
        ["unreadable", "poisoned", f"`{QUICK}`", "0 of 1"],
    ]
    clean, attacked, lost = (dict(zip(rows[0][8:], row[8:], strict=True)) for row in rows[2:])
    kept = records["cyber/models/id-00000000"].result
    assert kept is not None
    assert clean["fidelity (NIST)"] == f"{100 * kept.after.accuracy / kept.before.accuracy:.1f}"
    assert poisoned.nist_fidelity is not None
    assert attacked["fidelity (NIST)"] == f"{100 * poisoned.nist_fidelity:.1f}"
    assert attacked["seconds"] == f"{poisoned.seconds:.1f}"
    assert set(lost.values()) == {""}

    lines = tmp_path / "trojai.jsonl"
    monkeypatch.setattr(sys, "argv", ["trojai_sweep.py", "collect", "--out", str(out), "--write", str(lines)])
    trojai_sweep.main()
    assert len(read_lines(lines)) == 4
    assert str(tmp_path) not in lines.read_text(encoding="utf-8")
    assert trojai_sweep.table(trojai_sweep.read(lines)) == trojai_sweep.table([*records.values()])
