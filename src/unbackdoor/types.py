"""The central types: what a defense may see, what an attack must offer, what they return.

A :class:`Defense` is called with (model, clean samples, generator). No test set, no trigger and no target reaches it,
because its type has no place for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from unbackdoor.errors import DataError
from unbackdoor.rng import Rng

#: What a sample is.
InputKind = Literal["image", "text", "features"]

#: The token id that stands for "no token here". It is no tokenizer's pad id, so that a pad that is also the end-of-text
#: token cannot be confused with one that belongs to the text.
PADDING = -1


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Labelled images, texts or feature vectors, on one device. Shape and dtype of ``inputs`` say which.

    Attributes:
        inputs: images (N, C, H, W), uint8 in 0..255 (at rest) or a floating type in [0, 1]; token ids (N, L), int64,
            each row with at least one token and :data:`PADDING` after its last one; or feature vectors (N, D), of a
            floating type and finite.
        labels: (N,), int64, in 0..num_classes-1.
        num_classes: number of classes of the task, also of those that are absent here.
        class_names: one name a class, or empty.
        texts: what the rows of ``inputs`` were made of, a string each, or empty.
        encoder: makes rows of ``inputs`` of further texts, on the CPU; None where nothing can.

    Raises:
        DataError: wrong shape, type or range, or no sample at all.
    """

    inputs: Tensor
    labels: Tensor
    num_classes: int
    class_names: tuple[str, ...] = ()
    texts: tuple[str, ...] = field(default=(), repr=False)
    encoder: Callable[[Sequence[str]], Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        x, y = self.inputs, self.labels
        _check_inputs(x)
        if y.shape != (len(x),) or y.dtype != torch.int64:
            raise DataError(f"labels must be int64 of shape ({len(x)},), not {y.dtype} of shape {tuple(y.shape)}")
        if x.device != y.device:
            raise DataError(f"inputs are on {x.device} and labels on {y.device}: they must be on one device")
        if self.num_classes < 2:
            raise DataError(f"num_classes must be at least 2, not {self.num_classes}")
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= self.num_classes:
            wrong = low if low < 0 else high
            raise DataError(
                f"label {wrong} is out of range: {self.num_classes} classes allow 0..{self.num_classes - 1}"
            )
        if self.class_names and len(self.class_names) != self.num_classes:
            raise DataError(f"{len(self.class_names)} class names were given for {self.num_classes} classes")
        if self.texts and len(self.texts) != len(x):
            raise DataError(f"{len(self.texts)} texts were given for {len(x)} samples: one a sample is needed, or none")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        return self.labels.device

    @property
    def kind(self) -> InputKind:
        """What the samples are."""
        if self.inputs.ndim == 4:
            return "image"
        return "features" if self.inputs.dtype.is_floating_point else "text"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W).

        Raises:
            DataError: the samples are no images.
        """
        self.require_images("this")
        return (self.inputs.shape[1], self.inputs.shape[2], self.inputs.shape[3])

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample: (C, H, W), (L,) tokens of the longest text, or (D,)."""
        return tuple(self.inputs.shape[1:])

    def require_images(self, who: str) -> None:
        """Raise a DataError that says that ``who`` ("SIG", "the sinusoidal trigger") works on images alone."""
        if self.kind != "image":
            raise DataError(f"{who} works on images (N, C, H, W), and the samples are {_NAMES[self.kind]}")

    def lengths(self) -> Tensor:
        """(N,) int64 on the CPU: tokens of each text.

        Raises:
            DataError: the samples are no texts.
        """
        if self.kind != "text":
            raise DataError(f"only texts have lengths, and the samples are {_NAMES[self.kind]}")
        return (self.inputs != PADDING).sum(1).cpu()

    def to(self, device: torch.device | str) -> Samples:
        return replace(self, inputs=self.inputs.to(device), labels=self.labels.to(device))

    def select(self, indices: Tensor) -> Samples:
        """The samples at ``indices`` (int64, or a bool mask), in that order; repeats are allowed."""
        indices = indices.to(self.device)
        texts = self.texts
        if texts:
            chosen = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
            texts = tuple(texts[i] for i in chosen.tolist())
        return replace(self, inputs=self.inputs[indices], labels=self.labels[indices], texts=texts)

    def rewritten(self, texts: Sequence[str]) -> Samples:
        """The same labels with other texts, made inputs of by ``encoder``.

        Raises:
            DataError: there is no encoder, or not a text a sample.
        """
        if self.encoder is None:
            raise DataError("these samples cannot be rewritten: they carry no encoder that makes inputs of texts")
        if len(texts) != len(self):
            raise DataError(f"{len(texts)} texts were given for {len(self)} samples: one a sample is needed")
        return replace(self, inputs=self.encoder(texts).to(self.device), texts=tuple(texts))

    def counts(self) -> Tensor:
        """(num_classes,) int64: samples per class, on the CPU."""
        return torch.bincount(self.labels, minlength=self.num_classes).cpu()

    def images(self, indices: Tensor | slice) -> Tensor:
        """What a model is fed: (n, C, H, W) float32 in [0, 1]; ids (n, l) cut to the longest; (n, D) float32."""
        chosen = as_float(self.inputs[indices])
        return trimmed(chosen) if self.kind == "text" else chosen

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(what :meth:`images` gives, labels) in order, ``size`` at a time."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield self.images(part), self.labels[part]

    def split(self, share: float, generator: torch.Generator) -> tuple[Samples, Samples | None]:
        """Set a share of each class aside: (rest, held out).

        Of each class with at least two samples, ``round(share · n)`` but at least one is held out and at least one
        stays. A class with a single sample stays whole. Without any class that has two, nothing is held out and the
        second value is None.
        """
        if not 0 < share < 1:
            raise DataError(f"the held-out share must lie between 0 and 1, not {share}")
        labels = self.labels.cpu()
        order = torch.randperm(len(labels), generator=generator)
        out = torch.zeros(len(labels), dtype=torch.bool)
        for c in range(self.num_classes):
            members = order[labels[order] == c]
            if len(members) >= 2:
                out[members[: min(len(members) - 1, max(1, round(share * len(members))))]] = True
        if not out.any():
            return self, None
        return self.select((~out).nonzero()[:, 0]), self.select(out.nonzero()[:, 0])

    def draw(self, per_class: int, generator: torch.Generator) -> Samples:
        """``per_class`` samples of each class (all of them where a class has fewer), in their given order.

        Raises:
            DataError: ``per_class`` is below 1.
        """
        return self.part(per_class, generator)[0]

    def part(self, per_class: int, generator: torch.Generator) -> tuple[Samples, Samples | None]:
        """(what :meth:`draw` gives, the others in their given order); None where there are no others.

        Raises:
            DataError: ``per_class`` is below 1.
        """
        if per_class < 1:
            raise DataError(f"per_class must be at least 1, not {per_class}")
        labels = self.labels.cpu()
        order = torch.randperm(len(labels), generator=generator)
        drawn = torch.zeros(len(labels), dtype=torch.bool)
        for c in range(self.num_classes):
            drawn[order[labels[order] == c][:per_class]] = True
        others = (~drawn).nonzero()[:, 0]
        return self.select(drawn.nonzero()[:, 0]), self.select(others) if len(others) else None


