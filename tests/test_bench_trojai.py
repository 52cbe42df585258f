"""``bench --models`` on TrojAI folders of each kind, good ones and spoilt ones, each by its own examples."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cli_runs import run
from trojai_roots import models_of, root_of
from trojai_spoilt import examples_of, malicious, one_a_class, truncated, without_examples, wrong_count
from unbackdoor.bench import sweep as sweeping
from unbackdoor.bench.given import models_in
from unbackdoor.bench.records import CellRecord, Result
from unbackdoor.bench.store import Store
from unbackdoor.data.trojai_layouts import example_files

QUICK = "ft(epochs=1, steady=False)"
OPTIONS = ("--defense", QUICK, "--by", "here", "--device", "cpu")

#: What is spoilt, and the words of the error that it ends in.
SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "malicious": (malicious, r"^UnsafeCheckpoint: .*asks to call (posix|os)\.system"),
    "truncated": (truncated, "^CheckpointError: .*truncated or damaged"),
    "unexampled": (without_examples, "^DataError: .*unexampled has no clean examples"),
    "single": (one_a_class, "^DataError: .*single holds one example a class: nothing can be set aside to judge on"),
    "miscounted": (
        wrong_count,
        "^DataError: .*miscounted: its settings state 17 classes, and its network has 2 outputs",
    ),
}

#: Layout -> where its models lie in the root.
GOOD = {"round4": "round4", "round5": "round5/models", "cyber": "cyber/models"}
FRESH = ("round4", "round5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Roots of pictures, texts and vectors, the last without what its maker holds back, and five spoilt folders."""
    made = tmp_path_factory.mktemp("given") / "suspicious"
    for layout in GOOD:
        shutil.copytree(root_of(layout), made / layout)
    shutil.rmtree(made / "cyber" / "held-back")
    for name, (spoil, _) in SPOILT.items():
        shutil.copytree(models_of("cyber")[1], made / "bad" / name)
        spoil(made / "bad" / name)
    return made


@pytest.fixture(scope="module")
def results(folder: Path) -> Path:
    out = folder.parent / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)  # where the malicious pickle would leave its mark
        done = run("bench", "--models", folder, *OPTIONS, "--out", out)
    assert done.exit_code == 0, done.stderr
    assert "cells: 6 done, 5 failed" in done.stdout
    assert "their own examples" in done.stdout
    return out


@pytest.fixture(scope="module")
def records(results: Path) -> dict[str, CellRecord]:
    return {record.subject.name: record for record in Store(results).records()}


def test_each_model_is_found_once_and_embeddings_are_none(folder: Path) -> None:
    assert (folder / "round5" / "embeddings").is_dir()
    good = [f"{place}/id-0000000{index}" for place in GOOD.values() for index in (0, 1)]
    models = models_in(folder, None)
    assert sorted(m.name for m in models) == sorted([*good, *(f"bad/{name}" for name in SPOILT)])
    assert {m.data for m in models} == {m.data for m in models_in(folder, "digits")} == {None}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_model_is_a_record_with_an_error_of_its_own(
    name: str, records: dict[str, CellRecord], folder: Path
) -> None:
    record = records[f"bad/{name}"]
    assert (record.status, record.result) == ("failed", None)
    assert re.search(SPOILT[name][1], record.reason or ""), record.reason
    others = [words for other, (_, words) in SPOILT.items() if other != name]
    assert not any(re.search(words, record.reason or "") for words in others)
    # Its round and its truth can be told without its network.
    told = "TrojAI" if name == "unexampled" else "TrojAI, a tabular cyber round"
    assert (record.subject.dataset, record.subject.poisoned) == (told, True)
    assert not (folder.parent / "evil").exists()


def done(record: CellRecord) -> Result:
    assert record.result is not None, record.reason
    return record.result


