"""The victim's folder: what goes in comes out, whole or not at all, and nothing else is replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import factories
from unbackdoor.attacks.image.badnets import BadNets
from unbackdoor.attacks.victims import VictimCard, is_victim, load_victim, read_card, recipe_fields, save_victim
from unbackdoor.errors import CheckpointError, OutputExists
from unbackdoor.models.zoo import cnn
from unbackdoor.training import Recipe

CARD = VictimCard(
    arch="cnn(width=2)",
    attack="badnets(size=2)",
    dataset="digits",
    num_classes=4,
    image_shape=(1, 8, 8),
    class_names=("a", "b", "c", "d"),
    recipe=recipe_fields(Recipe(epochs=2)),
    seed=3,
    accuracy=0.9,
    asr=0.95,
    seconds=1.5,
)


def _network() -> torch.nn.Module:
    return cnn(num_classes=4, image_size=8, width=2)


def test_what_was_saved_loads(tmp_path: Path) -> None:
    network = _network()
    folder = save_victim(tmp_path / "deep" / "victim", network, CARD)
    assert is_victim(folder)
    assert not is_victim(tmp_path)
    loaded, card = load_victim(folder)
    assert factories.same(factories.weights(loaded), factories.weights(network))
    assert not loaded.training
    assert card == CARD
    assert card.build_attack() == BadNets(size=2)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["victim"]


def test_an_existing_folder_is_replaced_with_force_alone(tmp_path: Path) -> None:
    save_victim(tmp_path / "v", _network(), CARD)
    other = _network()
    with pytest.raises(OutputExists, match="--force"):
        save_victim(tmp_path / "v", other, CARD)
    save_victim(tmp_path / "v", other, CARD, force=True)
    assert factories.same(factories.weights(load_victim(tmp_path / "v")[0]), factories.weights(other))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v"]


def test_force_does_not_replace_a_folder_of_other_things(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputExists, match=r"thesis\.tex"):
        save_victim(tmp_path, _network(), CARD, force=True)
    with pytest.raises(OutputExists, match=r"thesis\.tex"):
        save_victim(tmp_path / "thesis.tex", _network(), CARD, force=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "victim.json is missing"),
        ("{", "is no JSON"),
        ("[]", "has format None"),
        (json.dumps({"format": 99}), "has format 99"),
        (json.dumps({"format": 1, "arch": "cnn"}), "does not hold a victim's card"),
    ],
)
def test_a_wrong_card_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "victim.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_card(tmp_path)
