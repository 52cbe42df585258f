"""What a model does on labelled samples: one forward pass over them, and one over their triggered copies."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor.errors import ConfigError, DataError
from unbackdoor.evaluation import metrics
from unbackdoor.evaluation.metrics import Interval, wilson_interval
from unbackdoor.inference import predict
from unbackdoor.types import Attack, Samples, TextAttack, Triggered

#: The share of labelled samples that is set aside to measure on, where there is no test set.
HELD_OUT = 0.2


@dataclass(frozen=True, slots=True)
class Rate:
    """A share in [0, 1] of ``count`` samples, with Wilson's 95 % interval."""

    value: float
    count: int
    interval: Interval

    @classmethod
    def of(cls, value: float, count: int) -> Rate:
        return cls(value, count, wilson_interval(round(value * count), count))


@dataclass(frozen=True, slots=True)
class Assessment:
    """How a model does on labelled samples, in float32.

    Attributes:
        accuracy: on the samples as they are. Samples with non-finite outputs count as wrong.
        loss: mean cross-entropy in nats; None where it is not finite.
        per_class: accuracy of each class in [0, 1]; None for a class without a sample.
        confusion: the cells that are not zero, as (true class, predicted class, count), sorted.
        non_finite: samples whose outputs are not all finite.
        asr: attack success rate, over the samples whose label is not already the attacker's; None without an attack.
        ra: robust accuracy, over the same; None without an attack.
    """

    accuracy: Rate
    loss: float | None
    per_class: tuple[float | None, ...]
    confusion: tuple[tuple[int, int, int], ...]
    non_finite: int = 0
    asr: Rate | None = None
    ra: Rate | None = None

    @property
    def count(self) -> int:
        return self.accuracy.count

    @property
    def num_classes(self) -> int:
        return len(self.per_class)

    def predicted_classes(self) -> frozenset[int]:
        """The classes that the model answered at least once."""
        return frozenset(predicted for _, predicted, _ in self.confusion)

    def majority_share(self) -> float:
        """The share of the most frequent true class: what always answering one class can get."""
        totals = [0] * self.num_classes
        for true, _, count in self.confusion:
            totals[true] += count
        return max(totals) / self.count


def assess(
    model: nn.Module,
    samples: Samples,
    *,
    attack: Attack | None = None,
    triggered: Triggered | None = None,
    batch_size: int = 500,
) -> Assessment:
    """Measure ``model`` on ``samples`` and, with a known attack, on their triggered copies (each stamped once).

    Args:
        model: maps images (N, C, H, W) in [0, 1], or what else :meth:`~unbackdoor.types.Samples.images` gives, to
            logits (N, num_classes). Left as it is, its mode included.
        triggered: in place of ``attack``, triggered samples that are ready, such as :func:`stamped_by` makes.

    Raises:
        DataError: the number of outputs is not the number of classes, or the attack has no sample to work on.
        ConfigError: the attack wants a class that does not exist.
    """
    logits = predict(model, samples, batch_size=batch_size)
    if logits.ndim != 2 or logits.shape[1] != samples.num_classes:
        raise DataError(
            f"the network's outputs are {tuple(logits.shape)}; {len(samples)} samples of "
            f"{samples.num_classes} classes need ({len(samples)}, {samples.num_classes})"
        )
    labels = samples.labels.to(logits.device)
    answers = predicted(logits)
    loss = F.cross_entropy(logits, labels).item()
    cells = metrics.confusion_matrix(answers, labels, samples.num_classes)
    by_class = metrics.per_class_accuracy(answers, labels, samples.num_classes).tolist()
    asr, ra = None, None
    if triggered is not None:
        asr, ra = _rates(predict(model, triggered.samples, batch_size=batch_size), triggered.samples, triggered.wanted)
    elif attack is not None:
        asr, ra = _under_attack(model, samples, attack, batch_size)
    return Assessment(
        accuracy=Rate.of(metrics.accuracy(answers, labels), len(samples)),
        loss=loss if math.isfinite(loss) else None,
        per_class=tuple(None if math.isnan(a) else a for a in by_class),
        confusion=tuple((int(t), int(p), int(cells[t, p])) for t, p in cells.nonzero().tolist()),
        non_finite=int((answers < 0).sum()),
        asr=asr,
        ra=ra,
    )


