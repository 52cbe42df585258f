"""What data-contaminating attacks share: which samples are poisoned, how they are relabelled, and planting."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from unbackdoor.errors import ConfigError
from unbackdoor.inference import predict
from unbackdoor.rng import Rng
from unbackdoor.training import Recipe, fit
from unbackdoor.types import Attack, Samples, Victim, as_float


@dataclass(frozen=True, kw_only=True)
class DirtyLabel:
    """The settings that every dirty-label attack shares.

    Attributes:
        rate: poisoned share of the whole training set, in (0, 1].
        target: the class that triggered inputs are sent to (all-to-one).
        labels: "all-to-one" (poison is drawn from the other classes) or "all-to-all" (y becomes y+1).
    """

    rate: float = 0.1
    target: int = 0
    labels: Literal["all-to-one", "all-to-all"] = "all-to-one"

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ConfigError(f"rate must be in (0, 1], not {self.rate}")
        if self.target < 0:
            raise ConfigError(f"target must be a class index >= 0, not {self.target}")

    def plan(self, labels: Tensor, num_classes: int, rng: Rng) -> Tensor:
        """Indices (int64, sorted) of the samples to poison: ``round(rate · N)``, at least one.

        Raises:
            ConfigError: the target is no class, or fewer samples can be poisoned than the rate asks for.
        """
        if self.target >= num_classes:
            raise ConfigError(f"target {self.target} is no class: {num_classes} classes allow 0..{num_classes - 1}")
        labels = labels.cpu()
        everyone = self.labels == "all-to-all"
        candidates = torch.arange(len(labels)) if everyone else (labels != self.target).nonzero()[:, 0]
        count = max(1, round(self.rate * len(labels)))
        if count > len(candidates):
            raise ConfigError(f"rate {self.rate} needs {count} samples to poison; only {len(candidates)} can be")
        order = torch.randperm(len(candidates), generator=rng.stream("plan"))
        return candidates[order[:count]].sort().values

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """The attacker's labels for triggered inputs of these true labels."""
        return (labels + 1) % num_classes if self.labels == "all-to-all" else torch.full_like(labels, self.target)


def poison(samples: Samples, attack: Attack, rng: Rng) -> Samples:
    """The training set as the attacker hands it over: uint8 stays uint8 (rounded), the rest is untouched."""
    chosen = attack.plan(samples.labels, samples.num_classes, rng).to(samples.device)
    inputs, labels = samples.inputs.clone(), samples.labels.clone()
    for part in torch.split(chosen, 4096):
        stamped = attack.trigger(as_float(inputs[part])).clamp(0, 1)
        if inputs.dtype == torch.uint8:
            stamped = stamped.mul(255).round()
        inputs[part] = stamped.to(inputs.dtype)
    labels[chosen] = attack.relabel(labels[chosen], samples.num_classes)
    return replace(samples, inputs=inputs, labels=labels)


def plant(attack: Attack, model: nn.Module, train: Samples, test: Samples, recipe: Recipe, rng: Rng) -> Victim:
    """Train ``model`` (in place) on a poisoned copy of ``train`` and measure clean accuracy and ASR on ``test``."""
    epochs = fit(model, poison(train, attack, rng), recipe, rng.child("fit"), name="plant")
    logits = predict(model, test)
    accuracy = (logits.argmax(1).cpu() == test.labels.cpu()).double().mean().item()
    wanted = attack.relabel(test.labels, test.num_classes)
    foreign = test.select(wanted != test.labels)
    asked = attack.relabel(foreign.labels, test.num_classes).cpu()
    asr = (predict(model, foreign, transform=attack.trigger).argmax(1).cpu() == asked).double().mean().item()
    seconds = sum(e.seconds for e in epochs)
    return Victim(
        model, attack, train.num_classes, rng.seed, accuracy, asr, {"seconds": seconds, "epochs": len(epochs)}
    )
