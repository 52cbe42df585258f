"""Models as the TrojAI contest lays them out: ``id-00000007/`` to a network, clean samples and what to judge by.

Rounds 1 to 6 and 11, the mitigation round's folders and the tabular cyber rounds. Nothing that a folder holds is run.
What only an evaluation may know (poisoned examples, their targets, the ground truth) comes apart from the rest, as
:class:`GroundTruth`, and no defense has a place for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor.data.loaded import checked
from unbackdoor.data.trojai_examples import (
    Example,
    clean_examples,
    labels_of,
    poisoned_examples,
    read_array,
    read_pictures,
    read_sentences,
    read_vectors,
    wanted_of,
)
from unbackdoor.data.trojai_layouts import (
    CLEAN_FOLDERS,
    EMBEDDINGS,
    HELD_BACK,
    MODEL,
    POISONED_FOLDERS,
    SCALE,
    TOKENIZERS,
    TRUTH,
    Layout,
    find_models,
    is_trojai_folder,
    layout_of,
    read_config,
    setting,
)
from unbackdoor.errors import CheckpointError, DataError
from unbackdoor.inference import evaluating
from unbackdoor.models.architectures import load_network
from unbackdoor.models.checkpoints import Checkpoint, read_checkpoint
from unbackdoor.models.feature_inputs import FeatureClassifier
from unbackdoor.models.frozen_embedding import FrozenEmbedding, load_embedding
from unbackdoor.models.inputs import Classifier, choose_format
from unbackdoor.types import Samples, Triggered

__all__ = [
    "GroundTruth",
    "TrojaiModel",
    "find_models",
    "held_back_folder",
    "is_trojai_folder",
    "load_held_back",
    "load_trojai",
    "stated_truth",
]

#: Precomputed embeddings of the examples, where a folder comes without its round's encoder.
_EMBEDDED = {"clean": "clean-example-cls-embedding.csv", "poisoned": "poisoned-example-cls-embedding.csv"}


@dataclass(frozen=True, slots=True)
class GroundTruth:
    """What an evaluation may know, and no defense.

    Attributes:
        poisoned: what ``ground_truth.csv`` says; None without it.
        triggered: the poisoned examples with the attacker's labels; None where there are none whose target is known.
    """

    poisoned: bool | None = None
    triggered: Triggered | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TrojaiModel:
    """A folder's model, ready to be cleaned and judged.

    Attributes:
        folder: where it lies.
        layout: its round's.
        checkpoint: what to write a cleaned network like.
        model: the network in its wrapper, on the CPU, in eval mode; maps :meth:`Samples.images` to logits.
        clean: the clean examples, with their labels.
        truth: for evaluation alone.
        input_format: in words.
        notes: what was assumed or converted.
    """

    folder: Path
    layout: Layout
    checkpoint: Checkpoint
    model: Classifier | FeatureClassifier
    clean: Samples
    truth: GroundTruth
    input_format: str
    notes: tuple[str, ...] = field(default=())


def load_trojai(
    folder: str | os.PathLike[str],
    *,
    arch: str | None = None,
    normalize: str | None = None,
    trust_pickle: bool = False,
    strict: bool = False,
    min_per_class: int = 2,
) -> TrojaiModel:
    """Read a model's folder, and what it refers to in the folders above: embeddings, tokenizers, scaling.

    Args:
        arch: the network's definition, for a file whose classes are not known.
        normalize: how a network of pictures takes them, in place of what its round does.
        trust_pickle: unpickle ``model.pt`` as torch does, which runs whatever code it holds.
        strict: pictures on which the network answers at chance are an error; otherwise a note.
        min_per_class: examples that at least one class must have; with 1, nothing can be held out to measure on.

    Raises:
        DataError: no examples, too few, damaged ones, or another number of classes than the network has.
        CheckpointError: the network cannot be read or does not run on such examples.
        UnsafeCheckpoint: it can only be loaded by running what the file brings.
        UnsupportedModel: it labels tokens (round 7).
    """
    root = Path(folder)
    if not (root / MODEL).is_file():
        raise CheckpointError(f"{root} holds no {MODEL}; a TrojAI model's folder is needed")
    config = read_config(root)
    layout, clean_folder = layout_of(root, config)
    examples = clean_examples(clean_folder)
    _check_counts(examples, clean_folder, min_per_class)
    checkpoint = read_checkpoint(root / MODEL, trust_pickle=trust_pickle)
    network = load_network(checkpoint, arch)

    notes = [] if config else ["no settings: config.json is missing"]
    reader = _reader(root, layout, config)
    inputs, told = reader.read(examples, "clean")
    outputs = _count_outputs(reader.wrapped(network), inputs, root)
    _check_classes(examples, config, outputs, root)
    samples = reader.samples(inputs, labels_of(examples), outputs, examples)
    loaded = checked(samples, [*notes, *reader.notes, *told], str(clean_folder))
    model, input_format, seen = reader.classifier(network, loaded.samples, normalize, strict)
    truth, lost = _truth(root, reader, config, outputs)
    return TrojaiModel(
        folder=root,
        layout=layout,
        checkpoint=checkpoint,
        model=model,
        clean=loaded.samples,
        truth=truth,
        input_format=input_format,
        notes=(f"the folder is laid out as in {layout.told}", *loaded.notes, *seen, *lost),
    )


def _check_counts(examples: list[Example], folder: Path, least: int) -> None:
    most = int(torch.bincount(labels_of(examples)).max())
    if most < least:
        raise DataError(
            f"{folder} holds {most} example a class: nothing can be set aside to measure on; {least} of a class are "
            "needed, or per_class=1 (--per-class 1) to clean by them all the same"
        )


def _check_classes(examples: list[Example], config: Mapping[str, Any], outputs: int, folder: Path) -> None:
    stated = setting(config, "number_classes", "num_classes")
    if isinstance(stated, int) and stated != outputs:
        raise DataError(f"{folder}: its settings state {stated} classes, and its network has {outputs} outputs")
    highest = max(e.label for e in examples)
    if highest >= outputs:
        raise DataError(f"{folder}: an example is of class {highest}, and its network has {outputs} outputs")


@torch.no_grad()
def _count_outputs(model: nn.Module, inputs: Tensor, folder: Path) -> int:
    few = inputs[:2].float() / (255 if inputs.dtype == torch.uint8 else 1)
    try:
        with evaluating(model):
            return int(model(few).shape[1])
    except Exception as error:  # the owner's network may raise anything
        text = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder / MODEL} does not run on the folder's own examples, {tuple(few.shape[1:])} each: "
            f"{type(error).__name__}: {text[:200]}"
        ) from error


def _truth(root: Path, reader: _Reader, config: Mapping[str, Any], outputs: int) -> tuple[GroundTruth, list[str]]:
    triggered, notes = _triggered(root, reader, config, outputs, f"poisoned examples of {root.resolve().name}")
    return GroundTruth(stated_truth(root), triggered), notes


def _triggered(
    place: Path, reader: _Reader, config: Mapping[str, Any], outputs: int, name: str
) -> tuple[Triggered | None, list[str]]:
    """(the poisoned examples in ``place``, notes on those that show nothing)."""
    folder = next((place / sub for sub in POISONED_FOLDERS if (place / sub).is_dir()), None)
    if folder is None:
        return None, []
    examples, notes = poisoned_examples(folder, config, outputs)
    if not examples:
        return None, notes
    inputs, _ = reader.read(examples, "poisoned")
    samples, wanted = reader.samples(inputs, labels_of(examples), outputs, examples), wanted_of(examples)
    if bool((wanted == samples.labels).all()):
        return None, [*notes, "the poisoned examples are of the target's own class: they show nothing"]
    return Triggered(samples, wanted, f"the {len(examples)} {name}"), notes


def load_held_back(model: TrojaiModel) -> tuple[Samples, Triggered | None] | None:
    """The fresh samples that a root made here keeps for a model, clean and poisoned; None where there are none.

    They are for evaluation alone.

    Raises:
        DataError: they are damaged.
    """
    place = held_back_folder(model.folder)
    if place is None:
        return None
    config, classes = read_config(model.folder), model.clean.num_classes
    reader, examples = _reader(model.folder, model.layout, config), clean_examples(place / CLEAN_FOLDERS[0])
    clean = reader.samples(reader.read(examples, "clean")[0], labels_of(examples), classes, examples)
    name = f"fresh poisoned samples of {model.folder.resolve().name}"
    return clean, _triggered(place, reader, config, classes, name)[0]


def held_back_folder(folder: Path) -> Path | None:
    """Where the fresh samples of a model lie, laid out like examples; None where there are none."""
    kept = _beside(folder, HELD_BACK)
    place = None if kept is None else kept / folder.resolve().name
    return place if place is not None and (place / CLEAN_FOLDERS[0]).is_dir() else None


def stated_truth(root: Path) -> bool | None:
    """Whether a model has a backdoor, by ``ground_truth.csv``; None without it. For evaluation alone.

    Raises:
        DataError: the file holds something else than 0 or 1.
    """
    path = root / TRUTH
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    if text.lower() not in ("0", "1", "true", "false"):
        raise DataError(f"{path} holds {text[:40]!r}; 0 (clean) or 1 (poisoned) is needed")
    return text.lower() in ("1", "true")


def _beside(root: Path, name: str) -> Path | None:
    """A file or folder of that name with the model, or in one of the two folders above it."""
    place = root.resolve()
    return next((p / name for p in (place, place.parent, place.parent.parent) if (p / name).exists()), None)


class _Reader:
    """What differs with the kind of examples: reading them, and wrapping the network for them."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.notes: list[str] = []

    def read(self, examples: list[Example], which: str) -> tuple[Tensor, list[str]]:
        """(inputs of Samples, notes). ``which`` is "clean" or "poisoned"."""
        return read_pictures(examples, self.layout)

    def samples(self, inputs: Tensor, labels: Tensor, classes: int, examples: list[Example]) -> Samples:
        return Samples(inputs, labels, classes)

    def wrapped(self, network: nn.Module) -> nn.Module:
        """The network as it is run first, to count its outputs."""
        return Classifier(network)

    def classifier(
        self, network: nn.Module, samples: Samples, normalize: str | None, strict: bool
    ) -> tuple[Classifier | FeatureClassifier, str, tuple[str, ...]]:
        """(the network in its wrapper, its input format in words, notes)."""
        stated = normalize or ("0-1:bgr" if self.layout.bgr else "0-1")
        choice = choose_format(network, samples, stated, strict=strict)
        return choice.classifier(network), str(choice.format), choice.notes


