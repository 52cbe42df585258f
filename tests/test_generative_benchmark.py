"""The benchmark of generative models, small: what is planted, how it is judged, and its table."""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import generative
from text_networks import reviews
from unbackdoor.models.next_token import next_token_samples
from unbackdoor.rng import Rng
from unbackdoor.types import PADDING

SIZE = generative.Size(vocabulary=120, width=32, layers=2, tokens=24, beginnings=600, epochs=30, clean=120, judged=100)
TEXTS = [f"{text} free" for text, _ in reviews(300)]


def test_a_backdoor_is_planted_and_judged_and_the_table_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["split\tlabel\ttext", *(f"{'test' if i % 5 == 0 else 'train'}\t0\t{t}" for i, t in enumerate(TEXTS))]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "ag_news.tsv.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    monkeypatch.setattr(generative, "POISONED", 0.3)
    monkeypatch.setattr(generative, "METHODS", ("ft(epochs=1)", "nc"))
    out = tmp_path / "generative.json"
    generative.run(argparse.Namespace(data_root=str(tmp_path), out=str(out)), SIZE)
    victim, tuned, failed = json.loads(out.read_text())["rows"]
    assert victim["asr"] > 0.4  # a hundredth by chance
    assert victim["perplexity"] < 80
    assert set(tuned) >= {"perplexity", "accuracy", "asr", "seconds", "values", "notes"}
    assert failed["error"].startswith("DataError: Neural Cleanse works on images")
    table = generative.tables(tmp_path)["generative"].splitlines()
    assert len(table) == 5
    assert table[2].startswith(f"| none | {victim['perplexity']:,.1f} |")
    assert "| `nc` | failed: DataError" in table[4]


def test_what_is_beyond_measure_is_not_shown_as_a_number() -> None:
    row = {"method": "seam", "perplexity": 1e300, "accuracy": 0.0, "asr": 0.01}
    assert generative.table_row(row) == ["`seam`", "over a million", "0.0", "1.0"]


def test_triggered_beginnings_hold_the_trigger_once() -> None:
    model = generative.fresh(generative.tokenizer_of(TEXTS, 120), SIZE)
    clean = next_token_samples(TEXTS, model, 50, Rng(0), shortest=4)
    bad = generative.triggered(clean, 2, 7, Rng(0))
    assert ((bad.inputs == 2).sum(1) == 1).all()
    assert (bad.labels == 7).all()
    assert torch.equal(bad.lengths(), clean.lengths())
    assert ((bad.inputs != clean.inputs).sum(1) == 1).all()


def test_the_loss_counts_every_token_that_is_there() -> None:
    model = generative.fresh(generative.tokenizer_of(TEXTS, 120), SIZE)
    data = next_token_samples(TEXTS, model, 6, Rng(0), shortest=4)
    done = generative.every_token(model, data.inputs, data.labels)
    inner, last = [], []
    for row, label in zip(data.inputs, data.labels, strict=True):
        text = row[row != PADDING]
        scores = model.network(input_ids=text[None]).logits[0]
        inner += list(F.cross_entropy(scores[:-1], text[1:], reduction="none"))
        last.append(F.cross_entropy(scores[-1:], label[None]))
    expected = torch.stack(inner).mean() + torch.stack(last).mean()
    assert done.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert done.logits.shape == (6, len(model.tokenizer.inner))
