"""What one cell of a benchmark leaves behind: who was cleaned, by what, from how many samples, and what came of it.

A record is complete by itself: tables and pages are made from records alone, on a machine that has neither the victims
nor the data. A cell that failed or had to be left out leaves a record too, which says why.
"""

from __future__ import annotations

import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from unbackdoor.errors import DataError

#: Raised by one whenever a field changes its meaning, goes away, or is no longer optional.
SCHEMA_VERSION: Literal[1] = 1

#: ``done``: measured. ``failed``: the defense or the evaluation ended in an error. ``skipped``: not run, on purpose,
#: such as where the attack did not take.
Status = Literal["done", "failed", "skipped"]


class _Part(BaseModel):
    """Frozen, and strict about names. Infinities and NaN are written as strings, so that the file is plain JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Subject(_Part):
    """The network that was to be cleaned.

    Attributes:
        key: of the planted victim's resolved fields, or the SHA-256 of the given file.
        name: to show, such as "cifar10-badnets" or "id-00000007".
        planted: whether the benchmark planted it; False for a network that somebody gave.
        dataset: what it was trained on, where that is known.
        arch: its spec or class.
        attack: the attack's spec; None for a clean network, and where no attack is known.
        fields: the attack's resolved fields.
        rate: share of the training set that is poisoned, in [0, 1].
        target: the attacker's class, where there is one.
        seed: of the planting.
        accuracy: at planting, on the whole test set, in [0, 1].
        asr: attack success rate at planting, in [0, 1].
        seconds: that planting took.
        poisoned: whether it has a backdoor, where that is known for sure; no defense is told.
    """

    key: str
    name: str
    planted: bool = True
    dataset: str | None = None
    arch: str | None = None
    num_classes: int | None = None
    attack: str | None = None
    fields: dict[str, JsonValue] = Field(default_factory=dict)
    rate: float | None = None
    target: int | None = None
    seed: int | None = None
    accuracy: float | None = None
    asr: float | None = None
    seconds: float | None = None
    poisoned: bool | None = None

    @property
    def attack_name(self) -> str | None:
        """The attack without its settings."""
        return None if self.attack is None else self.attack.partition("(")[0]


class Scores(_Part):
    """Rates in [0, 1] of one network; ``asr`` and ``ra`` are None where no trigger is known."""

    accuracy: float
    asr: float | None = None
    ra: float | None = None


class Result(_Part):
    """What the removal did.

    Attributes:
        count: test samples that accuracy was measured on.
        triggered: test samples that ASR and RA were measured on.
        der: defense effectiveness rating; this and the fidelities are None where they are undefined.
        seconds: of the defense alone.
        images: that passed through the network in training, trials included.
        peak_memory_mib: None where the platform does not tell.
        values: the single figures of the defense's trace.
    """

    before: Scores
    after: Scores
    count: int
    triggered: int | None = None
    der: float | None = None
    fidelity: float | None = None
    fidelity_gap: float | None = None
    nist_fidelity: float | None = None
    seconds: float
    images: int
    peak_memory_mib: float | None = None
    values: dict[str, JsonValue] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Provenance(_Part):
    """Where and when it ran. Stored, and part of no key."""

    created: str = Field(description="UTC, ISO 8601")
    unbackdoor: str
    torch: str
    python: str
    commit: str | None = None
    device: str
    hardware: str
    threads: int


class CellRecord(_Part):
    """One cell: a subject, a defense, a budget of clean samples, a seed, and what came of it.

    Attributes:
        key: of the cell's resolved fields; the same cell has the same key everywhere.
        defense: its spec, as short as it can be said.
        fields: its resolved fields.
        per_class: clean samples of each class that the defense was promised; 0 means all that there were.
        share: the same as a share of the training set in [0, 1], where the plan said it so.
        clean_samples: how many the defense got; None where it never ran.
        result: there if and only if ``status`` is "done".
        reason: there if and only if it is not: the error's kind and message, or why the cell was left out.
        flags: names of the evaluation's flags that were raised.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    key: str
    status: Status
    subject: Subject
    defense: str
    fields: dict[str, JsonValue] = Field(default_factory=dict)
    per_class: int
    share: float | None = None
    seed: int
    clean_samples: int | None = None
    result: Result | None = None
    reason: str | None = None
    flags: tuple[str, ...] = ()
    provenance: Provenance

    @property
    def defense_name(self) -> str:
        """The defense without its settings."""
        return self.defense.partition("(")[0]

    @model_validator(mode="after")
    def _tells_what_came_of_it(self) -> CellRecord:
        if (self.status == "done") != (self.result is not None) or (self.status == "done") != (self.reason is None):
            raise ValueError(f"a cell that is {self.status} has a result if it is done, and a reason if it is not")
        return self

    @classmethod
    def parse(cls, text: str | bytes, where: str) -> CellRecord:
        """Read one record's JSON.

        Args:
            where: what to call the text in an error, such as its file's name.

        Raises:
            DataError: it is no record, or one of another schema version.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise DataError(f"{where} cannot be read as a record: {error}") from error
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            raise DataError(f"{where} has schema version {version!r}; this release reads version {SCHEMA_VERSION}")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise DataError(f"{where} is no record: {place}: {first['msg']}") from error