_NAMES: dict[InputKind, str] = {"image": "images", "text": "texts", "features": "feature vectors"}


def _check_inputs(x: Tensor) -> None:
    if x.ndim not in (2, 4):
        raise DataError(
            "inputs must be (N, C, H, W) images, (N, L) int64 token ids or (N, D) floating features, "
            f"not {tuple(x.shape)}"
        )
    if len(x) == 0:
        raise DataError("there are no samples: at least one is needed")
    if x.ndim == 4:
        if x.dtype != torch.uint8 and not x.dtype.is_floating_point:
            raise DataError(f"inputs must be uint8 in 0..255 or floating in [0, 1], not {x.dtype}")
        if x.dtype.is_floating_point:
            least, most = float(x.min()), float(x.max())
            if not (least >= 0 and most <= 1):  # also catches NaN
                raise DataError(f"floating inputs must lie in [0, 1]; these span {least:g}..{most:g}")
    elif x.dtype.is_floating_point:
        broken = int((~x.isfinite()).any(1).sum())
        if broken:
            raise DataError(f"features must be finite; {broken} of {len(x)} samples hold NaN or an infinity")
    elif x.dtype == torch.int64:
        _check_ids(x)
    else:
        raise DataError(f"(N, L) inputs must be int64 token ids, and (N, D) features floating, not {x.dtype}")


def _check_ids(x: Tensor) -> None:
    least = int(x.min()) if x.numel() else PADDING
    if least < PADDING:
        raise DataError(f"token ids must be at least 0, or {PADDING} after a text's end, not {least}")
    there = x != PADDING
    if not bool(there.any(1).all()):
        raise DataError(f"sample {int((~there.any(1)).nonzero()[0, 0])} has no token: each text needs at least one")
    gaps = (there[:, 1:] & ~there[:, :-1]).any(1)
    if bool(gaps.any()):
        raise DataError(f"sample {int(gaps.nonzero()[0, 0])} has padding ({PADDING}) before a token: it goes behind")


