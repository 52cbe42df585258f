"""Data sets by name: the built-in digits, and MNIST, CIFAR-10 and GTSRB from files that the user has."""

from __future__ import annotations

import gzip
import os
import pickle
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from unbackdoor.augmentation import Augmentation
from unbackdoor.data.arrays import load_npz
from unbackdoor.errors import ConfigError, DataError
from unbackdoor.rng import Rng
from unbackdoor.specs import suggestion
from unbackdoor.types import Samples

Split = Literal["train", "test"]
Images = NDArray[np.uint8]
Labels = NDArray[np.int64]

#: Environment variable with the folder of the data sets.
ROOT_VARIABLE = "UNBACKDOOR_DATA"

#: Seed of the digits' split, and the size of its test part.
DIGITS_SEED, DIGITS_TEST = 0, 500

#: What a damaged pickle makes the unpickler raise.
_PICKLE_ERRORS = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
    OverflowError,
    MemoryError,
)

_TEN_DIGITS = tuple(str(d) for d in range(10))
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """A data set that has a name here.

    Attributes:
        image_shape: (C, H, W).
        class_names: where they are known without the file.
        augmentation: what does not change a picture's class.
        needs: files to have under the root; empty for a built-in set.
        layouts: readers of the publisher's own file layouts: (root, split) -> (images, labels), or None where the
            files are not there.
    """

    name: str
    image_shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...]
    augmentation: Augmentation
    description: str
    needs: tuple[str, ...] = ()
    layouts: tuple[Callable[[Path, Split], tuple[Images, Labels] | None], ...] = ()


def load_dataset(name: str, split: Split, root: str | os.PathLike[str] | None = None) -> Samples:
    """A data set by its name: uint8 images (N, C, H, W) with class names.

    Args:
        name: one of :data:`DATASETS`.
        split: "train" or "test". Digits has no split of its own: 1,297 for training and 500 for testing, each class in
            proportion, drawn by seed 0.
        root: folder with the files; by default the environment variable ``UNBACKDOOR_DATA``. Looked for are
            ``<name>.npz`` (:func:`unbackdoor.data.arrays.load_npz`) and the publisher's own layout: MNIST's idx files
            (also gzipped, also under ``MNIST/raw``), ``cifar-10-batches-py`` (read without running anything from the
            pickles) or ``cifar-10-batches-bin``.

    Raises:
        DataError: unknown name, no root, no file (the message lists what was looked for), or a damaged file.
        ConfigError: unknown split.
    """
    info = dataset_info(name)
    if split not in get_args(Split):
        raise ConfigError(f"split must be one of {', '.join(get_args(Split))}, not {split!r}")
    if not info.needs:
        return _digits(split)
    folder = _root(info, root)
    packed = folder / f"{info.name}.npz"
    if packed.exists():
        samples = load_npz(packed, split=split, num_classes=info.num_classes).samples
        if samples.image_shape != info.image_shape:
            raise DataError(f"{packed}: {info.name} has images of {info.image_shape}, not {samples.image_shape}")
        return Samples(samples.inputs, samples.labels, info.num_classes, samples.class_names or info.class_names)
    for layout in info.layouts:
        found = layout(folder, split)
        if found is not None:
            images, labels = found
            return Samples(torch.from_numpy(images), torch.from_numpy(labels), info.num_classes, info.class_names)
    raise DataError(f"{info.name} was not found under {folder}; looked for {', '.join(info.needs)}")


def dataset_info(name: str) -> DatasetInfo:
    """The entry of :data:`DATASETS`, whatever the case of the name.

    Raises:
        DataError: no such name; the message lists those there are.
    """
    try:
        return DATASETS[name.lower()]
    except KeyError:
        raise DataError(f"unknown data set {name!r}{suggestion(name, sorted(DATASETS))}") from None


def _root(info: DatasetInfo, root: str | os.PathLike[str] | None) -> Path:
    given = root if root is not None else os.environ.get(ROOT_VARIABLE)
    if not given:
        raise DataError(
            f"{info.name} is read from files: name the folder that holds {' or '.join(info.needs)} "
            f"as the data root, or in the environment variable {ROOT_VARIABLE}"
        )
    folder = Path(given)
    if not folder.is_dir():
        raise DataError(f"the data root {folder} is no folder; it should hold {' or '.join(info.needs)}")
    return folder


