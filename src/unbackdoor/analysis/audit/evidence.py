"""What can be gathered about each class of a network whose trigger, if there is one, nobody knows.

Every kind of evidence is one positive number a class, by which a class with a backdoor tends to differ from the others.
What a difference means is for a calibration to say: see :mod:`unbackdoor.analysis.audit.calibration`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import torch
from torch import Tensor, nn

from unbackdoor import progress
from unbackdoor.analysis.forgetting_speed import forgetting_speed
from unbackdoor.analysis.perturbation_size import SizeSearch, perturbation_sizes
from unbackdoor.defenses.ascent import ascend
from unbackdoor.defenses.inversion import InvertedTrigger, Search, invert
from unbackdoor.defenses.steadiness import epochs_of
from unbackdoor.defenses.ulrl import ULRL
from unbackdoor.errors import DataError, TrainingDiverged, UnsupportedModel
from unbackdoor.inference import device_of, evaluating, predict
from unbackdoor.models.features import HeadInput
from unbackdoor.models.surgery import find_head
from unbackdoor.rng import Rng
from unbackdoor.training import Recipe
from unbackdoor.types import Samples

#: Samples of each class that an audit looks at, at most. The calibration holds for what was gathered in this way: how
#: many samples there are and how long is searched is no setting.
PER_CLASS = 20

_PIXEL_SEARCH = Search(rounds=40, round_steps=5, stop_rounds=20)
_FEATURE_SEARCH = Search(rounds=40, round_steps=5, stop_rounds=20, batch_size=64)
_SIZES = SizeSearch(count=64, steps=12, halvings=5)
_FORGETTING_STEPS = 48
_ASCENT = Recipe(epochs=20, batch_size=32, lr=0.01, weight_decay=5e-4, clip_norm=20.0, precision="fp32")
#: Gradient ascent ends where an epoch's accuracy is at most this, as in ULRL.
_ASCENDED = 0.2


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of evidence.

    Attributes:
        title: what pages call it.
        unit: of the number.
        small: whether a small number is suspicious; otherwise a large one is.
        meaning: what the number is, for whoever reads a report.
    """

    title: str
    unit: str
    small: bool
    meaning: str


KINDS: Mapping[str, Kind] = {
    "pixel_mask": Kind(
        "Smallest patch",
        "pixels",
        True,
        "How many pixels a patch has to replace so that images of other classes are taken for this one.",
    ),
    "feature_mask": Kind(
        "Smallest change of features",
        "features",
        True,
        "The same in the space before the last layer: how many features have to be replaced.",
    ),
    "feature_shift": Kind(
        "Smallest shift of features",
        "of the range",
        True,
        "How far the features before the last layer have to be moved, all images alike.",
    ),
    "perturbation": Kind(
        "Smallest universal perturbation",
        "of a pixel's range",
        True,
        "The length of the smallest found perturbation that sends images of other classes to this one.",
    ),
    "retention": Kind(
        "Kept while forgetting",
        "share of the probability",
        True,
        "How much of its probability on its own images the class keeps while a copy is trained on wrong labels.",
    ),
    "unlearning": Kind(
        "Movement in unlearning",
        "sum of changes",
        False,
        "How far the class's row in the last layer moves when a copy unlearns the task by gradient ascent.",
    ),
}


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What was gathered.

    Attributes:
        measures: kind -> a positive number a class; a kind that this network does not allow is missing.
        triggers: the smallest patch found for each class.
        samples: how many samples were looked at.
        notes: why a kind is missing, in plain words.
    """

    measures: dict[str, tuple[float, ...]]
    triggers: tuple[InvertedTrigger, ...]
    samples: int
    notes: tuple[str, ...] = ()

    @property
    def figures(self) -> dict[str, tuple[float, ...]]:
        """Kind -> a figure a class: see :func:`stands_out`."""
        return {kind: stands_out(values, small=KINDS[kind].small) for kind, values in self.measures.items()}


def stands_out(values: Sequence[float], *, small: bool) -> tuple[float, ...]:
    """For each value the natural logarithm of its ratio to the median of the others; where ``small`` is suspicious, of
    the inverse ratio. Above 0 is the suspicious side, and no unit is left.

    Args:
        values: positive, two at least.
    """
    logs = [math.log(value) for value in values]
    sign = -1 if small else 1
    return tuple(sign * (own - median(logs[:i] + logs[i + 1 :])) for i, own in enumerate(logs))


def gather(model: nn.Module, clean: Samples, rng: Rng) -> Evidence:
    """Gather all kinds of evidence. ``model`` is left as it is.

    Args:
        model: maps images (N, C, H, W) in [0, 1] to logits (N, num_classes).
        clean: images with true labels; at most :data:`PER_CLASS` of each class are used, drawn by ``rng``.

    Raises:
        DataError: no images, images of one class alone, or a network whose outputs do not fit or are not finite.
    """
    check_auditable(model, clean)
    seen = clean.draw(PER_CLASS, rng.stream("samples")).to(device_of(model))
    # The search for perturbations takes the first images: they must not be those of the first classes.
    seen = seen.select(torch.randperm(len(seen), generator=rng.stream("order")))
    measures: dict[str, tuple[float, ...]] = {}
    notes: list[str] = []
    triggers = invert(model, seen, rng.child("pixels"), _PIXEL_SEARCH).triggers
    whole = math.prod(seen.image_shape[1:])
    measures["pixel_mask"] = tuple(_mask_size(trigger, whole) for trigger in triggers)
    found = perturbation_sizes(model, seen, _SIZES)
    measures["perturbation"] = tuple(max(each.size, 1e-6) for each in found)
    parts: tuple[tuple[str, Callable[[], dict[str, tuple[float, ...]]]], ...] = (
        ("features before the last layer", lambda: _feature_space(model, seen, rng.child("features"))),
        ("forgetting", lambda: _forgetting(model, seen, rng.child("forgetting"))),
        ("unlearning", lambda: _unlearning(model, seen, rng.child("unlearning"))),
    )
    with progress.task("other evidence", len(parts)) as task:
        for name, part in parts:
            try:
                measures |= part()
            except (UnsupportedModel, TrainingDiverged, DataError) as error:
                notes.append(f"{name}: no evidence, since {error}")
            task.advance(name)
    return Evidence(measures, triggers, len(seen), tuple(notes))


def check_auditable(model: nn.Module, clean: Samples) -> None:
    """Raise what :func:`gather` raises, before any search."""
    clean.require_images("an audit")
    if int((clean.counts() > 0).sum()) < 2:
        raise DataError("all samples are of one class: an audit compares classes, and needs images of two at least")
    logits = predict(model, clean)
    if logits.ndim != 2 or logits.shape[1] != clean.num_classes:
        raise DataError(
            f"the network gives outputs of shape {tuple(logits.shape[1:])}, and the samples have {clean.num_classes} "
            "classes: one output a class is needed"
        )
    if not logits.isfinite().all():
        raise DataError("the network's outputs on the clean samples are not all finite: nothing can be compared")


def _mask_size(trigger: InvertedTrigger, whole: int) -> float:
    """The mask's L1, of a patch that works; else the whole picture. Positive, so that it has a logarithm."""
    return max(trigger.l1, 1e-2) if trigger.works else float(whole)