def as_float(inputs: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in [0, 1]; a floating tensor comes back as float32, token ids as they are."""
    if inputs.dtype == torch.int64:
        return inputs
    return inputs.float().div_(255) if inputs.dtype == torch.uint8 else inputs.float()


def trimmed(ids: Tensor) -> Tensor:
    """Token ids (N, L) without the columns at the end that hold padding alone; at least one stays."""
    return ids[:, : max(1, int((ids != PADDING).any(0).sum()))]


def laid_out(x: Tensor) -> Tensor:
    """Images in the memory order that convolutions like best, channels_last; ids and features as they are."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


@dataclass(frozen=True, slots=True, eq=False)
class Triggered:
    """A fixed set of triggered samples, for measuring alone: where somebody gives these instead of the trigger.

    Attributes:
        samples: the triggered inputs, with their true labels.
        wanted: (N,), int64, the attacker's labels, in 0..num_classes-1.
        name: what reports call it.

    Raises:
        DataError: not one attacker's label a sample, or one that is no class.
    """

    samples: Samples
    wanted: Tensor
    name: str = "triggered samples"

    def __post_init__(self) -> None:
        count, classes = len(self.samples), self.samples.num_classes
        if self.wanted.shape != (count,) or self.wanted.dtype != torch.int64:
            raise DataError(
                f"the attacker's labels must be int64 of shape ({count},), not {self.wanted.dtype} of shape "
                f"{tuple(self.wanted.shape)}"
            )
        low, high = int(self.wanted.min()), int(self.wanted.max())
        if low < 0 or high >= classes:
            wrong = low if low < 0 else high
            raise DataError(f"the attacker's label {wrong} is no class: {classes} classes allow 0..{classes - 1}")

    def to(self, device: torch.device | str) -> Triggered:
        return replace(self, samples=self.samples.to(device), wanted=self.wanted.to(device))


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one epoch of :func:`unbackdoor.training.fit` did.

    ``loss``, ``terms`` and ``accuracy`` are running means over the epoch's batches (train mode, before each step);
    ``measured`` holds what the caller's ``until`` hook added, such as ``held_out_accuracy``: the first part says on
    what, the last part which figure.
    """

    index: int
    loss: float
    accuracy: float
    lr: float
    images: int
    seconds: float
    terms: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Phase:
    """A named stretch of training, such as "forget" or "relearn"."""

    name: str
    epochs: tuple[Epoch, ...]


@dataclass(frozen=True, slots=True)
class UnitScores:
    """Suspicion scores of one layer's output units (rows of its weight): ULRL's s, m, MAD, z and S.

    ``scores`` and ``deviations`` have one entry a unit; ``flagged`` lists the indices that stood out and were reset. Of
    attention heads those stood out, and nothing was reset by it.
    """

    layer: str
    scores: tuple[float, ...]
    median: float
    mad: float
    deviations: tuple[float, ...]
    flagged: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """What a defense did: its phases, its scores, and notes in plain words. ``values`` holds single figures.

    ``heads`` are scores of attention heads, a :class:`UnitScores` a layer of attention, whose units are its heads.
    ``trial_images`` counts what passed through in trials whose phases are not among ``phases``.
    """

    phases: tuple[Phase, ...] = ()
    scores: tuple[UnitScores, ...] = ()
    values: dict[str, float | int | str | bool] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    trial_images: int = 0
    heads: tuple[UnitScores, ...] = ()

    @property
    def images(self) -> int:
        """Images that passed through the network in training, trials included: what the removal cost."""
        return self.trial_images + sum(e.images for p in self.phases for e in p.epochs)


@dataclass(frozen=True, slots=True)
class Removal:
    """The result of a defense: a new model (the given one is never changed) and the trace of how it came about."""

    model: nn.Module
    trace: Trace


@runtime_checkable
class Defense(Protocol):
    """A frozen, keyword-only dataclass of hyper-parameters that can be called."""

    def __call__(self, model: nn.Module, clean: Samples, rng: Rng) -> Removal:
        """Return a cleaned copy of ``model``, which maps images (N, C, H, W) in [0, 1] to logits (N, classes).

        What a model of texts or features maps is what :meth:`Samples.images` gives.
        """
        ...


class Trigger(Protocol):
    """Stamps a batch of images: float (N, C, H, W) in [0, 1] in and out, pure, on the batch's device."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


@runtime_checkable
class Attack(Protocol):
    """A frozen, keyword-only dataclass that plans a poisoning, stamps images and relabels them."""

    def plan(self, labels: Tensor, num_classes: int, rng: Rng) -> Tensor:
        """Indices (int64, sorted, on the CPU) of the training samples to poison."""
        ...

    def trigger(self, x: Tensor, /) -> Tensor: ...

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """The labels that the attacker wants for triggered inputs."""
        ...


@runtime_checkable
class TextAttack(Attack, Protocol):
    """An attack whose trigger rewrites texts. Its :meth:`~Attack.trigger` of tensors raises a ConfigError."""

    def rewrite(self, samples: Samples) -> Samples:
        """The samples with their texts triggered, as at test time: pure, labels as they were."""
        ...


@dataclass(frozen=True, slots=True)
class Victim:
    """A network with a known backdoor, and what is needed to judge a removal."""

    model: nn.Module
    attack: Attack
    num_classes: int
    seed: int
    accuracy: float
    asr: float
    details: dict[str, Any] = field(default_factory=dict)