def _digits(split: Split) -> Samples:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    labels = torch.from_numpy(np.asarray(bunch.target, np.int64))
    # Sixteen grey levels above black, spread over 0..255.
    images = torch.from_numpy(np.rint(np.asarray(bunch.images) * (255 / 16)).astype(np.uint8))[:, None]
    chosen = stratified(labels, DIGITS_TEST, Rng(DIGITS_SEED).stream("digits", "split"))
    part = chosen if split == "test" else ~chosen
    return Samples(images, labels, 10, _TEN_DIGITS).select(part.nonzero()[:, 0])


def stratified(labels: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Mask of ``count`` samples, each class in proportion (largest remainders get what rounding leaves)."""
    sizes = torch.bincount(labels)
    exact = sizes.double() * count / len(labels)
    shares = exact.floor().long()
    left = count - int(shares.sum())
    shares[(exact - shares).argsort(descending=True, stable=True)[:left]] += 1
    order = torch.randperm(len(labels), generator=generator)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label, share in enumerate(shares.tolist()):
        mask[order[labels[order] == label][:share]] = True
    return mask


def _mnist_idx(root: Path, split: Split) -> tuple[Images, Labels] | None:
    prefix = "train" if split == "train" else "t10k"
    for folder in (root, root / "MNIST" / "raw", root / "mnist"):
        images = _first(folder, f"{prefix}-images", "idx3-ubyte")
        labels = _first(folder, f"{prefix}-labels", "idx1-ubyte")
        if images and labels:
            return read_idx(images, 3)[:, None], read_idx(labels, 1).astype(np.int64)
    return None


def _first(folder: Path, stem: str, kind: str) -> Path | None:
    options = [folder / f"{stem}{joint}{kind}{end}" for joint in "-." for end in ("", ".gz")]
    return next((o for o in options if o.is_file()), None)


def read_idx(path: Path, dimensions: int) -> Images:
    """A uint8 array in IDX format (MNIST's), plain or gzipped.

    Raises:
        DataError: another type or rank, or not as many bytes as its header says.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    start = 4 + 4 * dimensions
    if len(data) < start or data[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(f"{path} is no IDX file of uint8 with {dimensions} dimensions")
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4))
    if len(data) - start != int(np.prod(shape, dtype=object)):
        raise DataError(f"{path} is cut short or too long: {len(data) - start} bytes for shape {shape}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()


def _cifar_files(root: Path, folder: str, split: Split, suffix: str) -> list[Path] | None:
    for parent in (root / folder, root / "cifar10" / folder, root):
        names = [f"data_batch_{i}{suffix}" for i in range(1, 6)] if split == "train" else [f"test_batch{suffix}"]
        if (parent / names[0]).is_file():
            missing = [n for n in names if not (parent / n).is_file()]
            if missing:
                raise DataError(f"{parent} lacks {', '.join(missing)}")
            return [parent / n for n in names]
    return None


def _cifar10_python(root: Path, split: Split) -> tuple[Images, Labels] | None:
    files = _cifar_files(root, "cifar-10-batches-py", split, "")
    return None if files is None else _joined(map(_read_python_batch, files))


def _cifar10_binary(root: Path, split: Split) -> tuple[Images, Labels] | None:
    files = _cifar_files(root, "cifar-10-batches-bin", split, ".bin")
    return None if files is None else _joined(map(_read_binary_batch, files))


def _joined(parts: Iterator[tuple[Images, Labels]]) -> tuple[Images, Labels]:
    images, labels = zip(*parts, strict=True)
    return np.concatenate(images).reshape(-1, 3, 32, 32), np.concatenate(labels)


def _read_binary_batch(path: Path) -> tuple[Images, Labels]:
    rows = np.fromfile(path, np.uint8)
    if len(rows) == 0 or len(rows) % 3073:
        raise DataError(f"{path} has {len(rows)} bytes, no multiple of 3073 (a label and 32×32×3 pixels)")
    rows = rows.reshape(-1, 3073)
    return rows[:, 1:], rows[:, 0].astype(np.int64)


def _read_python_batch(path: Path) -> tuple[Images, Labels]:
    with path.open("rb") as file:
        try:
            batch = _BatchUnpickler(file).load()
        except (
            pickle.UnpicklingError,
            EOFError,
            AttributeError,
            ImportError,
            IndexError,
            TypeError,
            ValueError,
        ) as error:
            raise DataError(f"{path} is no CIFAR-10 batch ({type(error).__name__}: {error})") from error
    if not isinstance(batch, dict):
        raise DataError(f"{path} is no CIFAR-10 batch: a dict is needed, not {type(batch).__name__}")
    data, labels = batch.get(b"data", batch.get("data")), batch.get(b"labels", batch.get("labels"))
    if not isinstance(data, _StubArray) or not isinstance(labels, list):
        raise DataError(f"{path} is no CIFAR-10 batch: it needs data (an array) and labels (a list)")
    images = data.rows(path)
    if len(images) != len(labels) or any(type(y) is not int for y in labels):
        raise DataError(f"{path}: {len(labels)} labels for {len(images)} images")
    return images, np.array(labels, np.int64)


class _StubType:
    """Stands for numpy.dtype: keeps the name and ignores the rest."""

    def __init__(self, name: str | bytes, *_: object) -> None:
        self.name = name.decode("ascii") if isinstance(name, bytes) else name

    def __setstate__(self, state: object) -> None:
        pass


class _StubArray:
    """Stands for numpy.ndarray: keeps the pickled state, so that numpy itself reads nothing that is not checked."""

    state: tuple[Any, ...] = ()

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def rows(self, path: Path) -> Images:
        """uint8 (N, 3072)."""
        if len(self.state) == 5:
            _, shape, kind, fortran, raw = self.state
            right = isinstance(kind, _StubType) and kind.name in ("u1", "uint8", "|u1") and isinstance(raw, bytes)
            if right and len(shape) == 2 and shape[1] == 3072 and len(raw) == shape[0] * 3072:
                flat = np.frombuffer(raw, np.uint8)
                return flat.reshape(3072, -1).T if fortran else flat.reshape(-1, 3072)
        raise DataError(f"{path}: its data must be uint8 rows of 3072 values")


def _latin1(text: str, encoding: str) -> bytes:
    """What ``_codecs.encode`` does in pickles of bytes written by Python 3 at protocol 2."""
    if encoding != "latin1":
        raise DataError(f"bytes pickled as {encoding!r} are not expected in a CIFAR-10 batch")
    return text.encode("latin1")


class _BatchUnpickler(pickle.Unpickler):
    """Reads a CIFAR-10 batch. The few globals that one needs are replaced by stubs; any other is refused."""

    _KNOWN: dict[str, object] = {  # noqa: RUF012 - never changed
        "numpy.core.multiarray._reconstruct": _StubArray,
        "numpy._core.multiarray._reconstruct": _StubArray,
        "numpy.ndarray": _StubArray,
        "numpy.dtype": _StubType,
        "_codecs.encode": _latin1,
    }

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="bytes")

    def find_class(self, module: str, name: str) -> Any:
        return self._KNOWN.get(f"{module}.{name}") or _refuse(f"{module}.{name}")


def _refuse(name: str) -> NoReturn:
    raise DataError(f"a CIFAR-10 batch holds arrays and lists only; this file asks for {name}, which is not run")


#: name -> what is known of it.
DATASETS: dict[str, DatasetInfo] = {
    info.name: info
    for info in (
        DatasetInfo("digits", (1, 8, 8), 10, _TEN_DIGITS, "crop", "scikit-learn's 1,797 handwritten digits; built in"),
        DatasetInfo(
            "mnist",
            (1, 28, 28),
            10,
            _TEN_DIGITS,
            "crop",
            "70,000 handwritten digits",
            ("mnist.npz", "MNIST/raw/train-images-idx3-ubyte[.gz]"),
            (_mnist_idx,),
        ),
        DatasetInfo(
            "cifar10",
            (3, 32, 32),
            10,
            _CIFAR10,
            "crop-flip",
            "60,000 small photographs of ten kinds",
            ("cifar10.npz", "cifar-10-batches-py", "cifar-10-batches-bin"),
            (_cifar10_python, _cifar10_binary),
        ),
        DatasetInfo("gtsrb", (3, 32, 32), 43, (), "crop", "German traffic signs", ("gtsrb.npz",)),
    )
}
