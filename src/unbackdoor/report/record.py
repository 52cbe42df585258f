"""``report.json``: everything that a removal's report says, as frozen models with a schema version.

The record alone makes the page (:func:`unbackdoor.report.html.render`); reading it back gives an equal object.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, ValidationError

from unbackdoor import files
from unbackdoor.errors import DataError
from unbackdoor.evaluation.assessment import Assessment
from unbackdoor.evaluation.canaries import CanaryTest
from unbackdoor.evaluation.checks import Flag
from unbackdoor.evaluation.verdict import Verdict
from unbackdoor.evaluation.weights import WeightChange
from unbackdoor.report.audit_finding import RemovalAudit
from unbackdoor.types import InputKind, Trace

#: Raised by one whenever a field changes its meaning, goes away, or is no longer optional.
SCHEMA_VERSION: Literal[1] = 1

#: A PNG picture in base64.
Png = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]+={0,2}$")]


class Record(BaseModel):
    """Frozen, and strict about names. Infinities and NaN are written as strings, so that the file is plain JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class LoadedModel(Record):
    """The network that came in.

    Attributes:
        name: what to call it, such as the file's name.
        architecture: its spec or class.
        path: where it was read, if from a file.
        sha256: of that file.
        parameters: how many numbers it learned.
        input_format: what the network expects its pixels to be, in words.
    """

    name: str
    architecture: str
    path: str | None = None
    sha256: str | None = None
    parameters: int
    input_format: str = "RGB or grey in [0, 1]"


class GivenSamples(Record):
    """The clean samples that came in, and how they were used.

    Attributes:
        count: how many the user gave.
        per_class: how many of each class.
        class_names: may be empty.
        kind: what they are.
        image_shape: of one sample: (C, H, W); (L,), the tokens of the longest text; or (D,).
        defense_count: how many the defense got to see.
    """

    count: int
    per_class: tuple[int, ...]
    class_names: tuple[str, ...] = ()
    kind: InputKind = "image"
    image_shape: tuple[int, ...]
    defense_count: int

    @property
    def num_classes(self) -> int:
        return len(self.per_class)


class Measured(Record):
    """On which samples "before" and "after" were measured.

    ``source`` is "test" (a separate set), "held_out" (a share of the clean samples that the defense never saw) or
    "given" (the very samples that the defense saw: optimistic).
    """

    source: Literal["test", "held_out", "given"]
    count: int
    per_class: tuple[int, ...]


class Method(Record):
    """The defense: its spec, all its resolved fields, and the seed."""

    spec: str
    fields: dict[str, JsonValue]
    seed: int


class Cost(Record):
    """What the removal took.

    Attributes:
        seconds: wall time of the defense alone.
        images: that passed through the network in training.
        peak_memory_mib: of ``memory_of``; None where the platform does not tell.
        memory_of: "process" is the whole process since its start (an upper bound), "device" the accelerator's tensors
            during the defense.
        device: such as "cpu" or "cuda:0".
        threads: of torch on the CPU.
    """

    seconds: float
    images: int
    peak_memory_mib: float | None
    memory_of: Literal["process", "device"]
    device: str
    threads: int


class Versions(Record):
    """What it ran on."""

    unbackdoor: str
    torch: str
    python: str


class Example(Record):
    """One image without and with the trigger, their amplified difference, and what the model said to the triggered one.

    ``label`` is the true class, ``wanted`` the attacker's; ``before`` and ``after`` are predictions (−1: not finite).
    """

    clean: Png
    triggered: Png
    residual: Png
    label: int
    wanted: int
    before: int
    after: int


class TextExample(Record):
    """One text without and with the trigger, and what the model said to the triggered one.

    ``triggered`` is in pieces, each with whether the trigger put it there; ``label``, ``wanted``, ``before`` and
    ``after`` are as in :class:`Example`.
    """

    clean: str
    triggered: tuple[tuple[str, bool], ...]
    label: int
    wanted: int
    before: int
    after: int


class KnownAttack(Record):
    """The part of a report that only a known trigger allows. The rates themselves stand in the two assessments.

    The fidelities are None where they are undefined (nothing before to divide by).
    """

    spec: str
    fields: dict[str, JsonValue]
    der: float
    fidelity: float | None
    fidelity_gap: float
    nist_fidelity: float | None
    examples: tuple[Example, ...] = ()
    texts: tuple[TextExample, ...] = ()
    residual_gain: float = Field(1.0, description="what the difference was multiplied by in the residual pictures")


class Report(Record):
    """A removal, from what came in to the verdict. ``notes`` say what was assumed or converted in loading."""

    schema_version: Literal[1] = SCHEMA_VERSION
    created: str = Field(description="UTC, ISO 8601")
    verdict: Verdict
    model: LoadedModel
    samples: GivenSamples
    measured: Measured
    method: Method
    before: Assessment
    after: Assessment
    trace: Trace
    weights: tuple[WeightChange, ...]
    cost: Cost
    versions: Versions
    flags: tuple[Flag, ...] = ()
    attack: KnownAttack | None = None
    canaries: CanaryTest | None = None
    audit: RemovalAudit | None = None
    notes: tuple[str, ...] = ()

    def save(self, path: Path | str, *, force: bool = False) -> Path:
        """Write ``report.json``, whole or not at all.

        Raises:
            OutputExists: the file is there and ``force`` is not given.
        """
        return files.write(Path(path), (self.model_dump_json(indent=1) + "\n").encode(), force=force)

    @classmethod
    def load(cls, path: Path | str) -> Report:
        """Read what :meth:`save` wrote.

        Raises:
            DataError: the file is no report, or one of another schema version.
        """
        return read_record(cls, Path(path), SCHEMA_VERSION, "a report")

    @property
    def things(self) -> str:
        """What the samples are, in the plural."""
        return {"image": "images", "text": "texts", "features": "samples"}[self.samples.kind]

    def class_name(self, index: int) -> str:
        """What to call a class: its name, or its number."""
        names = self.samples.class_names
        if index < 0:
            return "not finite"
        return names[index] if index < len(names) else str(index)


R = TypeVar("R", bound=Record)


def read_record(kind: type[R], path: Path, schema_version: int, what: str) -> R:
    """Read a record from its JSON file.

    Args:
        what: what to call it in an error, with its article.

    Raises:
        DataError: the file is no such record, or one of another schema version.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as {what}: {error}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != schema_version:
        raise DataError(f"{path} has schema version {version!r}; this release reads version {schema_version}")
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path} is not {what}: {where}: {first['msg']}") from error


def jsonable(value: Any) -> JsonValue:
    """Resolved fields as plain JSON: tuples become lists, everything unknown its text."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
