"""A folder of results that appears whole: refused up front where it would overwrite, written aside, then moved."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from unbackdoor.errors import ConfigError, OutputExists


def refuse(out: Path, names: Sequence[str], *, force: bool, given: Path | None = None) -> None:
    """Say before any work is done that the results could not be written.

    Args:
        out: the folder.
        names: of the files to come.
        force: what is there may be replaced; never ``given``, the user's own model.

    Raises:
        OutputExists: one of the files is there.
        ConfigError: ``out`` is no folder or cannot be written to, or a result would take the place of ``given``.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; a folder is needed")
    there = [out / name for name in names if (out / name).exists()]
    if given is not None and any(path.samefile(given) for path in there):
        raise ConfigError(f"--out {out} would overwrite {given} itself; choose another folder")
    if there and not force:
        raise OutputExists(
            f"{', '.join(map(str, there))} would be overwritten; choose another --out, or replace with --force"
        )
    nearest = next(folder for folder in (out, *out.resolve().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {out}: {nearest} is not a folder that can be written to")


@contextmanager
def staged(out: Path, *, stale: Sequence[str] = ()) -> Iterator[Path]:
    """An empty folder to write in; at the end its files are moved to ``out``, or nothing is if the block fails.

    Args:
        stale: names of an earlier run's files in ``out`` that must not stay beside the new ones.
    """
    place = out if out.is_dir() else out.parent  # the same file system as ``out`` in any case
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place, prefix=".writing-") as made:
        folder = Path(made) / "new"
        folder.mkdir()
        yield folder
        if not out.is_dir():
            folder.replace(out)
            return
        for name in stale:
            (out / name).unlink(missing_ok=True)
        for file in sorted(folder.iterdir()):
            file.replace(out / file.name)
