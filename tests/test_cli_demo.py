"""``unbackdoor demo``: its sentences follow its figures, and it gives the same whichever way it is run."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import time
from pathlib import Path

import pytest

from cli_runs import listed, run
from unbackdoor import specs
from unbackdoor.attacks import recipes
from unbackdoor.cli import demo
from unbackdoor.data.named import load_dataset
from unbackdoor.report import Report

CELL = demo.Cell(
    seed=0,
    method="x",
    verdict="cleaned",
    accuracy_before=0.98,
    accuracy_after=0.96,
    asr_before=1.0,
    asr_after=0.02,
    seconds=1.0,
)
REMAINS = dataclasses.replace(CELL, asr_after=0.9)
COSTLY = dataclasses.replace(CELL, accuracy_after=0.7)


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ([CELL, CELL], "x removes the backdoor and keeps the accuracy:"),
        ([CELL, REMAINS], "x removes the backdoor and keeps the accuracy in 1 of 2 only"),
        ([REMAINS, REMAINS], "x does not remove the backdoor"),
        ([COSTLY, COSTLY], "x removes the backdoor, but at the price of accuracy"),
        ([COSTLY, REMAINS], "x removes the backdoor in 1 of 2, and not without a price"),
        ([dataclasses.replace(COSTLY, verdict="destroyed")], "x destroys the network:"),
        (
            [dataclasses.replace(COSTLY, verdict="destroyed"), REMAINS],
            "x does not remove the backdoor and destroys the network in 1 of 2:",
        ),
        ([dataclasses.replace(CELL, asr_before=0.05)], "nothing can be said"),
    ],
)
def test_what_is_said_follows_from_the_figures(cells: list[demo.Cell], said: str) -> None:
    assert said in demo.sentence("x", cells)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, short training and quick methods."""
    usual = recipes.USUAL["digits"]
    short = dataclasses.replace(usual, recipe=dataclasses.replace(usual.recipe, epochs=4))
    monkeypatch.setitem(recipes.USUAL, "digits", short)
    monkeypatch.setattr(demo, "METHODS", ("ft(epochs=1)", "ft(epochs=2)"))
    monkeypatch.setattr(demo, "REPORTED", "ft(epochs=2)")
    monkeypatch.setattr("os.cpu_count", lambda: 1)


def test_the_demo_writes_a_report_and_repeats(quick: None, tmp_path: Path) -> None:
    first = run("demo", "--out", tmp_path / "a", "--seeds", 2)
    assert first.exit_code == 0
    assert listed(tmp_path / "a") == ["report.html", "report.json", "results.json"]
    assert str(tmp_path / "a" / "report.html") in first.stdout.splitlines()[-1]
    report = Report.load(tmp_path / "a" / "report.json")
    cells = json.loads((tmp_path / "a" / "results.json").read_text())["cells"]
    assert [(c["seed"], c["method"]) for c in cells] == [
        (seed, method) for seed in (0, 1) for method in ("ft(epochs=1)", "ft(epochs=2)")
    ]
    assert report.method.seed == 0
    assert report.method.spec == "ft(epochs=2)"
    assert report.after.accuracy.value == cells[1]["accuracy_after"]
    assert report.samples.per_class == (demo.PER_CLASS,) * 10
    assert report.measured.count == len(load_dataset("digits", "test")) - 10 * demo.PER_CLASS
    assert cells[0]["accuracy_before"] != cells[2]["accuracy_before"]
    assert "mean" in first.stdout
    for method in demo.METHODS:
        assert demo.sentence(method, [demo.Cell(**c) for c in cells if c["method"] == method]) in first.stdout
    assert run("demo", "--out", tmp_path / "b", "--seeds", 2, "--quiet").stdout == ""
    again = json.loads((tmp_path / "b" / "results.json").read_text())["cells"]
    for cell, same in zip(cells, again, strict=True):
        assert {**cell, "seconds": 0} == {**same, "seconds": 0}


def test_a_report_that_is_there_is_kept_without_force(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine")
    result = run("demo", "--out", tmp_path)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "--force" in result.stderr
    assert (tmp_path / "report.html").read_text() == "mine"


def test_work_goes_through_processes_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    with demo._mapping() as each:
        assert list(each(abs, [-3, 2, -1])) == [3, 2, 1]


def test_an_interruption_ends_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)

    def interrupted() -> None:
        with demo._mapping() as each:
            each(time.sleep, [1000])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    for child in multiprocessing.active_children():
        child.join(20)
    assert not multiprocessing.active_children()


def test_the_methods_are_specs_and_one_is_reported() -> None:
    for method in demo.METHODS:
        specs.build("defense", method)
    assert demo.REPORTED in demo.METHODS
