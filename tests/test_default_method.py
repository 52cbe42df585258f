"""Without a method named, ``auto`` chooses; what it chose is what canaries then test."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from factories import convolutional, samples
from unbackdoor import api
from unbackdoor.cli import clean as cli_clean

SHORT = "auto(candidates=('ft(epochs=1)', 'ft(epochs=2)'), most_left=1, max_loss=1, planting=40)"


def test_auto_is_the_default_everywhere() -> None:
    for command in (api.clean, cli_clean.clean):
        assert inspect.signature(command).parameters["method"].default == "auto"


def test_canaries_test_what_was_chosen_and_not_the_choosing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def seen(model: Any, shown: Any, judged: Any, defense: Any, *_: Any, **__: Any) -> None:
        asked.append(defense)

    monkeypatch.setattr(api, "try_canaries", seen)
    for method in (SHORT, "ft(epochs=3)"):
        api.clean(convolutional(), samples(60, size=16), method, canaries=True)
    assert [(type(d).__name__, d.epochs, d.augment) for d in asked] == [
        ("FineTune", 1, "crop"),
        ("FineTune", 3, "crop"),
    ]
