"""The containers of ``torch.save`` and ``torch.jit.save``: where each storage's bytes lie, and how to replace them.

Nothing but the storages is ever changed by :meth:`Archive.rewrite`: the pickle, and with it the names, classes and
everything else that the file holds, stays byte for byte.
"""

from __future__ import annotations

import io
import mmap
import shutil
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

import torch
from torch import Tensor

from unbackdoor.errors import CheckpointError
from unbackdoor.models._pickle_tree import Ledger, TensorRef, pickle_end, read_pickle

Container = Literal["safetensors", "torch-zip", "torch-legacy", "torchscript", "pickle"]

#: torch writes each storage at a multiple of this, so that it can be mapped into memory.
_ALIGNMENT = 64
_LOCAL_HEADER = 30
_MAX_EXPANSION = 200


@dataclass(frozen=True)
class Record:
    """Where a storage lies: the name of a zip member, or an offset into the file; and its size in bytes."""

    where: str | int
    size: int


@dataclass(frozen=True)
class Archive:
    """A file of torch, its pickle read as an inert tree and its storages not read yet."""

    path: Path
    container: Container
    tree: Any
    ledger: Ledger
    records: Mapping[str, Record]
    #: TorchScript source files by name; empty for the others.
    program: Mapping[str, str]

    def tensors(self, refs: Mapping[str, TensorRef]) -> dict[str, Tensor]:
        """The tensors, on the CPU. Those that share a storage in the file share their memory.

        Raises:
            CheckpointError: a storage is missing or truncated.
        """
        buffers = self.read({ref.storage.key for ref in refs.values()})
        return {name: view(ref, buffers[ref.storage.key]) for name, ref in refs.items()}

    def read(self, keys: Iterable[str]) -> dict[str, bytearray]:
        """The bytes of storages, by key."""
        found: dict[str, bytearray] = {}
        with self.path.open("rb") as file:
            members = None if self.container == "torch-legacy" else zipfile.ZipFile(file)
            for key in keys:
                record = self.records.get(key)
                if record is None:
                    raise CheckpointError(f"{self.path}: storage {key!r} is missing; the file is truncated or damaged")
                found[key] = _content(self.path, file, members, record)
        return found

    def rewrite(self, storages: Mapping[str, bytes | bytearray], target: Path) -> None:
        """Copy the file to ``target`` with these storages' bytes in place of the old ones."""
        places = {self.records[key].where: content for key, content in storages.items()}
        if self.container == "torch-legacy":
            shutil.copyfile(self.path, target)
            with target.open("r+b") as file:
                for where, content in places.items():
                    file.seek(int(where))
                    file.write(content)
            return
        with zipfile.ZipFile(self.path) as old, zipfile.ZipFile(target, "w") as new:
            for member in old.infolist():
                content = places[member.filename] if member.filename in places else old.read(member)
                _copy_member(new, member, content)


def _content(path: Path, file: io.BufferedReader, members: zipfile.ZipFile | None, record: Record) -> bytearray:
    if members is not None:
        try:
            return bytearray(members.read(str(record.where)))
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
            raise CheckpointError(f"{path}: {record.where} is damaged: {error}") from error
    file.seek(int(record.where))
    content = bytearray(file.read(record.size))
    if len(content) != record.size:
        raise CheckpointError(f"{path} is truncated: {record.size - len(content)} bytes of a storage are missing")
    return content


def _copy_member(new: zipfile.ZipFile, member: zipfile.ZipInfo, content: bytes | bytearray) -> None:
    copy = zipfile.ZipInfo(member.filename, member.date_time)
    copy.compress_type = member.compress_type
    copy.external_attr = member.external_attr
    copy.comment = member.comment
    if member.compress_type == zipfile.ZIP_STORED and new.fp is not None:
        begin = new.fp.tell() + _LOCAL_HEADER + len(member.filename.encode())
        # The two-letter name of torch's own padding, and its length, take four bytes.
        padding = -(begin + 4) % _ALIGNMENT
        copy.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    new.writestr(copy, content)


def view(ref: TensorRef, buffer: bytearray) -> Tensor:
    """The tensor that ``ref`` describes, as a view of the storage's bytes.

    Raises:
        CheckpointError: the storage is smaller than the tensor needs.
    """
    if ref.numel == 0:
        return torch.empty(ref.shape, dtype=ref.dtype)
    count = len(buffer) // ref.dtype.itemsize
    last = ref.offset + sum((n - 1) * s for n, s in zip(ref.shape, ref.stride, strict=True))
    if last >= count:
        raise CheckpointError(f"storage {ref.storage.key!r} is truncated: {count} elements where {last + 1} are needed")
    flat = torch.frombuffer(buffer, dtype=ref.dtype, count=count)
    return flat.as_strided(ref.shape, ref.stride, ref.offset)