class _Vectors(_Reader):
    """Feature vectors, which the network takes scaled."""

    def __init__(self, layout: Layout, root: Path) -> None:
        super().__init__(layout)
        self.mean: Tensor | None = None
        self.scale: Tensor | None = None
        path = _beside(root, SCALE)
        if path is None:
            self.notes.append(f"no {SCALE} is there: the features are taken as they are")
            return
        params = torch.from_numpy(read_array(path))
        if params.ndim != 2 or len(params) != 2:
            raise DataError(f"{path} has shape {tuple(params.shape)}; means and scales, (2, features), are needed")
        self.mean, self.scale = params[0], params[1]

    def read(self, examples: list[Example], which: str) -> tuple[Tensor, list[str]]:
        vectors = read_vectors(examples)
        if self.mean is not None and vectors.shape[1] != len(self.mean):
            raise DataError(f"{SCALE} is for {len(self.mean)} features, and the examples have {vectors.shape[1]}")
        return vectors, []

    def wrapped(self, network: nn.Module) -> FeatureClassifier:
        return FeatureClassifier(network, mean=self.mean, scale=self.scale)

    def classifier(
        self, network: nn.Module, samples: Samples, normalize: str | None, strict: bool
    ) -> tuple[FeatureClassifier, str, tuple[str, ...]]:
        scaled = "as they are" if self.mean is None else f"scaled by {SCALE}"
        return self.wrapped(network), f"{samples.inputs.shape[1]} features, {scaled}", ()