@pytest.mark.parametrize("layout", GOOD)
def test_a_poisoned_model_is_judged_by_its_trigger_and_a_clean_one_by_what_it_keeps(
    layout: str, records: dict[str, CellRecord]
) -> None:
    clean, poisoned = (records[f"{GOOD[layout]}/id-0000000{index}"] for index in (0, 1))
    assert [r.subject.poisoned for r in (clean, poisoned)] == [False, True]
    assert clean.subject.dataset == poisoned.subject.dataset
    result = done(poisoned)
    before, after = result.before, result.after
    assert before.asr is not None
    assert after.asr is not None
    assert before.asr > (0 if layout == "round5" else 0.7)  # so short a training hardly plants anything in texts
    expected = (before.asr - after.asr) / before.asr * after.accuracy / before.accuracy
    assert result.nist_fidelity == pytest.approx(expected)
    assert result.triggered is not None
    kept = done(clean)
    assert (kept.before.asr, kept.after.asr, kept.triggered) == (None, None, None)
    assert kept.nist_fidelity == pytest.approx(kept.after.accuracy / kept.before.accuracy)


@pytest.mark.parametrize("layout", GOOD)
def test_no_method_sees_what_it_is_judged_on(layout: str, records: dict[str, CellRecord], folder: Path) -> None:
    name = f"{GOOD[layout]}/id-00000001"
    record, count = records[name], len(example_files(examples_of(folder / name)))
    assert record.per_class == 0
    assert record.clean_samples is not None
    if layout in FRESH:  # all examples to clean by, and others to judge by
        assert record.clean_samples == count
        assert any("fresh samples that are held back" in note for note in done(record).notes)
    else:
        assert 0 < done(record).count == count - record.clean_samples < record.clean_samples
        assert any("of its own examples, set aside" in note for note in done(record).notes)


def test_a_second_run_does_nothing(results: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in (results / "cells").iterdir()}
    monkeypatch.setattr(sweeping, "perform", lambda *_: pytest.fail("there is nothing to do"))
    done = run("bench", "--models", folder, *OPTIONS, "--out", results)
    assert done.exit_code == 0, done.stderr
    assert "cells: 6 done, 5 failed" in done.stdout
    assert {path: path.read_bytes() for path in (results / "cells").iterdir()} == before


def test_a_folder_that_was_mended_is_cleaned_without_being_asked_for(folder: Path, tmp_path: Path) -> None:
    """Its examples decide the result, so they are part of the key."""
    place = tmp_path / "models" / "one"
    shutil.copytree(folder / "bad" / "miscounted", place)
    first = models_in(tmp_path / "models", None)[0]
    options = ("bench", "--models", tmp_path / "models", *OPTIONS, "--per-class", 3, "--out", tmp_path / "r")
    assert "cells: 1 failed" in run(*options).stdout
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    (place / "config.json").write_text(json.dumps({**config, "number_classes": 2}), encoding="utf-8")
    again = models_in(tmp_path / "models", None)[0]
    assert (again.sha256, again.name) == (first.sha256, first.name)
    assert again.beside != first.beside
    assert "cells: 1 done" in run(*options).stdout
    found = {record.status: record for record in Store(tmp_path / "r").records()}
    assert (found["done"].per_class, found["done"].clean_samples) == (3, 6)


def test_a_stray_checkpoint_among_them_says_what_it_lacks(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "bad" / "truncated", tmp_path / "models" / "truncated")
    (tmp_path / "models" / "stray.pt").write_bytes(b"")
    run("bench", "--models", tmp_path / "models", *OPTIONS, "--out", tmp_path / "r")
    reasons = {record.subject.name: record.reason or "" for record in Store(tmp_path / "r").records()}
    assert reasons["stray"] == "DataError: stray brings no samples of its own; name labelled ones with --data"
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "models" / "stray.pt", tmp_path / "alone")
    refused = run("bench", "--models", tmp_path / "alone", *OPTIONS, "--out", tmp_path / "r")
    assert refused.exit_code == 2
    assert "--models needs --data" in refused.stderr


def test_of_a_poisoned_model_without_poisoned_examples_no_fidelity_is_claimed(folder: Path, tmp_path: Path) -> None:
    """What it keeps of its accuracy is the fidelity of a clean model alone."""
    place = tmp_path / "models" / "one"
    shutil.copytree(folder / "cyber" / "models" / "id-00000001", place)
    shutil.rmtree(place / "poisoned-example-data")
    run("bench", "--models", tmp_path / "models", *OPTIONS, "--out", tmp_path / "r")
    (record,) = Store(tmp_path / "r").records()
    assert record.subject.poisoned is True
    assert (done(record).before.asr, done(record).nist_fidelity) == (None, None)
