"""``auto``: the method that suits a network, found on a copy with backdoors that we know."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from factories import convolutional, same, samples, weights
from tuning_scenes import RESIDUAL, scene
from unbackdoor import specs
from unbackdoor.automatic import Auto
from unbackdoor.errors import ConfigError
from unbackdoor.rng import Rng
from unbackdoor.types import Removal, Samples

SHORT = "planting=40"


def run(text: str, model: Any, clean: Samples) -> Removal:
    removal: Removal = specs.build("defense", text)(model, clean, Rng(0))
    return removal


@pytest.mark.slow
def test_it_takes_the_first_that_removes_the_canaries() -> None:
    """Of a short fine-tuning the canaries take no notice. The true backdoor goes the same way, though none was told."""
    digits = scene(arch=RESIDUAL)
    removal = digits.removal("auto(candidates=('ft(epochs=1)', inoculation, seam))")
    values = removal.trace.values
    assert int(values["canaries that took"]) >= 3
    assert float(values["canaries left by ft(epochs=1)"]) > 0.5
    assert values["method"] in ("inoculation", "seam")
    if values["method"] == "inoculation":
        assert not any("seam" in name for name in values)
    else:
        assert float(values["canaries left by inoculation"]) > 0.25
    accuracy, asr = digits.rates(removal)
    assert asr <= 0.1
    assert accuracy >= digits.rates()[0] - 0.05
    # Trials and planting are part of what it cost.
    shown = sum(e.images for p in removal.trace.phases for e in p.epochs)
    assert removal.trace.images >= shown + 5000


def test_the_chosen_method_runs_on_all_samples_of_the_given_network() -> None:
    model, clean = convolutional(), samples(40, size=16)
    made = run(f"auto(candidates=('ft(epochs=2)',), most_left=1, max_loss=1, {SHORT})", model, clean)
    alone = specs.build("defense", "ft(epochs=2, augment=crop)")(model, clean, Rng(0).child("defense"))
    assert same(weights(made.model), weights(alone.model))
    assert made.trace.phases[0].epochs[0].images == 40


def test_augmentation_is_handed_on_where_none_is_stated() -> None:
    made = Auto(candidates=("ft", "ft(augment=none)", "clp"), otherwise="seam(preset=plain)", augment="crop-flip")
    found = {text: getattr(defense, "augment", None) for text, defense in made.defenses().items()}
    assert found == {"ft": "crop-flip", "ft(augment=none)": "none", "clp": None, "seam(preset=plain)": "crop"}


def test_where_no_canary_takes_the_first_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unbackdoor.automatic.ATTACK_TOOK", 1.01)
    made = run("auto(candidates=('ft(epochs=1)', clp), planting=1)", convolutional(), samples(40, size=16))
    assert made.trace.values["method"] == "ft(epochs=1)"
    assert "no canary took, so ft(epochs=1) was taken without a trial" in made.trace.notes


def test_where_none_will_do_the_least_bad_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so. A method that cannot run is passed over."""
    # All canaries are there, and none ever goes.
    monkeypatch.setattr("unbackdoor.automatic._Trials._success", lambda self, model, _: float(model is not self.model))
    model, clean = convolutional(norm=False), samples(40, size=16)
    made = run(
        f"auto(candidates=(bnp, 'ft(epochs=1)', 'fst(epochs=1, images=0)'), most_left=0, max_loss=0, {SHORT})",
        model,
        clean,
    )
    assert made.trace.values["method"] in ("ft(epochs=1)", "fst(epochs=1, images=0)")
    assert any(note.startswith("bnp could not be tried: ") for note in made.trace.notes)
    assert any(
        note.startswith("no method left at most 0% of the canaries for at most 0% of") for note in made.trace.notes
    )


def test_without_images_the_other_method_is_taken() -> None:
    x = torch.randn(24, 12, generator=Rng(0).stream("features"))
    clean = Samples(x, torch.arange(24) % 2, 2)
    made = run("auto(otherwise='ft(epochs=1)')", torch.nn.Linear(12, 2), clean)
    assert made.trace.values["method"] == "ft(epochs=1)"
    assert made.trace.notes[0] == "there are no canaries but for images: ft(epochs=1) was taken without a trial"


def test_with_one_image_a_class_the_first_is_taken() -> None:
    made = run("auto(candidates=('ft(epochs=1)', seam))", convolutional(), samples(4, size=16))
    assert made.trace.values["method"] == "ft(epochs=1)"
    assert made.trace.notes[0].startswith("no class has two samples to try with")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"candidates": ()}, "candidates"),
        ({"candidates": ("seam", "auto")}, "auto cannot choose itself"),
        ({"otherwise": "auto"}, "auto cannot choose itself"),
        ({"candidates": ("seem",)}, "seem"),
        ({"most_left": 1.5}, "most_left"),
        ({"max_loss": -0.1}, "max_loss"),
        ({"held_out": 0.0}, "held_out"),
        ({"planting": 0}, "images"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Auto(**settings)
