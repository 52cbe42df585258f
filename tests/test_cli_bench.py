"""``unbackdoor bench``: what its options mean, what it says, and what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench_runs import QUICK
from cli_runs import control_characters, listed, misbehaving, run  # noqa: F401 - a fixture among them
from unbackdoor.bench import named_plans
from unbackdoor.bench.exports import read_lines
from unbackdoor.bench.plan import Plan
from unbackdoor.bench.store import Store
from unbackdoor.cli import planning

#: A victim and a cell, in a moment.
BRIEF = ("--attack", "none", "--defense", QUICK, "--per-class", 5, "--epochs", 1, "--by", "here", "--device", "cpu")


def test_a_sweep_leaves_records_and_says_how_many(tmp_path: Path) -> None:
    out = tmp_path / "results"
    done = run("bench", *BRIEF, "--out", out, "--export", tmp_path / "all.jsonl")
    assert done.exit_code == 0, done.stderr
    assert f"cells: 1 done. Records: {out / 'cells'}" in done.stdout
    assert control_characters(done.stdout) == set()
    assert done.stderr == ""
    assert read_lines(tmp_path / "all.jsonl") == list(Store(out).records())
    again = run("bench", *BRIEF, "--out", out)
    assert [line.split() for line in again.stdout.splitlines() if "digits" in line] == [
        ["digits", "cnn(width=16)", "1", "0", "1", "0"]
    ]


def test_records_can_be_taken_from_a_file(tmp_path: Path) -> None:
    run("bench", *BRIEF, "--out", tmp_path / "one", "--export", tmp_path / "all.jsonl")
    done = run("bench", *BRIEF, "--out", tmp_path / "two", "--import", tmp_path / "all.jsonl")
    assert done.exit_code == 0
    assert "note: 1 new records from" in done.stderr
    assert list((tmp_path / "two" / "victims").iterdir()) == []  # none was needed
    assert list(Store(tmp_path / "two").records()) == list(Store(tmp_path / "one").records())


def test_a_dry_run_says_what_there_is_to_do_and_does_nothing(tmp_path: Path) -> None:
    out = tmp_path / "results"
    options = ("--attack", "badnets", "--attack", "none", "--seeds", 3, "--victim-seeds", 2, "--out", out)
    done = run("bench", *options, "--dry-run")
    assert done.exit_code == 0, done.stderr
    # 2 attacks × 2 seeds; times 3 defenses × 3 seeds
    assert ["digits", "cnn(width=16)", "4", "4", "36", "36"] in [line.split() for line in done.stdout.splitlines()]
    assert "there are no records of anything like it" in done.stdout
    assert listed(tmp_path) == []


def test_a_dry_run_estimates_from_what_was_done(tmp_path: Path) -> None:
    out = tmp_path / "results"
    run("bench", *BRIEF, "--out", out)
    before = listed(out)
    done = run("bench", *BRIEF, "--out", out, "--seeds", 2, "--defense", "seam", "--workers", 1, "--dry-run")
    assert "About 0 minutes with 1 at work, by the records that are there; 2 of 3 jobs, unlike any" in done.stdout
    assert listed(out) == before
    assert "Everything is there." in run("bench", *BRIEF, "--out", out, "--dry-run").stdout


def test_a_dry_run_does_without_the_data(tmp_path: Path) -> None:
    done = run(
        "bench", "--data", "cifar100", "--data-root", tmp_path, "--share", 0.01, "--dry-run", "--out", tmp_path / "r"
    )
    assert done.exit_code == 0
    assert "cifar100 is not here; its published size is counted with" in done.stderr
    real = run("bench", "--data", "cifar100", "--data-root", tmp_path, "--share", 0.01, "--out", tmp_path / "r")
    assert real.exit_code == 1
    assert "cifar100 was not found" in real.stderr
    assert not (tmp_path / "r").exists()


def test_a_plan_by_name_and_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    brief = Plan(attacks=[None], defenses=[QUICK], per_class=[5], recipe={"epochs": 1})
    monkeypatch.setitem(named_plans.PLANS, "brief", (brief,))
    done = run("bench", "--plan", "brief", "--out", tmp_path / "r", "--by", "here", "--device", "cpu")
    assert "cells: 1 done" in done.stdout
    file = tmp_path / "mine.py"
    file.write_text(
        "from unbackdoor.bench.plan import Plan\n"
        f"plan = Plan(attacks=[None], defenses=[{QUICK!r}], per_class=[5], recipe={{'epochs': 1}})\n"
    )
    done = run("bench", "--plan", file, "--out", tmp_path / "r", "--dry-run")
    assert "Everything is there." in done.stdout


def test_a_folder_of_models(tmp_path: Path) -> None:
    victim = run("attack", "--clean", "--epochs", 1, "--out", tmp_path / "models" / "one")
    assert victim.exit_code == 0
    (tmp_path / "models" / "bad.pt").write_bytes(b"bad")
    options = ("--data", "digits", "--defense", QUICK, "--per-class", 5, "--by", "here", "--out", tmp_path / "r")
    done = run("bench", "--models", tmp_path / "models", *options)
    assert done.exit_code == 0
    assert "cells: 1 done, 1 failed" in done.stdout
    assert "warning: bad" in done.stderr
    assert {r.subject.name: r.status for r in Store(tmp_path / "r").records()} == {"bad": "failed", "one": "done"}


def test_an_interruption_says_how_to_go_on(tmp_path: Path, misbehaving: None) -> None:  # noqa: F811
    options = ("--attack", "none", "--defense", QUICK, "--defense", "interrupted", *BRIEF[4:])
    done = run("bench", *options, "--out", tmp_path / "r")
    assert done.exit_code == 130
    assert "interrupted; 1 of 2 cells are done. The same command goes on from here" in done.stderr
    assert len(Store(tmp_path / "r").keys()) == 1
    assert list((tmp_path / "r" / "claims").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--plan", "smoke", "--attack", "badnets"), 2, "--plan says it all: --attack would have no effect"),
        (("--plan", "smok"), 1, "unknown plan 'smok'; did you mean 'smoke'"),
        (("--attack", "badnet"), 1, "unknown attack 'badnet'"),
        (("--normalize", "pm1"), 2, "--normalize is for --models"),
        (("--models", "."), 1, "holds no model"),
        (("--models", ".", "--data", "digits", "--attack", "badnets"), 2, "--attack would have no effect"),
        (("--models", ".", "--data", "digits", "--data", "mnist"), 2, "--models takes one --data"),
        (("--ray-address", "auto"), 2, "--ray-address is for --by ray"),
        (("--export", "records.csv"), 1, "records.csv must end in .jsonl or .parquet"),
        (("--import", "no.jsonl"), 1, "no.jsonl cannot be read"),
    ],
)
def test_a_wrong_option_is_refused(
    options: tuple[str, ...], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("bench", *options, "--out", tmp_path / "r")
    assert done.exit_code == code
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert not (tmp_path / "r" / "victims").exists() or list((tmp_path / "r" / "victims").iterdir()) == []


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    done = run("bench", *BRIEF, "--out", tmp_path)
    assert done.exit_code == 1
    assert "is no folder of benchmark results" in done.stderr
    assert listed(tmp_path) == ["thesis.tex"]


def test_who_works_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    from unbackdoor.bench.executors import in_process
    from unbackdoor.cli.options import Device

    def executor(by: planning.Workers, count: int) -> Any:
        return planning.executor_of(by, count, Device.CPU, None, (1.0, 0.0))

    assert executor(planning.Workers.AUTO, 1) is in_process
    assert executor(planning.Workers.HERE, 4) is in_process
    assert executor(planning.Workers.AUTO, 3).args == (3, 0)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert planning.default_workers(Device.CPU, 1) == 6
    assert planning.default_workers(Device.CPU, 4) == 1
