"""What a checkpoint holds, before any tensor is read: the weights' names and places, and what they are wrapped in."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from unbackdoor.errors import CheckpointError, UnsafeCheckpoint
from unbackdoor.models._file_kinds import FileKind, file_kind
from unbackdoor.models._pickle_tree import Ledger, Node, TensorRef, as_mapping
from unbackdoor.models._torch_archive import Archive, Container, open_legacy, open_pickle, open_zip

#: What common training scripts call the weights in the dict that they save; the first of these that is there is taken.
WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "weights",
    "params",
    "net_state_dict",
    "state_dict_model",
    "module",
    "classifier",
    "model_ema",
    "state_dict_ema",
    "ema_state_dict",
    "ema",
)
#: What wrappers of networks put before every name.
PREFIXES = ("module.", "model.", "net.", "network.", "_orig_mod.")

T = TypeVar("T")

_MAX_WRAPPING = 4
_MAX_TENSORS = 1_000_000
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor; ``dtype`` is None where torch has no such type."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Contents:
    """A checkpoint before its tensors are read.

    ``tensors`` and ``refs`` have names without wrapping and prefix; ``refs`` is empty for safetensors. ``root`` is the
    whole pickled module, where there is one. ``others`` are further sets of weights in the file.
    """

    path: Path
    container: Container
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    refs: Mapping[str, TensorRef] = field(default_factory=dict)
    prefix: str = ""
    wrapping: tuple[str, ...] = ()
    root: Node | None = None
    others: tuple[str, ...] = ()
    entries: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    archive: Archive | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The globals that the pickle names."""
        return tuple(self.archive.ledger.names) if self.archive else ()


def read_contents(path: Path, *, permissive: bool = False) -> Contents:
    """Find the weights in a file.

    Args:
        permissive: describe a dangerous pickle, and a file without weights, instead of refusing it. Nothing is run
            either way.

    Raises:
        CheckpointError: the file is no checkpoint, damaged, or holds no weights; the message says which.
        UnsafeCheckpoint: its pickle asks for a dangerous call.
    """
    kind = file_kind(path)
    if kind == "safetensors":
        return _safetensors(path)
    readers: dict[FileKind, Callable[[Path, Ledger], Archive]] = {
        "zip": open_zip,
        "legacy": open_legacy,
        "pickle": open_pickle,
    }
    try:
        archive = readers[kind](path, Ledger(permissive))
    except UnsafeCheckpoint as error:
        raise UnsafeCheckpoint(f"{path} is refused: {error}", error.globals) from None
    except CheckpointError as error:
        raise error if str(path) in str(error) else CheckpointError(f"{path}: {error}") from None
    if archive.container == "pickle" and not permissive:
        raise CheckpointError(
            f"{path} is a plain pickle, not a file of torch.save; save its state dict with torch.save"
        )
    try:
        return _unwrap(archive)
    except CheckpointError as error:
        if permissive:
            return Contents(path, archive.container, archive=archive, entries=_scalars(archive.tree))
        raise CheckpointError(f"{path}: {error}") from None
    except RecursionError:
        raise CheckpointError(f"{path}: its objects are nested too deeply") from None


