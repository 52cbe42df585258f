"""``bench --models`` on folders of text classifiers, with a table of texts as clean samples."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from cli_runs import run
from text_networks import as_tsv, reviews, saved, trained
from unbackdoor import specs
from unbackdoor.attacks.victims import VictimCard, attack_fields, save_victim
from unbackdoor.bench.given import models_in
from unbackdoor.bench.records import CellRecord
from unbackdoor.bench.store import Store
from unbackdoor.models.architectures import build_network
from unbackdoor.rng import Rng

OPTIONS = ("--defense", "ft(epochs=1, lr=0.01, steady=False)", "--per-class", 10, "--by", "here", "--device", "cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("texts")
    saved(made / "models" / "good")
    saved(made / "models" / "torn")
    weights = made / "models" / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    saved(made / "models" / "pickled")
    (made / "models" / "pickled" / "model.safetensors").rename(made / "models" / "pickled" / "pytorch_model.bin")
    network = build_network("cnn(width=4)", num_classes=2, in_channels=1, image_size=8, rng=Rng(0))
    torch.save(network.state_dict(), made / "models" / "image.pt")
    as_tsv(reviews(120, seed=1), made / "reviews.tsv")
    return made


@pytest.fixture(scope="module")
def records(place: Path) -> dict[str, CellRecord]:
    options = ("--models", place / "models", "--data", place / "reviews.tsv", *OPTIONS, "--out", place / "results")
    for _ in range(2):  # the second run finds all of it there
        done = run("bench", *options)
        assert done.exit_code == 0, done.stderr
        assert "cells: 1 done, 3 failed" in done.stdout
    return {record.subject.name: record for record in Store(place / "results").records()}


def test_a_folder_of_transformers_is_one_model(place: Path) -> None:
    names = [model.name for model in models_in(place / "models", "reviews.tsv")]
    assert names == ["good", "image", "pickled", "torn"]


def test_a_text_classifier_is_cleaned_by_a_table(records: dict[str, CellRecord]) -> None:
    record = records["good"]
    assert record.result is not None
    assert (record.clean_samples, record.result.count) == (20, 60)
    assert record.result.before.accuracy > 0.9
    assert (record.subject.arch, record.subject.num_classes) == ("BertForSequenceClassification", 2)
    assert record.result.nist_fidelity is None  # nobody knows whether it is clean


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torn", "CheckpointError: .*cannot be read|damaged"),
        ("pickled", "UnsafeCheckpoint: .*pytorch_model.bin"),
        ("image", "DataError: image is a network of images, and .*reviews.tsv holds texts"),
    ],
)
def test_what_does_not_fit_says_so(name: str, words: str, records: dict[str, CellRecord]) -> None:
    assert re.search(words, records[name].reason or ""), records[name].reason


def test_images_are_no_samples_for_texts(place: Path, tmp_path: Path) -> None:
    options = ("--models", place / "models" / "good", "--data", "digits", *OPTIONS, "--out", tmp_path / "r")
    assert "cells: 1 failed" in run("bench", *options).stdout
    (record,) = Store(tmp_path / "r").records()
    told = "good is a classifier of texts, and digits holds none; a table of texts is needed"
    assert record.reason == f"DataError: {told}"


def test_a_text_victims_trigger_is_known(place: Path, tmp_path: Path) -> None:
    card = VictimCard(
        arch="transformers",
        **attack_fields(specs.build("attack", "words")),
        dataset="reviews",
        num_classes=2,
        kind="text",
        image_shape=(48,),
        seed=0,
        accuracy=0.95,
        asr=0.9,
        seconds=1.0,
    )
    save_victim(tmp_path / "models" / "victim", trained(), card)
    run("bench", "--models", tmp_path / "models", "--data", place / "reviews.tsv", *OPTIONS, "--out", tmp_path / "r")
    (record,) = Store(tmp_path / "r").records()
    assert record.result is not None, record.reason
    assert (record.subject.attack, record.subject.poisoned, record.subject.asr) == ("words", True, 0.9)
    assert record.result.before.asr is not None
    assert record.result.triggered == 30  # of the 60 that it is judged on, those of the other class