def predicted(logits: Tensor) -> Tensor:
    """(N,) int64: the class of the largest logit, or −1 where a row is not finite (argmax would pick its first NaN)."""
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)


def wanted_by(attack: Attack, samples: Samples) -> Tensor:
    """The attacker's labels (N,) for triggered copies of ``samples``.

    Raises:
        ConfigError: one of them is no class of the samples.
    """
    wanted = attack.relabel(samples.labels, samples.num_classes)
    low, high = int(wanted.min()), int(wanted.max())
    if low < 0 or high >= samples.num_classes:
        wrong = low if low < 0 else high
        raise ConfigError(
            f"the attack's target {wrong} is no class: {samples.num_classes} classes allow 0..{samples.num_classes - 1}"
        )
    return wanted


def stamp(attack: Attack, images: Tensor) -> Tensor:
    """Triggered images, kept to the [0, 1] that a picture can hold; or triggered feature vectors."""
    stamped = attack.trigger(images)
    return stamped.clamp(0, 1) if stamped.ndim == 4 else stamped


def predict_triggered(model: nn.Module, samples: Samples, attack: Attack, *, batch_size: int = 500) -> Tensor:
    """Logits (N, classes), float32, of the triggered copies of ``samples``.

    Raises:
        DataError: the attack cannot trigger samples of this kind.
    """
    if isinstance(attack, TextAttack):
        return predict(model, attack.rewrite(samples), batch_size=batch_size)
    if samples.kind == "text":
        samples.require_images(f"the trigger of {type(attack).__name__}")
    return predict(model, samples, transform=lambda x: stamp(attack, x), batch_size=batch_size)


def stamped_by(attack: Attack, samples: Samples, batch_size: int = 500) -> Triggered:
    """All that :func:`assess` measures an attack on, stamped or rewritten once and kept, on the samples' device.

    Raises:
        DataError: every sample already has the attacker's label, or the attack cannot trigger samples of this kind.
        ConfigError: the attack wants a class that does not exist.
    """
    foreign, wanted = _foreign(samples, attack)
    if isinstance(attack, TextAttack):
        return Triggered(attack.rewrite(foreign), wanted)
    if samples.kind == "text":
        samples.require_images(f"the trigger of {type(attack).__name__}")
    images = torch.cat([stamp(attack, x) for x, _ in foreign.batches(batch_size)])
    return Triggered(replace(foreign, inputs=images), wanted)


def _foreign(samples: Samples, attack: Attack) -> tuple[Samples, Tensor]:
    """(the samples whose label is not the attacker's already, the attacker's labels for them)."""
    wanted = wanted_by(attack, samples)
    foreign = metrics.foreign_to(samples.labels, wanted)
    return samples.select(foreign), wanted[foreign]


def _under_attack(model: nn.Module, samples: Samples, attack: Attack, batch_size: int) -> tuple[Rate, Rate]:
    victims, wanted = _foreign(samples, attack)
    return _rates(predict_triggered(model, victims, attack, batch_size=batch_size), victims, wanted)


def _rates(logits: Tensor, victims: Samples, wanted: Tensor) -> tuple[Rate, Rate]:
    """(ASR, RA) of the outputs for triggered copies of ``victims``."""
    answers, labels, wanted = predicted(logits), victims.labels.to(logits.device), wanted.to(logits.device)
    count = int(metrics.foreign_to(labels, wanted).sum())
    asr = metrics.attack_success_rate(answers, labels, wanted)
    ra = metrics.robust_accuracy(answers, labels, wanted)
    return Rate.of(asr, count), Rate.of(ra, count)