def _safetensors(path: Path) -> Contents:
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            tensors = {
                name: TensorInfo(tuple(s.get_shape()), _SAFETENSORS_DTYPES.get(s.get_dtype()))
                for name, s in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is a truncated or damaged safetensors file: {error}") from error
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    prefix = common_prefix(tensors)
    return Contents(
        path, "safetensors", tensors=_without(prefix, tensors), prefix=prefix, metadata=dict(sorted(metadata.items()))
    )


def _unwrap(archive: Archive) -> Contents:
    tree = archive.tree
    wrapping: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    entries: dict[str, Any] = {}
    if archive.container == "torchscript":
        refs = _collect(_script_tensors(tree, ()))
    else:
        for _ in range(_MAX_WRAPPING):
            if _holds_weights(tree):
                break
            tree, step, beside, scalars = _step_into(tree)
            wrapping, others, entries = (*wrapping, step), (*others, *beside), entries | scalars
        refs = _weights(tree)
    if not refs:
        raise CheckpointError("it holds no weights" + (" (frozen?)" if archive.container == "torchscript" else ""))
    prefix = common_prefix(refs)
    refs = _without(prefix, refs)
    return Contents(
        path=archive.path,
        container=archive.container,
        tensors={name: TensorInfo(ref.shape, ref.dtype) for name, ref in refs.items()},
        refs=refs,
        prefix=prefix,
        wrapping=wrapping,
        root=tree if is_module(tree) else None,
        others=others,
        entries=entries,
        archive=archive,
    )


def is_module(tree: Any) -> bool:
    """Whether a node is a pickled ``nn.Module``, by the attributes that every module has."""
    return isinstance(tree, Node) and {"_modules", "_parameters", "_buffers"} <= tree.attributes().keys()


def _is_state_dict(tree: Any) -> bool:
    """A mapping from names to tensors; numbers and other extras may stand among them."""
    items = as_mapping(tree)
    if not items or not all(isinstance(key, str) for key in items):
        return False
    values = list(items.values())
    if any(is_module(v) or any(isinstance(t, TensorRef) for t in (as_mapping(v) or {}).values()) for v in values):
        return False
    return any(isinstance(value, TensorRef) for value in values)


def _holds_weights(tree: Any) -> bool:
    return is_module(tree) or _is_state_dict(tree)


def _step_into(tree: Any) -> tuple[Any, str, tuple[str, ...], dict[str, Any]]:
    """One wrapping off: (what is inside, its name, other sets of weights beside it, numbers and texts beside it)."""
    items = as_mapping(tree)
    if not items:
        raise CheckpointError(f"it holds no weights, but {_describe(tree)}")
    named = {str(key): value for key, value in items.items() if isinstance(key, str)}
    candidates = [name for name, value in named.items() if _leads_to_weights(value, _MAX_WRAPPING, set())]
    usual = [name for name in WRAPPERS if name in candidates]
    if not usual and len(candidates) != 1:
        shown = ", ".join(list(named)[:12])
        what = f"several sets of weights ({', '.join(candidates)})" if candidates else "no weights"
        raise CheckpointError(f"it holds {what} under the names {shown}; save the one to clean on its own")
    chosen = (usual or candidates)[0]
    beside = tuple(name for name in candidates if name != chosen)
    return named[chosen], chosen, beside, _scalars(tree)


def _leads_to_weights(tree: Any, depth: int, seen: set[int]) -> bool:
    if _holds_weights(tree):
        return True
    items = as_mapping(tree)
    if depth == 0 or not items or id(tree) in seen:
        return False
    seen.add(id(tree))
    return any(isinstance(key, str) and _leads_to_weights(value, depth - 1, seen) for key, value in items.items())


def _scalars(tree: Any) -> dict[str, Any]:
    """The numbers and texts of a dict, such as the epoch and the best accuracy."""
    items = as_mapping(tree) or {}
    return {
        key: value
        for key, value in items.items()
        if isinstance(key, str) and (value is None or isinstance(value, (bool, int, float, str)))
    }


def _weights(tree: Any) -> dict[str, TensorRef]:
    if is_module(tree):
        return _collect(_module_tensors(tree, "", ()))
    items = as_mapping(tree) or {}
    for name, value in items.items():
        if isinstance(value, Node) and value.path.startswith("torch._utils._rebuild"):
            raise CheckpointError(f"{name} is made by {value.path}; only plain dense weights are supported")
    return {name: value for name, value in items.items() if isinstance(value, TensorRef)}


def _collect(named: Iterable[tuple[str, TensorRef]]) -> dict[str, TensorRef]:
    """A dict of them, unless a module that contains another many times over makes them endless."""
    found = dict(itertools.islice(named, _MAX_TENSORS + 1))
    if len(found) > _MAX_TENSORS:
        raise CheckpointError(f"it holds more than {_MAX_TENSORS} tensors")
    return found


def _module_tensors(module: Node, start: str, above: tuple[int, ...]) -> Iterator[tuple[str, TensorRef]]:
    """The state dict of a pickled module, in the order of ``nn.Module.state_dict``."""
    if id(module) in above or len(above) > 100:
        raise CheckpointError("its modules contain each other")
    attributes = module.attributes()
    passing = attributes.get("_non_persistent_buffers_set")
    for group in ("_parameters", "_buffers"):
        for name, value in (as_mapping(attributes[group]) or {}).items():
            if isinstance(value, TensorRef) and not (group == "_buffers" and _contains(passing, name)):
                yield f"{start}{name}", value
            elif isinstance(value, Node):
                raise CheckpointError(f"{start}{name} is made by {value.path}; only plain dense weights are supported")
    for name, child in (as_mapping(attributes["_modules"]) or {}).items():
        if is_module(child):
            yield from _module_tensors(child, f"{start}{name}.", (*above, id(module)))
        elif child is not None:
            raise CheckpointError(f"its module {start}{name} has no readable state")


def _contains(collection: Any, name: Any) -> bool:
    return isinstance(collection, (set, frozenset, list, tuple)) and name in collection


def _script_tensors(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[str, TensorRef]]:
    """The tensor attributes of a TorchScript module: its parameters and buffers, by their names in its state dict."""
    if not isinstance(tree, Node) or len(path) > 100:
        return
    for name, value in tree.attributes().items():
        if isinstance(value, TensorRef):
            yield ".".join((*path, name)), value
        elif isinstance(value, Node):
            yield from _script_tensors(value, (*path, name))


def common_prefix(names: Mapping[str, Any]) -> str:
    """The wrappers' prefixes that all names share, such as ``"module."`` or ``"module.model."``."""
    prefix = ""
    while True:
        step = next((p for p in PREFIXES if all(name.startswith(prefix + p) for name in names)), None)
        if step is None:
            return prefix
        prefix += step


def _without(prefix: str, named: Mapping[str, T]) -> dict[str, T]:
    return {name.removeprefix(prefix): value for name, value in named.items()}


def _describe(tree: Any) -> str:
    if isinstance(tree, Node):
        return f"an object of the class {tree.path}"
    if isinstance(tree, TensorRef):
        return f"a single tensor of shape {tree.shape}"
    return f"a {type(tree).__name__}"
