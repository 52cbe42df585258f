"""What a file is, told by its first bytes: a checkpoint of a kind we read, or something else that gets named."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Literal

from unbackdoor.errors import CheckpointError
from unbackdoor.models._pickle_tree import pickle_end

FileKind = Literal["safetensors", "zip", "legacy", "pickle"]

#: What ``torch.save`` wrote first before version 1.6: the number 0x1950a86a20f9469cfc6c as a pickle of protocol 2.
_LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")

_FOREIGN: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras .h5?); export the weights from its own framework to safetensors"),
    (0, b"\x93NUMPY", "a NumPy array (.npy); a checkpoint maps names to tensors"),
    (0, b"GGUF", "a GGUF file; only safetensors and files of torch.save are read"),
    (4, b"TFL3", "a TensorFlow Lite model; only safetensors and files of torch.save are read"),
    (257, b"ustar", "a tar archive; unpack it and give the checkpoint inside"),
    (0, b"\x1f\x8b", "compressed with gzip; unpack it first"),
    (0, b"BZh", "compressed with bzip2; unpack it first"),
    (0, b"\xfd7zXZ\x00", "compressed with xz; unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it and give the checkpoint inside"),
    (0, b"Rar!", "a RAR archive; unpack it and give the checkpoint inside"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (0, b"<", "an HTML or XML page, not a checkpoint; the download may have failed"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
)


def file_kind(path: Path) -> FileKind:
    """Which reader a file needs. "legacy" is torch.save before 1.6, "pickle" any other pickle.

    Raises:
        CheckpointError: there is no such file, it is empty, or it is something else, which the message names.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; give the checkpoint file")
    try:
        with path.open("rb") as file:
            head = file.read(4096)
            size = file.seek(0, io.SEEK_END)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not head:
        raise CheckpointError(f"{path} is empty")
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(_LEGACY_MAGIC):
        return "legacy"
    for offset, magic, what in _FOREIGN:
        if head[offset:].startswith(magic):
            raise CheckpointError(f"{path} is {what}")
    if _is_safetensors(path, head, size):
        return "safetensors"
    if path.suffix.lower() == ".onnx":
        raise CheckpointError(f"{path} is an ONNX model; give the PyTorch checkpoint that it was exported from")
    if _is_pickle(path, head):
        return "pickle"
    raise CheckpointError(
        f"{path} is of no known kind (it begins with {head[:8].hex(' ')}); "
        "checkpoints are safetensors, files of torch.save, or TorchScript"
    )


def _is_safetensors(path: Path, head: bytes, size: int) -> bool:
    if len(head) < 9 or head[8:9] != b"{":
        return path.suffix == ".safetensors"
    (length,) = struct.unpack("<Q", head[:8])
    return bool(length + 8 <= size) or path.suffix == ".safetensors"


def _is_pickle(path: Path, head: bytes) -> bool:
    if len(head) > 1 and head[0] == 0x80 and 1 <= head[1] <= 5:
        return True
    if head[:1] not in b"c(}]i":  # how a pickle of protocol 0 or 1 begins
        return False
    try:
        with path.open("rb") as file:
            pickle_end(file)
    except CheckpointError:
        return False
    return True
