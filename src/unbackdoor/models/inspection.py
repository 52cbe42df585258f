"""What a checkpoint holds, described without executing any of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unbackdoor.models._contents import Contents, read_contents
from unbackdoor.models._guessing import (
    Guess,
    count_channels,
    count_classes,
    guess_architecture,
    read_image_size,
)
from unbackdoor.models._pickle_tree import Verdict, verdict
from unbackdoor.models._torch_archive import Container


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of the file: its name without wrapping and prefix, its shape, and its dtype as torch calls it."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a checkpoint holds.

    Attributes:
        bytes: size of the file; sha256: its digest in hexadecimal.
        whole_module: the class of the pickled network, "TorchScript", or "" where there are weights alone.
        globals: what the pickle names, each with a verdict.
        dangerous_calls: calls that have no business in a checkpoint, as ``"posix.system('…')"``.
        values: how many numbers the tensors hold, buffers included.
        num_classes, in_channels, image_size: as far as shapes tell.
        entries: numbers and texts beside the weights; others: further sets of weights.
    """

    path: str
    container: Container
    bytes: int
    sha256: str
    whole_module: str
    wrapping: tuple[str, ...]
    prefix: str
    globals: tuple[tuple[str, Verdict], ...]
    dangerous_calls: tuple[str, ...]
    tensors: tuple[StoredTensor, ...]
    values: int
    architecture: Guess | None
    num_classes: int | None
    in_channels: int | None
    image_size: int | None
    entries: Mapping[str, Any]
    others: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        plain = asdict(self)
        plain["globals"] = dict(self.globals)
        plain["entries"] = {k: _finite(v) for k, v in self.entries.items()}
        plain["tensors"] = [{"name": t.name, "shape": list(t.shape), "dtype": t.dtype} for t in self.tensors]
        for name in ("wrapping", "dangerous_calls", "others"):
            plain[name] = list(plain[name])
        return plain

    def lines(self, *, tensors: bool = True) -> list[str]:
        """The description as lines of plain text; ``tensors`` adds the table of all tensors."""
        facts = [
            ("file", self.path),
            ("size", f"{self.bytes:,} bytes"),
            ("sha256", self.sha256),
            ("container", self.container),
            ("holds", f"a whole network, {self.whole_module}" if self.whole_module else "weights alone"),
            ("wrapped in", " → ".join(self.wrapping)),
            ("prefix", self.prefix),
            ("tensors", f"{len(self.tensors)} with {self.values:,} values"),
            ("architecture", _told(self.architecture)),
            ("classes", str(self.num_classes or "")),
            ("channels", str(self.in_channels or "")),
            ("image size", str(self.image_size or "")),
            ("beside it", ", ".join(f"{k} = {v!r}" for k, v in self.entries.items())),
            ("other weights", ", ".join(self.others)),
        ]
        out = [f"{name:<14}{value}" for name, value in facts if value]
        out += [f"{'DANGEROUS':<14}it would call {call}" for call in self.dangerous_calls]
        out += [f"{'names':<14}{name} ({judged})" for name, judged in self.globals]
        if tensors and self.tensors:
            width = max(len(t.name) for t in self.tensors)
            out += ["", *(f"{t.name:<{width}}  {t.dtype:<10} {_times(t.shape)}" for t in self.tensors)]
        return out


def inspect_checkpoint(path: Path | str) -> Inspection:
    """Describe a checkpoint, also one that would be refused for what it asks to call. Nothing in it is executed.

    Raises:
        CheckpointError: the file is no checkpoint, or damaged; the message names what it is.
    """
    path = Path(path)
    contents = read_contents(path, permissive=True)
    shapes = {name: info.shape for name, info in contents.tensors.items()}
    return Inspection(
        path=str(path),
        container=contents.container,
        bytes=path.stat().st_size,
        sha256=_digest(path),
        whole_module=_whole(contents),
        wrapping=contents.wrapping,
        prefix=contents.prefix,
        globals=tuple((name, verdict(name)) for name in contents.names),
        dangerous_calls=tuple(contents.archive.ledger.dangerous_calls) if contents.archive else (),
        tensors=tuple(
            StoredTensor(name, info.shape, str(info.dtype).removeprefix("torch.") if info.dtype else "unknown")
            for name, info in contents.tensors.items()
        ),
        values=sum(math.prod(shape) for shape in shapes.values()),
        architecture=guess_architecture(shapes),
        num_classes=count_classes(shapes),
        in_channels=count_channels(shapes),
        image_size=read_image_size(shapes),
        entries=contents.entries or contents.metadata,
        others=contents.others,
    )


def _whole(contents: Contents) -> str:
    if contents.container == "torchscript":
        return "TorchScript"
    return contents.root.path if contents.root is not None else ""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _told(guess: Guess | None) -> str:
    if guess is None:
        return "unknown"
    sure = "" if guess.confident else "perhaps "
    return f"{sure}{guess.spec}: {guess.why}" if guess.spec else f"{sure}{guess.why}"


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become texts."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
