"""``Loaded``: samples and what was noticed while reading them, with the checks that every source shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unbackdoor.errors import DataError
from unbackdoor.types import Samples

SHOWN_NAMES = 5


@dataclass(frozen=True, slots=True)
class Loaded:
    """Samples, and in plain words what was assumed, converted or left out to get them."""

    samples: Samples
    notes: tuple[str, ...] = ()


def checked(samples: Samples, notes: Sequence[str], where: str) -> Loaded:
    """Refuse what no method can use, and note what makes a result weaker.

    Raises:
        DataError: all samples are of one class.
    """
    counts = samples.counts()
    present = counts.nonzero()[:, 0].tolist()
    if len(present) == 1:
        raise DataError(
            f"{where}: all {len(samples)} samples are of one class ({name_of_class(samples, present[0])}); "
            "samples of at least two classes are needed"
        )
    found = list(notes)
    absent = (counts == 0).nonzero()[:, 0].tolist()
    if absent:
        found.append(f"no sample of {some([name_of_class(samples, c) for c in absent])}")
    if len(samples) < samples.num_classes:
        found.append(f"fewer samples ({len(samples)}) than classes ({samples.num_classes})")
    return Loaded(samples, tuple(found))


def name_of_class(samples: Samples, index: int) -> str:
    """``class 3``, or ``class 3 (cat)`` where names are known."""
    return f"class {index} ({samples.class_names[index]})" if samples.class_names else f"class {index}"


def some(names: Sequence[str], limit: int = SHOWN_NAMES) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