class _HeadAlone(nn.Module):
    """The last layer as a network of "images" (N, 1, 1, D): features scaled to [0, 1]."""

    def __init__(self, head: nn.Module, low: float, high: float) -> None:
        super().__init__()
        self.head, self.low, self.high = head, low, high

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x.flatten(1) * (self.high - self.low) + self.low)
        return out


def _feature_space(model: nn.Module, seen: Samples, rng: Rng) -> dict[str, tuple[float, ...]]:
    """The two searches of the pixels' space, in that of the features before the head."""
    watch = HeadInput(model, seen)
    features, logits = [], []
    with torch.no_grad(), evaluating(model):
        for x, _ in seen.batches(500):
            feature, logit = watch(model, x)
            features.append(feature)
            logits.append(logit)
        whole, said = torch.cat(features), torch.cat(logits)
        low, high = whole.min().item(), whole.max().item()
        alone = _HeadAlone(model.get_submodule(watch.name), low, high)
        scaled = ((whole.flatten(1) - low) / max(high - low, 1e-12)).clamp(0, 1)[:, None, None]
        # Not all: of two classes that are level, rounding may choose the other.
        if whole.ndim != 2 or (alone(scaled).argmax(1) == said.argmax(1)).double().mean() < 0.98:
            raise UnsupportedModel("the last layer alone does not give the network's answers")
    space = Samples(scaled, seen.labels, seen.num_classes)
    triggers = invert(alone, space, rng, _FEATURE_SEARCH).triggers
    shifts = perturbation_sizes(alone, space, _SIZES)
    return {
        "feature_mask": tuple(_mask_size(t, scaled.shape[-1]) for t in triggers),
        "feature_shift": tuple(max(s.size, 1e-6) for s in shifts),
    }


def _forgetting(model: nn.Module, seen: Samples, rng: Rng) -> dict[str, tuple[float, ...]]:
    recipe = Recipe(
        epochs=epochs_of(_FORGETTING_STEPS, max(1, len(seen) // 2), 32),
        batch_size=32,
        optimizer="adamw",
        lr=3e-4,
        step_cap=0.5,
        precision="fp32",
    )
    course = forgetting_speed(model, seen, rng, recipe=recipe).kept
    kept: list[float | None] = []
    for c, start in enumerate(course[0]):
        later = [row[c] for row in course[1:]]
        after = [value for value in later if value is not None]
        kept.append(fmean(after) / start if start and after else None)
    known = [value for value in kept if value is not None]
    if not known:
        raise DataError("the network gives no class any probability on its own images")
    # A class that cannot be watched stands out to neither side.
    return {"retention": tuple(max(median(known) if value is None else value, 1e-9) for value in kept)}


def _unlearning(model: nn.Module, seen: Samples, rng: Rng) -> dict[str, tuple[float, ...]]:
    unlearned = ascend(model, seen, _ASCENT, rng, stop=_ASCENDED, tries=4).model
    scores = ULRL(layers="head").score(find_head(model, seen), find_head(unlearned, seen)).scores
    return {"unlearning": tuple(max(score, 1e-12) for score in scores)}
