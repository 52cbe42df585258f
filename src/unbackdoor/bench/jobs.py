"""What there is to do, as frozen dataclasses of specs and keys only: they cross to other processes and machines.

A key is a hash of all that decides a result: every resolved field and the ``VERSION`` of what computes it. The device,
the number of threads and the batches of the evaluation are no part of it, nor is where anything lies.
"""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, TypeAlias

from pydantic import JsonValue

from unbackdoor import specs
from unbackdoor.attacks.victims import recipe_fields
from unbackdoor.errors import ConfigError
from unbackdoor.evaluation.checks import ATTACK_TOOK
from unbackdoor.models.zoo import ZOO
from unbackdoor.training import Recipe

#: Raised by one when the same fields lead to another victim.
VICTIM_VERSION = 1
#: Raised by one when cells draw their clean samples, or measure, in another way.
PROTOCOL_VERSION = 1
#: The budget of a network that brings its own clean samples: all of them, but for those that it is judged on.
ALL = 0


@dataclass(frozen=True, kw_only=True)
class VictimJob:
    """A network to be planted.

    Attributes:
        dataset: its name.
        train_size: images of its training set; tells a part of a data set from the whole of it.
        arch: the network's spec.
        attack: the attack's spec; None for a clean network.
        recipe: how it is trained.
        seed: of its weights, its poison and its training.
    """

    dataset: str
    train_size: int
    arch: str
    attack: str | None
    recipe: Recipe
    seed: int = 0

    @cached_property
    def key(self) -> str:
        """16 hexadecimal digits."""
        return specs.key(
            {
                "what": "victim",
                "version": VICTIM_VERSION,
                "dataset": self.dataset,
                "train_size": self.train_size,
                "arch": network_fields(self.arch),
                "attack": None if self.attack is None else spec_fields("attack", self.attack),
                "recipe": recipe_fields(self.recipe),
                "seed": self.seed,
            }
        )

    @cached_property
    def untouched(self) -> VictimJob | None:
        """The same network, trained alike without the attack; None where there is no attack."""
        return None if self.attack is None else replace(self, attack=None)

    @property
    def name(self) -> str:
        """To show: ``digits-badnets-rate0.1``."""
        return f"{self.dataset}-{slug(self.attack or 'clean')}"

    @property
    def identity(self) -> JsonValue:
        """What the key of a cell takes it by."""
        return self.key


@dataclass(frozen=True, kw_only=True)
class GivenModel:
    """A network that somebody gave.

    Attributes:
        path: of the checkpoint, or of the folder of a victim, of a TrojAI model or of a text classifier.
        name: to show, and to tell two copies of one file apart.
        sha256: of the checkpoint's content; None where it cannot be read.
        data: labelled images or texts, as :func:`unbackdoor.data.loading.load_samples` and
            :func:`unbackdoor.data.texts.load_texts` take them; None where the model brings its own, or none are stated.
        beside: the SHA-256 of what belongs to the model beside the checkpoint: a TrojAI folder's examples and settings,
            a tokenizer; None where there is nothing, or it cannot be read.
        arch: the network's spec, where the file does not tell.
        normalize: its input format; None finds it on the clean samples.
    """

    path: str
    name: str
    sha256: str | None
    data: str | None
    arch: str | None = None
    normalize: str | None = None
    beside: str | None = None

    @property
    def key(self) -> str:
        """The SHA-256 of the file."""
        return self.sha256 or specs.key({"what": "unreadable", "name": self.name})

    @property
    def identity(self) -> JsonValue:
        """What the key of a cell takes it by: not by its place, so that the folder may move."""
        told: dict[str, JsonValue] = {
            "model": self.key,
            "name": self.name,
            "data": self.data,
            "arch": self.arch,
            "normalize": self.normalize,
        }
        return told if self.beside is None else {**told, "beside": self.beside}


Subject: TypeAlias = VictimJob | GivenModel


@dataclass(frozen=True, kw_only=True)
class CellJob:
    """One removal.

    Attributes:
        subject: the network to clean.
        defense: its spec.
        per_class: clean samples of each class that the defense gets; :data:`ALL` are all that there are.
        share: the same as a share of the training set, where it was asked for so; no part of the key.
        seed: of the draw of clean samples, and of the defense.
        min_asr: below this at planting, the attack did not take and the cell is skipped, as it is where the attack
            broke its network; 0 skips nothing. No part of the key.
    """

    subject: Subject
    defense: str
    per_class: int
    share: float | None = None
    seed: int = 0
    min_asr: float = ATTACK_TOOK

    @cached_property
    def key(self) -> str:
        """16 hexadecimal digits."""
        return specs.key(
            {
                "what": "cell",
                "version": PROTOCOL_VERSION,
                "subject": self.subject.identity,
                "defense": spec_fields("defense", self.defense),
                "per_class": self.per_class,
                "seed": self.seed,
            }
        )

    @property
    def victim(self) -> VictimJob | None:
        """What has to be planted first."""
        return self.subject if isinstance(self.subject, VictimJob) else None

    @property
    def name(self) -> str:
        """To show: ``digits-badnets-rate0.1 seam 10/class seed 0``."""
        budget = "all" if self.per_class == ALL else f"{self.per_class}/class"
        return f"{self.subject.name} {self.defense} {budget} seed {self.seed}"


def spec_fields(kind: specs.Kind, text: str) -> dict[str, Any]:
    """All fields of what a spec names, as plain JSON values."""
    fields: dict[str, Any] = json.loads(_resolved(kind, text))
    return fields


@lru_cache(maxsize=1024)
def _resolved(kind: specs.Kind, text: str) -> str:
    """As JSON: the thousands of cells of a graph name few things."""
    return json.dumps(specs.resolved(specs.build(kind, text), kind))


def network_fields(arch: str) -> dict[str, Any]:
    """A network's name and arguments; of the zoo's, those too that the spec leaves at their defaults.

    Raises:
        ConfigError: it is no spec, or has an argument that a network of the zoo does not take.
    """
    name, given = specs.parse(arch)
    usual: dict[str, Any] = {}
    if name in ZOO:
        told_by_the_data = ("num_classes", "in_channels", "image_size")
        parameters = inspect.signature(ZOO[name]).parameters.values()
        usual = {p.name: p.default for p in parameters if p.name not in told_by_the_data}
        for argument in given:
            if argument not in usual:
                raise ConfigError(f"{name} takes no {argument!r}{specs.suggestion(argument, list(usual))}")
    return {"name": name, **usual, **given}


def slug(text: str) -> str:
    """A spec in characters that any file name may hold: ``badnets(rate=0.1, size=2)`` to ``badnets-rate0.1-size2``."""
    return re.sub(r"[^\w.]+", "-", text.replace("=", "")).strip("-")
