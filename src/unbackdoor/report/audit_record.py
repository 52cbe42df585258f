"""``audit.json``: everything that an audit says, as a frozen model with a schema version."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from unbackdoor import files
from unbackdoor.analysis.audit.calibration import Calibration
from unbackdoor.report.audit_finding import AuditFinding
from unbackdoor.report.record import LoadedModel, Record, Versions, read_record

#: Raised by one whenever a field changes its meaning, goes away, or is no longer optional.
SCHEMA_VERSION: Literal[1] = 1


class AuditReport(Record):
    """An audit, and what it was made of.

    Attributes:
        samples: clean samples that were given.
        image_shape: (C, H, W).
        class_names: may be empty.
        found: the verdict and all figures.
        calibration: weights and threshold, and how often the audit was right about other networks.
        seconds: wall time of the audit.
        notes: what was assumed or converted in loading.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    created: str = Field(description="UTC, ISO 8601")
    model: LoadedModel
    samples: int
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    seed: int
    found: AuditFinding
    calibration: Calibration
    seconds: float
    versions: Versions
    notes: tuple[str, ...] = ()

    def class_name(self, index: int) -> str:
        """What to call a class: its name, or its number."""
        return self.class_names[index] if index < len(self.class_names) else str(index)

    def save(self, path: Path | str, *, force: bool = False) -> Path:
        """Write ``audit.json``, whole or not at all.

        Raises:
            OutputExists: the file is there and ``force`` is not given.
        """
        return files.write(Path(path), (self.model_dump_json(indent=1) + "\n").encode(), force=force)

    @classmethod
    def load(cls, path: Path | str) -> AuditReport:
        """Read what :meth:`save` wrote.

        Raises:
            DataError: the file is no audit, or one of another schema version.
        """
        return read_record(cls, Path(path), SCHEMA_VERSION, "an audit")
