"""``Store``: a folder of victims and records that any number of processes fill, and that killing one cannot harm.

    bench.json            what this folder is
    victims/KEY/          a planted victim: weights, card, what its trigger learned
    workshop/             surrogates, encoders and generators, shared by all victims
    before/KEY.json       how a network did before any removal, measured once
    cells/KEY.json        a record
    claims/KEY            who works on what; see :mod:`unbackdoor.bench.claims`

Everything appears whole, under a key of all that decides it: that it exists is that it is done.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from unbackdoor import files
from unbackdoor.attacks.victims import is_victim
from unbackdoor.bench.claims import BEAT, PATIENCE, Claims
from unbackdoor.bench.records import CellRecord
from unbackdoor.errors import ConfigError, DataError
from unbackdoor.evaluation.assessment import Assessment

_FORMAT = 1
_MARK = "bench.json"
_ASSESSMENT = TypeAdapter(Assessment)
#: Seconds after which what is half written counts as left behind; writing takes moments.
LEFT_BEHIND = 3600.0


def is_store(folder: Path) -> bool:
    """Whether a folder holds the results of a benchmark."""
    return (folder / _MARK).is_file()


class Store:
    """The results in a folder.

    Args:
        folder: it is made where there is none.

    Raises:
        ConfigError: the folder holds something else.
    """

    def __init__(self, folder: Path | str, *, beat: float = BEAT, patience: float = PATIENCE) -> None:
        self.folder = Path(folder)
        self._claim(self.folder)
        self.cells, self.victims = self.folder / "cells", self.folder / "victims"
        self.workshop, self._before = self.folder / "workshop", self.folder / "before"
        for part in (self.cells, self.victims, self.folder / "claims"):
            part.mkdir(exist_ok=True)
        self.claims = Claims(self.folder / "claims", beat=beat, patience=patience)

    @staticmethod
    def _claim(folder: Path) -> None:
        mark = folder / _MARK
        if mark.is_file():
            try:
                version = json.loads(mark.read_text(encoding="utf-8"))["format"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{mark} cannot be read: {error}") from None
            if version != _FORMAT:
                raise ConfigError(f"{folder} has format {version!r}; this release works with format {_FORMAT}")
            return
        used = folder.exists() and (not folder.is_dir() or any(folder.glob("[!.]*")))
        if used and not mark.is_file():  # another process may have made it just now
            raise ConfigError(f"{folder} is no folder of benchmark results, and not empty; choose another --out")
        if not used:
            files.write(mark, (json.dumps({"format": _FORMAT}) + "\n").encode(), force=True)

    # Records

    def keys(self) -> set[str]:
        """Of all records."""
        return {path.stem for path in self.cells.glob("[!.]*.json")}

    def has(self, key: str) -> bool:
        return self._record(key).is_file()

    def record(self, key: str) -> CellRecord:
        """The record of a cell.

        Raises:
            DataError: there is none, or it is damaged.
        """
        path = self._record(key)
        try:
            return CellRecord.parse(path.read_bytes(), str(path))
        except FileNotFoundError:
            raise DataError(f"{path} is missing: this cell has no record") from None

    def records(self) -> Iterator[CellRecord]:
        """All of them, by key."""
        for key in sorted(self.keys()):
            yield self.record(key)

    def save(self, record: CellRecord) -> None:
        """Write a record, in place of one of the same key."""
        files.write(self._record(record.key), (record.model_dump_json(indent=1) + "\n").encode(), force=True)

    def forget(self, key: str) -> None:
        """Remove a record, so that its cell is run again."""
        self._record(key).unlink(missing_ok=True)

    def _record(self, key: str) -> Path:
        return self.cells / f"{key}.json"

    # Victims

    def victim(self, key: str) -> Path:
        """The folder of a victim."""
        return self.victims / key

    def has_victim(self, key: str) -> bool:
        return is_victim(self.victim(key))

    def before(self, key: str) -> Assessment | None:
        """What :meth:`save_before` kept; None where there is nothing."""
        path = self._before / f"{key}.json"
        try:
            return _ASSESSMENT.validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise DataError(f"{path} is damaged; delete it to have it made anew: {error.errors()[0]['msg']}") from None

    def save_before(self, key: str, found: Assessment) -> None:
        files.write(self._before / f"{key}.json", _ASSESSMENT.dump_json(found), force=True)

    # Housekeeping

    def tidy(self) -> int:
        """Remove what killed processes left half written long ago. Returns how many."""
        now, removed = self.claims.now(), 0
        for part in (self.cells, self.victims, self.workshop, self._before, self.claims.folder):
            for path in part.glob(".*"):
                with suppress(FileNotFoundError):
                    if now - path.stat().st_mtime < LEFT_BEHIND:
                        continue
                    if path.is_dir():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink()
                    removed += 1
        return removed
