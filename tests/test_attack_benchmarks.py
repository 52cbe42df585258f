"""The benchmarks of attacks: what they plant is a whole victim, what they clean a whole record, and what they print."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import adaptive_table
import attack_table
import victim_runs
from unbackdoor import specs
from unbackdoor.attacks.recipes import usual
from unbackdoor.attacks.victims import load_attack, read_card

DIGITS = dataclasses.replace(usual("digits"), recipe=dataclasses.replace(usual("digits").recipe, epochs=4))


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(victim_runs.SETTINGS, "digits", DIGITS)


def test_every_attack_is_in_the_table_once_and_can_be_built() -> None:
    named = [specs.parse(a)[0] for a in attack_table.ATTACKS if a is not None]
    assert set(named) == set(specs.names("attack"))
    assert len(set(attack_table.ATTACKS)) == len(attack_table.ATTACKS)
    for attack in attack_table.ATTACKS:
        assert attack is None or specs.build("attack", attack)
    assert set(attack_table.REMARKS) <= set(attack_table.ATTACKS)


@pytest.mark.usefixtures("digits")
def test_a_victim_is_planted_once_with_what_its_trigger_learned(tmp_path: Path) -> None:
    victim_runs.plant_missing("digits", "wanet(s=0.7)", None, tmp_path)
    folder = victim_runs.victim_folder(tmp_path, "digits", "wanet(s=0.7)")
    attack, card = load_attack(folder), read_card(folder)
    assert attack is not None
    assert set(attack.state) == {"field"}
    assert card.settings["s"] == 0.7
    assert card.asr is not None
    written = (folder / "model.safetensors").stat().st_mtime_ns
    victim_runs.plant_missing("digits", "wanet(s=0.7)", None, tmp_path)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.usefixtures("digits")
def test_what_did_not_take_is_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Poison that was learned is obeyed on the training images themselves; that of a handful is not."""
    monkeypatch.setattr(attack_table, "SETTING", "digits")
    learned, unlearned = "badnets(rate=0.1, size=3)", "adaptive_blend(alpha=0.01, train_alpha=0.01)"
    for attack in (learned, unlearned):
        victim_runs.plant_missing("digits", attack, None, tmp_path)
    shares = [
        attack_table.fitted(victim_runs.victim_folder(tmp_path, "digits", attack), None)
        for attack in (learned, unlearned)
    ]
    assert shares[0] is not None
    assert shares[0] > 0.8
    assert shares[1] is not None
    assert shares[1] < 0.5


def test_an_attack_that_could_not_be_planted_is_a_row() -> None:
    row = attack_table.table_row({"attack": "lira(eps=0.05)", "error": "the loss became nan"}, 0.9)
    assert row == ["`lira(eps=0.05)`", *["–"] * 6, "**could not be planted**: the loss became nan"]
    assert len(row) == len(attack_table.HEADS)


@pytest.mark.usefixtures("digits")
def test_a_trial_is_cleaned_once_and_tells_what_the_attacker_got_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adaptive_table, "SETTING", "digits")
    monkeypatch.setattr(adaptive_table, "RETUNED", (0, 20))
    monkeypatch.setattr(victim_runs, "took", lambda asr: True)
    victim_runs.plant_missing("digits", adaptive_table.PLAIN, None, tmp_path)
    trials = [
        adaptive_table.Trial(
            setting="digits", attack=adaptive_table.PLAIN, method="ft(epochs=2)", budget=0.1, seed=0, polluted=share
        )
        for share in (0.0, 0.5)
    ]
    calls = []

    def run(*given: Any) -> dict[str, Any]:
        calls.append(given)
        return adaptive_table.run(*given)

    for _ in range(2):
        victim_runs.run_cells(trials, tmp_path, None, run, "adaptive")
    assert len(calls) == 2
    records = [json.loads(p.read_text()) for p in (tmp_path / "adaptive").iterdir()]
    clean, spoilt = sorted(records, key=lambda r: r["polluted"])
    assert (clean["polluted"], spoilt["polluted"]) == (0.0, 0.5)
    assert clean["clean_samples"] == spoilt["clean_samples"]
    assert spoilt["asr_after"] > 0.9  # half of what it was cleaned with taught it the trigger
    assert set(clean["retuned"]) == {"0", "20"}
    assert 0 <= clean["reactivated"] <= 1


def test_a_failure_is_a_record_and_a_row() -> None:
    row = adaptive_table.table_row("`ewc`", "ft", [{"error": "TrainingDiverged: too fast"}])
    assert "failed: TrainingDiverged: too fast" in row
    assert len(row) == len(adaptive_table.HEADS)


def test_a_row_of_trials_is_means_and_ranges() -> None:
    def record(asr: float) -> dict[str, Any]:
        retuned = dict.fromkeys(map(str, adaptive_table.RETUNED), asr)
        return {"acc_after": 0.9, "asr_after": asr, "retuned": retuned, "reactivated": 0.5, "reactivated_alone": 0.25}

    assert adaptive_table.table_row("`ewc`", "ft", [record(0.1), record(0.4)]) == [
        "`ewc`",
        "`ft`",
        "2",
        "90.0 (90–90)",
        "25.0 (10–40)",
        *["25.0 (10–40)"] * 3,
        "50.0 (50–50)",
        "25.0 (25–25)",
    ]


def test_a_row_of_attacks_flags_what_did_not_take_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    card = {
        "attack": "wanet",
        "settings": {"rate": 0.2},
        "num_classes": 10,
        "accuracy": 0.85,
        "asr": 0.79,
        "seconds": 700.4,
    }
    monkeypatch.setattr(attack_table, "REMARKS", {"wanet": "too short"})
    row = attack_table.table_row(card, 0.87)
    assert row == ["`wanet`", "20 %", "85.0", "2.0", "79.0", "–", "700", "**did not take**: too short"]
    assert len(row) == len(attack_table.HEADS)
    monkeypatch.setattr(attack_table, "REMARKS", {})
    assert attack_table.table_row({**card, "asr": 0.8}, None)[3:] == ["–", "80.0", "–", "700", ""]
    assert attack_table.table_row({**card, "accuracy": 0.14, "asr": 1.0}, None)[-1] == "**broke the network**"
    said = attack_table.table_row({**card, "asr": 0.8, "astray": 0.31}, None)[-1]
    assert said == "without a trigger 31% of the other classes' images go where the attacker wants"
    clean = {"attack": None, "settings": {}, "accuracy": 0.85, "asr": None, "seconds": 1.0}
    assert attack_table.table_row(clean, 0.87)[:5] == ["clean network", "–", "85.0", "–", "–"]


def test_tables_go_between_their_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- table: a -->\nold\n<!-- end: a -->\nbelow\n")
    victim_runs.show({"a": victim_runs.markdown(("x", "y"), [("1", "2")])}, page)
    assert page.read_text() == (
        "above\n<!-- table: a -->\n\n| x | y |\n|---|---|\n| 1 | 2 |\n\n<!-- end: a -->\nbelow\n"
    )
    with pytest.raises(SystemExit, match="no place for the table b"):
        victim_runs.show({"b": ""}, page)
