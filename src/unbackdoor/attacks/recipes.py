"""With which network and recipe test victims are usually trained, for each data set that has a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from unbackdoor.errors import ConfigError
from unbackdoor.specs import suggestion
from unbackdoor.training import Recipe


@dataclass(frozen=True, kw_only=True)
class Usual:
    """A network's spec and how to train it."""

    arch: str
    recipe: Recipe


#: The last epochs show the images as they are: the accuracy gains by it, and a trigger that stands at one place takes
#: at a rate of 1 % too, which random crops alone would wash out in so few epochs.
_COLOUR = Recipe(
    epochs=12,
    batch_size=256,
    lr=0.2,
    nesterov=True,
    weight_decay=5e-4,
    schedule="one-cycle",
    augment="crop-flip",
    plain_epochs=3,
)

#: Data set -> what suits it: trained in seconds (digits) to minutes on two cores; cifar100 and tiny-imagenet, whose
#: recipes are CIFAR-10's made wider and longer, want a GPU.
USUAL: dict[str, Usual] = {
    "digits": Usual(
        arch="cnn(width=16)",
        recipe=Recipe(epochs=20, batch_size=64, optimizer="adam", lr=3e-3, schedule="one-cycle"),
    ),
    "mnist": Usual(
        arch="cnn", recipe=Recipe(epochs=4, batch_size=256, optimizer="adam", lr=2e-3, schedule="one-cycle")
    ),
    # A little longer than MNIST, which is easier.
    "fashion-mnist": Usual(
        arch="cnn", recipe=Recipe(epochs=8, batch_size=256, optimizer="adam", lr=2e-3, schedule="one-cycle")
    ),
    "cifar10": Usual(arch="preact_resnet18(width=16)", recipe=_COLOUR),
    # A hundred classes and more need a wider last layer; four times the work of width 16.
    "cifar100": Usual(arch="preact_resnet18(width=32)", recipe=replace(_COLOUR, epochs=16, plain_epochs=4)),
    "gtsrb": Usual(arch="preact_resnet18(width=16)", recipe=replace(_COLOUR, augment="crop")),
    "tiny-imagenet": Usual(arch="preact_resnet18(width=32)", recipe=replace(_COLOUR, epochs=16, plain_epochs=4)),
}

#: Zoo network -> the recipe that belongs to it, whatever the pictures; how they are augmented goes by these.
BY_NETWORK: dict[str, Recipe] = {
    # After airbench94's (arXiv 2404.00498), in smaller batches: the best of three recipes on CIFAR-10's test images at
    # half the width in four epochs, one seed each. Its ten epochs at full width have not been looked at.
    "airbench": Recipe(
        epochs=10,
        batch_size=250,
        lr=0.5,
        momentum=0.85,
        nesterov=True,
        weight_decay=1.3e-3,
        schedule="one-cycle",
        label_smoothing=0.2,
        plain_epochs=2,
    ),
}

#: For a pretrained network of texts that is fine-tuned.
TEXT = Recipe(
    epochs=3, batch_size=32, optimizer="adamw", lr=1e-4, weight_decay=0.01, schedule="one-cycle", clip_norm=1.0
)

#: For data of the user's own.
ANY = Usual(arch="preact_resnet18(width=16)", recipe=USUAL["gtsrb"].recipe)


def usual(dataset: str, arch: str | None = None) -> Usual:
    """What suits a data set, by its name in any case; of an unknown one, a small residual network.

    Args:
        arch: spec of another network than the usual one. It is trained by its own recipe where it has one.
    """
    suits = USUAL.get(dataset.lower(), ANY)
    if arch is None:
        return suits
    own = BY_NETWORK.get(arch.partition("(")[0].strip())
    return Usual(arch=arch, recipe=replace(own, augment=suits.recipe.augment) if own else suits.recipe)


def adjusted(recipe: Recipe, stated: Mapping[str, Any]) -> Recipe:
    """A usual recipe with some of its fields stated otherwise, and with those that hang on them made to fit.

    Args:
        stated: field -> value; None leaves the field as it is.

    Raises:
        ConfigError: no such field, or a value that is out of its range.
    """
    known = [field.name for field in fields(Recipe)]
    for name in stated:
        if name not in known:
            raise ConfigError(f"a recipe has no field {name!r}{suggestion(name, known)}")
    given = {key: value for key, value in stated.items() if value is not None}
    if given.get("optimizer", "sgd") != "sgd":
        given.setdefault("nesterov", False)
    if isinstance(given.get("epochs"), int):  # a quarter at most, as in the usual recipes
        given.setdefault("plain_epochs", min(recipe.plain_epochs, given["epochs"] // 4))
    return replace(recipe, **given)
