"""Reading the checkpoints that users have, without running anything in them, and writing cleaned weights back.

What is trusted: safetensors files hold numbers only. The pickle in a file of torch.save is read as an inert tree (see
:mod:`unbackdoor.models._pickle_tree`); no name in it is imported and no call in it is made, be it zip or legacy.
A whole pickled module becomes a network only if all its classes are on an allow-list
(:mod:`unbackdoor.models._module_builder`). TorchScript is a program: its weights are read without loading it, and the
program itself is loaded by torch only if it calls nothing beyond tensor operations; torch's own advice is to run
TorchScript of trusted origin alone, since its interpreter is no sandbox. ``trust_pickle`` lifts all of this.
"""

from __future__ import annotations

import copy
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unbackdoor.errors import CheckpointError, OutputExists, UnsafeCheckpoint
from unbackdoor.models._contents import Contents, read_contents
from unbackdoor.models._module_builder import build_module
from unbackdoor.models._pickle_tree import TensorRef
from unbackdoor.models._torch_archive import Archive, Container, view

#: What TorchScript source may not say if the program is to be loaded: file access, code at loading, foreign operators.
_SCRIPT_RISK = re.compile(
    r"\b(?:from_file|save|load|__setstate__|set_data|resize_|set_|unsafe_\w+|_unsafe_\w+|pickle_\w+)\s*\("
    r"|\bops\.(?!aten\.|prim\.|torchvision\.)[\w.]+"
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been read.

    Attributes:
        path: the file.
        container: "safetensors", "torch-zip", "torch-legacy" (torch.save before 1.6) or "torchscript".
        state: parameters and persistent buffers, on the CPU in their stored dtypes, by name without prefix.
            Names whose tensors share memory in the file share it here.
        wrapping: the keys that lead to the weights, such as ``("state_dict",)``.
        prefix: what wrappers put before all names, such as ``"module."``.
        module: the network itself, where the file holds it and it could be made safely (or was trusted).
        globals: the classes and functions that the pickle names.
        whole_module: whether the file holds a network (a pickled module or TorchScript) and not weights alone.
        metadata: the header's texts (safetensors), or the numbers and texts beside the weights ("epoch", "acc").
        others: further sets of weights in the file, which are left as they are when it is written back.
        refused: why ``module`` was not made: name of a class or call → reason.
        contents: where in the file the weights lie, for :func:`write_like`.
    """

    path: Path
    container: Container
    state: dict[str, Tensor]
    wrapping: tuple[str, ...] = ()
    prefix: str = ""
    module: nn.Module | None = None
    globals: tuple[str, ...] = ()
    whole_module: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    contents: Contents | None = field(default=None, repr=False, compare=False)


def read_checkpoint(path: Path | str, *, trust_pickle: bool = False) -> Checkpoint:
    """Read a checkpoint of any kind.

    Args:
        trust_pickle: load a pickled module or a TorchScript program as torch does, which **runs whatever code the file
            holds**. For files of your own.

    Raises:
        CheckpointError: no such file, no checkpoint, damaged, or without weights; the message says which.
        UnsafeCheckpoint: the pickle asks to call something like ``os.system``. Nothing has been run.
    """
    path = Path(path)
    contents = read_contents(path, permissive=trust_pickle)
    if not contents.tensors:
        what = "is a plain pickle, not a file of torch.save" if contents.container == "pickle" else "holds no weights"
        raise CheckpointError(f"{path} {what}; save the network's state dict with torch.save")
    archive = contents.archive
    module, refused = _module(contents, trust_pickle)
    return Checkpoint(
        path=path,
        container=contents.container,
        state=_safetensors_state(contents) if archive is None else archive.tensors(contents.refs),
        wrapping=contents.wrapping,
        prefix=contents.prefix,
        module=module,
        globals=contents.names,
        whole_module=contents.root is not None or contents.container == "torchscript",
        metadata=contents.metadata if archive is None else contents.entries,
        others=contents.others,
        refused=refused,
        contents=contents,
    )


def require_module(checkpoint: Checkpoint) -> nn.Module:
    """A copy of the network that the file itself holds.

    Raises:
        UnsafeCheckpoint: there is one, but making it would run code; the message names what, and the two ways out.
        CheckpointError: the file holds weights alone.
    """
    if checkpoint.module is not None:
        return copy.deepcopy(checkpoint.module)
    if not checkpoint.whole_module:
        raise CheckpointError(
            f"{checkpoint.path} holds weights alone; say with --arch which network they belong to, "
            "such as preact_resnet18, torchvision:resnet18 or file.py:Class"
        )
    named = "; ".join(f"{name} ({why})" for name, why in list(checkpoint.refused.items())[:8])
    more = f" and {len(checkpoint.refused) - 8} more" if len(checkpoint.refused) > 8 else ""
    raise UnsafeCheckpoint(
        f"{checkpoint.path} holds a whole network that is not loaded, because that could run code from the file: "
        f"{named}{more}. Either give its definition with --arch file.py:Class (the weights were read safely), "
        "or, for a file of trusted origin, use --trust-pickle",
        tuple(checkpoint.refused),
    )


def _safetensors_state(contents: Contents) -> dict[str, Tensor]:
    try:
        stored = load_file(contents.path)
    except (SafetensorError, OSError, KeyError) as error:  # KeyError: a dtype that this torch does not have
        raise CheckpointError(f"{contents.path} cannot be read: {error}") from error
    return {name: stored[contents.prefix + name] for name in contents.tensors}


def _module(contents: Contents, trust_pickle: bool) -> tuple[nn.Module | None, dict[str, str]]:
    archive = contents.archive
    if archive is None:
        return None, {}
    if archive.container == "torchscript":
        return _script_module(archive, trust_pickle)
    if contents.root is None:
        return None, {}
    if not trust_pickle:
        return build_module(contents.root, archive)
    try:
        loaded = torch.load(contents.path, map_location="cpu", weights_only=False)
        for step in contents.wrapping:
            loaded = loaded[step]
    except Exception as error:  # whatever the file's own code raises
        raise CheckpointError(f"{contents.path} cannot be unpickled: {type(error).__name__}: {error}") from error
    while isinstance(loaded, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        loaded = loaded.module
    if not isinstance(loaded, nn.Module):
        raise CheckpointError(f"{contents.path} unpickles to a {type(loaded).__name__}, not to a network")
    return loaded, {}


def _script_module(archive: Archive, trust: bool) -> tuple[nn.Module | None, dict[str, str]]:
    risks = {
        match.group().rstrip("( "): f"in {name.partition('/')[2]}"
        for name, source in archive.program.items()
        for match in _SCRIPT_RISK.finditer(source)
    }
    if risks and not trust:
        return None, risks
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch announces the end of TorchScript
            return torch.jit.load(str(archive.path), map_location="cpu"), {}  # type: ignore[no-untyped-call]
    except Exception as error:  # TorchScript's compiler raises RuntimeError and more
        raise CheckpointError(f"{archive.path}: torch cannot load this TorchScript: {error}") from error


def write_like(checkpoint: Checkpoint, state: Mapping[str, Tensor], path: Path | str, *, force: bool = False) -> Path:
    """Write new weights in the form of the file that the old ones came from.

    Container, wrapping, key names, dtypes and everything else in the file (optimiser, epoch, pickled classes) stay as
    they are; only the weights' bytes are replaced. Nothing of the file is executed.

    Args:
        state: every name of ``checkpoint.state``, with or without (part of) its prefix; values of the stored shapes,
            whose floating dtype is converted to the stored one.
        force: replace an existing file.

    Raises:
        CheckpointError: a name is missing or unknown, a shape or kind of dtype differs, a value does not fit the stored
            dtype, or names that share memory in the file (tied weights) have different values.
        OutputExists: the file exists, without ``force``.
    """
    values = _stored_values(checkpoint, state)
    contents = checkpoint.contents
    with _replacing(Path(path), force) as temporary:
        if contents is None or contents.archive is None:
            named = {checkpoint.prefix + name: value for name, value in values.items()}
            _save_safetensors(named, temporary, checkpoint.metadata)
        else:
            storages = _written_storages(contents.archive, contents.refs, values)
            contents.archive.rewrite(storages, temporary)
    return Path(path)


def write_safetensors(
    state: Mapping[str, Tensor], path: Path | str, *, metadata: Mapping[str, str] | None = None, force: bool = False
) -> Path:
    """Write tensors as a safetensors file; tied ones are stored twice.

    Raises:
        OutputExists: the file exists, without ``force``.
        CheckpointError: ``state`` is empty.
    """
    if not state:
        raise CheckpointError("there are no tensors to write")
    with _replacing(Path(path), force) as temporary:
        _save_safetensors(state, temporary, metadata or {})
    return Path(path)


def _save_safetensors(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, Any]) -> None:
    copies = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in state.items()}
    texts = {str(key): str(value) for key, value in metadata.items()}
    save_file(copies, path, metadata=texts or None)


@contextmanager
def _replacing(path: Path, force: bool) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place at the end, and goes if anything fails."""
    if path.exists() and not force:
        raise OutputExists(f"{path} exists; use --force to replace it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=".writing-", dir=path.parent)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error
    temporary = Path(folder) / path.name
    try:
        yield temporary
        # safetensors makes its files private; weights are as readable as what the user writes otherwise.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
        Path(folder).rmdir()


def stored_names(checkpoint: Checkpoint, names: set[str]) -> str:
    """The part of the prefix that ``names`` carry beyond those of ``checkpoint.state``: "" where they are the same.

    A network that was saved as ``self.model`` inside of another has ``"model."`` in its own names as well.
    """
    known = set(checkpoint.state)
    for extra in prefix_parts(checkpoint.prefix):
        if {extra + name for name in known} <= names:
            return extra
    return ""


def prefix_parts(prefix: str) -> list[str]:
    """The ends of a prefix, shortest first: ``"module.model."`` → ``["", "model.", "module.model."]``."""
    words = prefix.split(".")[:-1]
    return ["".join(f"{word}." for word in words[begin:]) for begin in range(len(words), -1, -1)]


def _stored_values(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    extra = stored_names(checkpoint, set(state))
    given = {name.removeprefix(extra): value.detach().cpu() for name, value in state.items()}
    missing = [name for name in checkpoint.state if name not in given]
    # Files of torch before 0.4.1 have no such counters, but every network of today does.
    unknown = [n for n in given if n not in checkpoint.state and not n.endswith("num_batches_tracked")]
    if missing or unknown:
        raise CheckpointError(
            f"these weights do not belong to {checkpoint.path}: "
            f"missing {_shown(missing)}; not in the file {_shown(unknown)}"
        )
    return {name: _as_stored(name, given[name], stored) for name, stored in checkpoint.state.items()}


def _shown(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") if names else "nothing"


def _as_stored(name: str, value: Tensor, stored: Tensor) -> Tensor:
    if value.shape != stored.shape:
        raise CheckpointError(f"{name} has shape {tuple(value.shape)}, but {tuple(stored.shape)} in the file")
    if value.dtype == stored.dtype:
        return value
    if not (value.is_floating_point() and stored.is_floating_point()):
        raise CheckpointError(f"{name} is {value.dtype}, but {stored.dtype} in the file")
    converted = value.to(stored.dtype)
    if not bool((converted.isfinite() | ~value.isfinite()).all()):
        raise CheckpointError(f"{name} has values beyond the range of {stored.dtype}, in which the file stores it")
    return converted


def _written_storages(
    archive: Archive, refs: Mapping[str, TensorRef], values: Mapping[str, Tensor]
) -> dict[str, bytearray]:
    """The storages with the new values in their places."""
    buffers = archive.read({ref.storage.key for ref in refs.values()})
    places = {name: view(ref, buffers[ref.storage.key]) for name, ref in refs.items()}
    for name, place in places.items():
        value = values[name]
        for dim, (size, step) in enumerate(zip(place.shape, place.stride(), strict=True)):
            if step == 0 and size > 1:  # expanded: one stored element stands for all along this axis
                place, value = place.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
        place.copy_(value)
    # Reading back tells whether a later name wrote other values over an earlier one's.
    for name, place in places.items():
        if not torch.equal(_bits(place), _bits(values[name])):
            key = refs[name].storage.key
            tied = [other for other, ref in refs.items() if ref.storage.key == key and other != name]
            raise CheckpointError(
                f"{name} shares its memory with {_shown(tied) if tied else 'itself'} in {archive.path} (tied weights), "
                "but the new values differ; give them the same values, or write a safetensors file"
            )
    return buffers


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, in which NaN equals NaN."""
    flat = tensor.contiguous().flatten()
    return flat.view(torch.uint8) if flat.numel() else flat