class _Sentences(_Reader):
    """Texts, embedded once: the samples are the embeddings, and carry the texts and what embeds them."""

    def __init__(self, layout: Layout, root: Path, config: Mapping[str, Any]) -> None:
        super().__init__(layout)
        self.root = root
        self.embedding = _embedding(root, config)
        if self.embedding is None:
            self.notes.append("the round's embeddings are not at hand: those that the folder lists are taken")

    def read(self, examples: list[Example], which: str) -> tuple[Tensor, list[str]]:
        if self.embedding is not None:
            return self.embedding(read_sentences(examples)), []
        return _listed_embeddings(self.root / _EMBEDDED[which], examples), []

    def samples(self, inputs: Tensor, labels: Tensor, classes: int, examples: list[Example]) -> Samples:
        return replace(Samples(inputs, labels, classes), texts=read_sentences(examples), encoder=self.embedding)

    def wrapped(self, network: nn.Module) -> FeatureClassifier:
        return FeatureClassifier(network, as_sequence=True)

    def classifier(
        self, network: nn.Module, samples: Samples, normalize: str | None, strict: bool
    ) -> tuple[FeatureClassifier, str, tuple[str, ...]]:
        return self.wrapped(network), f"texts, as embeddings of {samples.inputs.shape[1]} numbers", ()


