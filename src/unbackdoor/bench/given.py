"""A folder of suspicious models: which there are, and the graph of cleaning each of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from unbackdoor.attacks.victims import CARD, TRIGGER, WEIGHTS, is_victim
from unbackdoor.bench.jobs import ALL, CellJob, GivenModel
from unbackdoor.bench.plan import Graph, cells_of, suited
from unbackdoor.bench.store import is_store
from unbackdoor.data.named import DATASETS
from unbackdoor.data.trojai import held_back_folder
from unbackdoor.data.trojai_layouts import COMPANIONS, MODEL, is_trojai_folder
from unbackdoor.errors import DataError
from unbackdoor.models.text import CONFIG, is_text_folder

#: What a checkpoint's name ends in.
SUFFIXES = (".pt", ".pth", ".safetensors", ".bin", ".ckpt", ".pkl", ".jit")
#: One of these lies with a text classifier of transformers, and with no network of images.
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)
#: The budget where none is stated and the model does not bring its own samples.
PER_CLASS = 10

#: What a model's path names: a checkpoint's file, or a folder.
Kind = Literal["file", "victim", "trojai", "text"]


def kind_of(path: Path) -> Kind | None:
    """What a path names; None for a folder that holds no model itself."""
    if not path.is_dir():
        return "file"
    if is_trojai_folder(path):
        return "trojai"
    if is_text_folder(path) and any((path / name).is_file() for name in _TOKENIZERS):
        return "text"
    return "victim" if is_victim(path) else None


def models_in(
    folder: Path, data: str | None, *, arch: str | None = None, normalize: str | None = None
) -> tuple[GivenModel, ...]:
    """Every model below a folder: folders of victims, TrojAI models and text classifiers, and checkpoints' files.

    A model's name is its path in the folder without the suffix; ``id-00000007/model.pt`` is ``id-00000007``. TrojAI
    models are cleaned by their own examples, the others by ``data``. Nested results of a benchmark, and the embeddings
    and tokenizers of a TrojAI round, are no models.

    Args:
        data, arch, normalize: as :class:`~unbackdoor.bench.jobs.GivenModel` has them.

    Raises:
        DataError: it is no folder, or holds no model.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; one with suspicious models is needed")
    found = list(_places(folder))
    if not found:
        raise DataError(
            f"{folder} holds no model: looked for {', '.join(SUFFIXES)}, folders with {CARD}, TrojAI models' folders "
            f"({MODEL} beside examples or settings) and text classifiers' ({CONFIG} beside a tokenizer)"
        )
    return tuple(_given(path, folder, data, arch, normalize) for path in found)


def _places(folder: Path) -> Iterator[Path]:
    if kind_of(folder) is not None:
        yield folder
        return
    entries = [e for e in sorted(folder.iterdir()) if not e.name.startswith(".")]
    folders = [e for e in entries if e.is_dir() and not e.is_symlink() and not is_store(e)]
    inside = {e: list(_places(e)) for e in folders if e.name not in COMPANIONS}
    if not any(is_trojai_folder(path) for places in inside.values() for path in places):
        inside |= {e: list(_places(e)) for e in folders if e.name in COMPANIONS}
    for entry in entries:
        if entry.suffix.lower() in SUFFIXES and entry.is_file():
            yield entry
        yield from inside.get(entry, ())


def _given(path: Path, folder: Path, data: str | None, arch: str | None, normalize: str | None) -> GivenModel:
    kind = kind_of(path)
    own = kind == "trojai"
    weights = {"trojai": path / MODEL, "text": path / WEIGHTS, "victim": path / WEIGHTS}.get(kind or "", path)
    others: list[Path] = []
    if kind in ("trojai", "text"):
        others = [p for p in _files(path) if p != weights and p.name not in (CARD, TRIGGER)]
    held = held_back_folder(path) if own else None
    return GivenModel(
        path=str(path),
        name=_name(path, folder),
        sha256=_digest(weights),
        data=None if own else data,
        arch=None if kind == "text" else arch,
        normalize=None if kind == "text" else normalize,
        beside=_digest_of(path, others, () if held is None else _files(held)) if others else None,
    )


def brings_samples(model: GivenModel) -> bool:
    """Whether a model is cleaned by examples of its own."""
    return kind_of(Path(model.path)) == "trojai"


def graph_of_models(
    models: Sequence[GivenModel],
    defenses: Sequence[str],
    per_class: Sequence[int] | None,
    seeds: Sequence[int],
    min_asr: float,
) -> Graph:
    """Every model × seed × budget × defense, seed by seed.

    Args:
        per_class: budgets; None for :data:`PER_CLASS`, or for all that a model brings.
    """
    cells: dict[str, CellJob] = {}
    suits = {data: _suited(defenses, data) for data in {model.data for model in models}}
    for seed in seeds:
        for model in models:
            budgets = per_class or [ALL if brings_samples(model) else PER_CLASS]
            for cell in cells_of(model, suits[model.data], [(count, None) for count in budgets], [seed], min_asr):
                cells.setdefault(cell.key, cell)
    return Graph((), tuple(cells.values()))


def _suited(defenses: Sequence[str], data: str | None) -> list[str]:
    info = None if data is None else DATASETS.get(data.partition("[")[0].lower())
    return [suited(defense, info) for defense in defenses]


def _name(path: Path, folder: Path) -> str:
    inside = path.relative_to(folder)
    if path.is_dir():
        return inside.as_posix() if inside.parts else folder.resolve().name
    return (
        inside.parent.as_posix()
        if inside.stem == "model" and len(inside.parts) > 1
        else inside.with_suffix("").as_posix()
    )


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))


def _digest_of(folder: Path, own: Iterable[Path], held: Iterable[Path]) -> str | None:
    """Of the names and contents of files; None where one cannot be read."""
    told = hashlib.sha256()
    for path in (*own, *held):
        found = _digest(path)
        if found is None:
            return None
        inside = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else f"held back: {path.name}"
        told.update(f"{inside}\0{found}\n".encode())
    return told.hexdigest()


def _digest(path: Path) -> str | None:
    with suppress(OSError), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
    return None
