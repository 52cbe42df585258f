"""``unbackdoor audit`` and ``clean --audit``: what they write, say and refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cli_runs import as_npz, colours, listed, run
from unbackdoor.analysis.audit import evidence
from unbackdoor.analysis.audit.calibration import shipped
from unbackdoor.models.zoo import cnn
from unbackdoor.report.audit_record import AuditReport
from unbackdoor.report.audited import before_and_after
from unbackdoor.report.record import Report
from unbackdoor.rng import Rng, isolated
from unbackdoor.training import Recipe, fit


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches of a few steps."""
    short = replace(evidence._PIXEL_SEARCH, rounds=3, round_steps=2)
    monkeypatch.setattr(evidence, "_PIXEL_SEARCH", short)
    monkeypatch.setattr(evidence, "_FEATURE_SEARCH", short)
    monkeypatch.setattr(evidence, "_SIZES", replace(evidence._SIZES, steps=3, halvings=2))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    with isolated(Rng(0)):
        network = cnn(num_classes=4, in_channels=3, image_size=8, width=4)
    fit(network, colours(64, size=8), Recipe(epochs=40, batch_size=16, optimizer="adam", lr=5e-3), Rng(0))
    torch.save(network.state_dict(), folder / "small.pt")
    as_npz(colours(60, size=8, seed=1), folder / "clean.npz")
    return folder


def given(small: Path, *more: object, command: str = "audit") -> tuple[object, ...]:
    return (command, small / "small.pt", "--samples", small / "clean.npz", "--normalize", "0-1", *more)


def test_a_record_and_a_page_are_written_and_told(small: Path, tmp_path: Path) -> None:
    before = (small / "small.pt").read_bytes()
    result = run(*given(small, "--out", tmp_path / "out"))
    assert result.exit_code == 0
    assert listed(tmp_path / "out") == ["audit.html", "audit.json"]
    report = AuditReport.load(tmp_path / "out" / "audit.json")
    assert report.samples == report.found.samples == 60
    assert report.image_shape == (3, 8, 8)
    assert report.calibration == shipped()
    said = " ".join(result.stdout.split())
    name = report.class_name(report.found.suspect)
    assert f"The most suspicious class is {name}: its score is {report.found.statistic:.2f}" in said
    assert "AUROC" in said
    # Three colours and four classes are not what it was calibrated on.
    assert "4 classes instead of 10" in " ".join(result.stderr.split())
    assert "3 colour channels instead of 1" in " ".join(result.stderr.split())
    assert (small / "small.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("threshold", "said"),
    [
        (-1e9, "Evidence of a backdoor towards class"),
        (1e9, "No evidence found, which is not proof of a clean network."),
    ],
)
def test_the_verdict_is_said_and_the_exit_code_is_0(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threshold: float, said: str
) -> None:
    made = replace(shipped(), threshold=threshold)
    monkeypatch.setattr("unbackdoor.analysis.audit.shipped", lambda: made)
    result = run(*given(small, "--out", tmp_path / "out"))
    assert result.exit_code == 0
    assert said in " ".join(result.stdout.split())
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["found"]["found"] == (threshold < 0)
    assert said in (tmp_path / "out" / "audit.html").read_text()


def test_the_same_seed_gives_the_same_figures(small: Path, tmp_path: Path) -> None:
    found = []
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        assert run(*given(small, "--out", tmp_path / name, "--seed", seed, "--per-class", 5)).exit_code == 0
        found.append(json.loads((tmp_path / name / "audit.json").read_text())["found"])
    assert found[0] == found[1] != found[2]
    assert found[0]["samples"] == 20


def test_what_is_there_is_not_replaced_unasked(small: Path, tmp_path: Path) -> None:
    (tmp_path / "audit.html").write_text("mine")
    result = run(*given(small, "--out", tmp_path))
    assert result.exit_code == 1
    assert "would be overwritten" in result.stderr
    assert (tmp_path / "audit.html").read_text() == "mine"
    assert run(*given(small, "--out", tmp_path, "--force", "--quiet")).exit_code == 0
    assert listed(tmp_path) == ["audit.html", "audit.json"]


def test_no_trigger_is_asked_for() -> None:
    result = run("audit", "any.pt", "--samples", "digits", "--trigger", "badnets")
    assert result.exit_code == 2
    assert "No such option" in result.stderr


def test_a_network_of_texts_is_refused_before_it_is_read(tmp_path: Path) -> None:
    for command in (("audit",), ("clean", "--audit")):
        result = run(command[0], "transformers:someone/something", "--samples", "texts.csv", *command[1:])
        assert result.exit_code == 1
        assert "triggers in images" in " ".join(result.stderr.split())


def test_a_removal_is_audited_before_and_after(small: Path, tmp_path: Path) -> None:
    more = ("--method", "ft(epochs=1, steady=false)", "--audit", "--out", tmp_path / "out")
    result = run(*given(small, *more, command="clean"))
    assert result.exit_code == 0
    report = Report.load(tmp_path / "out" / "report.json")
    assert report.audit is not None
    assert report.audit.after is not None
    assert report.audit.before.measures != report.audit.after.measures
    assert report.audit.before.samples == report.audit.after.samples == report.samples.defense_count
    said = " ".join(result.stdout.split())
    assert f"score {report.audit.before.statistic:.2f}" in said
    assert f"score {report.audit.after.statistic:.2f}" in said
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("figure-audit-scores-") == 2
    assert "from cleaned ones" in page
    plain = run(*given(small, *more[:2], "--out", tmp_path / "plain", command="clean"))
    assert plain.exit_code == 0
    alone = Report.load(tmp_path / "plain" / "report.json")
    assert alone.audit is None
    assert alone.after == report.after  # looking changes nothing
    assert "Looked for without a trigger" not in (tmp_path / "plain" / "report.html").read_text()


def test_of_a_destroyed_network_the_report_says_that_it_could_not_be_audited() -> None:
    with isolated(Rng(0)):
        network, broken = (cnn(num_classes=4, in_channels=3, image_size=8, width=4).eval() for _ in range(2))
    with torch.no_grad():
        for p in broken.parameters():
            p.fill_(torch.nan)
    found = before_and_after(network, broken, colours(24, size=8), Rng(0))
    assert found.after is None
    assert "could not be audited: the network's outputs on the clean samples are not all finite" in found.notes[0]