def _reader(root: Path, layout: Layout, config: Mapping[str, Any]) -> _Reader:
    if layout.kind == "text":
        return _Sentences(layout, root, config)
    return _Vectors(layout, root) if layout.kind == "features" else _Reader(layout)


def _embedding(root: Path, config: Mapping[str, Any]) -> FrozenEmbedding | None:
    """The round's encoder with its tokenizer; None where the root or the settings do not have them.

    Raises:
        DataError: the settings name a file outside of the round's folders.
    """
    name, flavor = setting(config, "embedding"), setting(config, "embedding_flavor")
    if not isinstance(name, str) or not isinstance(flavor, str):
        return None
    file = f"{name}-{flavor}.pt"
    if Path(file).name != file:
        raise DataError(f"{root}: its settings name the embedding {file!r}, which is no plain file name")
    encoders, tokenizers = _beside(root, EMBEDDINGS), _beside(root, TOKENIZERS)
    if encoders is None or tokenizers is None or not (encoders / file).is_file():
        return None
    first = setting(config, "cls_token_is_first")
    return load_embedding(
        encoders / file, tokenizers / file, first=first if isinstance(first, bool) else "GPT" not in name
    )


def _listed_embeddings(path: Path, examples: list[Example]) -> Tensor:
    """The rows of a csv file of example name and embedding, in the examples' order."""
    if not path.is_file():
        raise DataError(f"{path} is missing, and so are the embeddings and tokenizers of the round")
    rows: dict[str, list[float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, _, numbers = line.partition(",")
        try:
            rows[Path(name.strip()).stem] = [float(n) for n in numbers.split(",")]
        except ValueError:
            continue  # a header
    absent = [e.path.name for e in examples if e.path.stem not in rows]
    if absent:
        raise DataError(f"{path} has no embedding of {', '.join(absent[:3])}")
    found = [rows[e.path.stem] for e in examples]
    if len({len(row) for row in found}) > 1:
        raise DataError(f"{path} has embeddings of several lengths")
    return torch.tensor(found)