def open_zip(path: Path, ledger: Ledger) -> Archive:
    """Read the pickle of a zip file of torch.save or torch.jit.save.

    Raises:
        CheckpointError: the file is truncated, damaged, or a zip file of another kind, which the message names.
        UnsafeCheckpoint: the pickle asks for a dangerous call.
    """
    try:
        with zipfile.ZipFile(path) as members:
            return _open_members(path, members, ledger)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, struct.error) as error:
        raise CheckpointError(f"{path} is a truncated or damaged zip file: {error}") from error


def _open_members(path: Path, members: zipfile.ZipFile, ledger: Ledger) -> Archive:
    infos = {info.filename: info for info in members.infolist()}
    if len({name.lower() for name in infos}) != len(members.infolist()):  # torch's reader does not mind the case
        raise CheckpointError(f"{path} holds two members of one name, so that readers may disagree on what is in it")
    unpacked = sum(info.file_size for info in infos.values())
    if unpacked > _MAX_EXPANSION * path.stat().st_size:
        raise CheckpointError(f"{path} would unpack to {unpacked} bytes, more than {_MAX_EXPANSION} times its size")
    top = next(iter(infos), "").partition("/")[0]
    if f"{top}/data.pkl" not in infos:
        raise CheckpointError(f"{path} is {_foreign_zip(list(infos))}")
    if f"{top}/byteorder" in infos and members.read(f"{top}/byteorder") == b"big":
        raise CheckpointError(f"{path} was saved on a big-endian machine; save it again on a little-endian one")
    content = members.read(f"{top}/data.pkl")
    pickle_end(io.BytesIO(content))
    code = [n for n in infos if n.lower().startswith(f"{top}/code/".lower()) and not n.endswith(".debug_pkl")]
    scripted = f"{top}/constants.pkl" in infos
    return Archive(
        path=path,
        container="torchscript" if scripted else "torch-zip",
        tree=read_pickle(content, ledger),
        ledger=ledger,
        records={
            name.removeprefix(f"{top}/data/"): Record(name, info.file_size)
            for name, info in infos.items()
            if name.startswith(f"{top}/data/")
        },
        program={n: members.read(n).decode("utf-8", "replace") for n in code} if scripted else {},
    )


def _foreign_zip(names: list[str]) -> str:
    if names and all(n.endswith(".npy") for n in names):
        return "a NumPy .npz file; checkpoints are safetensors, files of torch.save, or TorchScript"
    if "model.weights.h5" in names:
        return "a Keras file; export the weights from its own framework to safetensors"
    if any(n.endswith((".pt", ".pth", ".safetensors", ".ckpt", "/data.pkl")) for n in names):
        return "a zip archive with a checkpoint inside; unpack it and give the checkpoint"
    return "a zip archive, but not one of torch.save: it has no data.pkl"


def open_legacy(path: Path, ledger: Ledger) -> Archive:
    """Read the pickles of a file that torch.save wrote before version 1.6 (or was told to write so).

    Raises:
        CheckpointError: the file is truncated or damaged.
        UnsafeCheckpoint: a pickle asks for a dangerous call.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        parts: list[Any] = []
        for _ in range(5):  # magic number, protocol, system, the object, the storages' keys
            begin = content.tell()
            end = pickle_end(cast("IO[bytes]", content))
            parts.append(read_pickle(content[begin:end], ledger))
            content.seek(end)
        records = _legacy_records(path, content, parts[4], ledger)
    if isinstance(parts[2], dict) and parts[2].get("little_endian") is False:
        raise CheckpointError(f"{path} was saved on a big-endian machine; save it again on a little-endian one")
    return Archive(path, "torch-legacy", parts[3], ledger, records, {})


def _legacy_records(path: Path, content: mmap.mmap, keys: Any, ledger: Ledger) -> dict[str, Record]:
    """The storages behind the pickles, one after the other: a count of elements (8 bytes), then the elements."""
    if not isinstance(keys, list):
        raise CheckpointError(f"{path} is damaged: no list of storages follows its pickle")
    records: dict[str, Record] = {}
    where = content.tell()
    for key in map(str, keys):
        if key not in ledger.storages:
            raise CheckpointError(f"{path} is damaged: it lists storage {key!r}, which its pickle does not name")
        header = content[where : where + 8]
        if len(header) < 8:
            raise CheckpointError(f"{path} is truncated: storage {key!r} and what follows are missing")
        size = struct.unpack("<q", header)[0] * ledger.storages[key].dtype.itemsize
        if size < 0 or where + 8 + size > len(content):
            raise CheckpointError(f"{path} is truncated: storage {key!r} should have {size} bytes")
        records[key] = Record(where + 8, size)
        where += 8 + size
    return records


def open_pickle(path: Path, ledger: Ledger) -> Archive:
    """Read a plain pickle, for what it names and calls; it has no storages.

    Raises:
        CheckpointError: the file is truncated or damaged.
        UnsafeCheckpoint: it asks for a dangerous call.
    """
    content = path.read_bytes()
    pickle_end(io.BytesIO(content))
    return Archive(path, "pickle", read_pickle(content, ledger), ledger, {}, {})
