"""The exceptions of the package, as one small tree.

    UnbackdoorError
    ├── ConfigError            a spec, option or hyper-parameter is wrong
    ├── DataError              samples cannot be used as they are
    ├── CheckpointError        a checkpoint cannot be read or does not fit
    │   ├── UnsafeCheckpoint   reading it would run code
    │   └── ArchitectureMismatch
    ├── UnsupportedModel       a method needs something that the network lacks
    ├── TrainingDiverged       a loss or a weight stopped being finite
    └── OutputExists           something of the user's would be overwritten

Every message names the value that was wrong and says what would be right.
"""

from __future__ import annotations

from collections.abc import Sequence


class UnbackdoorError(Exception):
    """Base class of everything that this package raises on purpose."""


class ConfigError(UnbackdoorError):
    """A spec, an option or a hyper-parameter is wrong."""


class DataError(UnbackdoorError):
    """The samples cannot be used as they are."""


class CheckpointError(UnbackdoorError):
    """A checkpoint cannot be read, or does not fit what it is loaded into."""


class UnsafeCheckpoint(CheckpointError):
    """Reading the checkpoint would import or call something outside the allow-list.

    ``globals`` holds the refused names, as ``"module.name"``.
    """

    def __init__(self, message: str, refused: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.globals = tuple(refused)


class ArchitectureMismatch(CheckpointError):
    """The checkpoint's tensors do not fit the network.

    ``missing``, ``unexpected`` and ``misshapen`` hold the keys.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        misshapen: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.misshapen = tuple(misshapen)


class UnsupportedModel(UnbackdoorError):
    """A method needs something (a layer, a head, a normalisation) that the network lacks."""


class TrainingDiverged(UnbackdoorError):
    """A loss or a weight stopped being finite during training."""


class OutputExists(UnbackdoorError):
    """Something would be overwritten; ask for it with ``--force``."""
