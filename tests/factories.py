"""Small made-up samples and networks, and ways to compare networks: what more than one test file needs."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from unbackdoor.rng import Rng, isolated
from unbackdoor.types import Samples


def samples(
    count: int = 40,
    classes: int = 4,
    *,
    size: int = 8,
    channels: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.uint8,
) -> Samples:
    """Noise with a class-dependent bright square, every class present if ``count >= classes``."""
    generator = Rng(seed).stream("samples")
    labels = torch.arange(count) % classes
    images = torch.randint(0, 128, (count, channels, size, size), generator=generator, dtype=torch.uint8)
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = divmod(label, size // 2)
        image[:, 2 * (row % (size // 2)) : 2 * (row % (size // 2)) + 2, 2 * column : 2 * column + 2] = 255
    inputs = images if dtype == torch.uint8 else (images.float() / 255).to(dtype)
    return Samples(inputs, labels, classes)


def linear(classes: int = 4, *, size: int = 8, channels: int = 3, seed: int = 0) -> nn.Module:
    """The smallest network there is."""
    with isolated(Rng(seed).child("linear")):
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, classes))


def convolutional(
    classes: int = 4, *, channels: int = 3, norm: bool = True, dropout: float = 0.0, seed: int = 0
) -> nn.Module:
    """Two convolutions, with BatchNorm and dropout if asked for, and a linear head; any image size from 4 pixels."""
    with isolated(Rng(seed).child("convolutional")):
        return nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1, bias=not norm),
            nn.BatchNorm2d(6) if norm else nn.Identity(),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, padding=1, bias=not norm),
            nn.BatchNorm2d(8) if norm else nn.Identity(),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(32, classes),
        )


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit, keys and types too."""
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


@dataclass
class Snapshot:
    """All that a caller could notice about a network: weights, modes, and which parameters ask for gradients."""

    model: nn.Module
    state: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.state = weights(self.model)
        self.modes = [m.training for m in self.model.modules()]
        self.asked = {name: p.requires_grad for name, p in self.model.named_parameters()}
        self.gradients = {name: copy.deepcopy(p.grad) for name, p in self.model.named_parameters()}

    def differences(self) -> list[str]:
        """What has changed since."""
        changed = []
        if not same(self.state, weights(self.model)):
            changed.append("weights")
        if self.modes != [m.training for m in self.model.modules()]:
            changed.append("modes")
        if self.asked != {name: p.requires_grad for name, p in self.model.named_parameters()}:
            changed.append("requires_grad")
        for name, p in self.model.named_parameters():
            before = self.gradients[name]
            if (before is None) != (p.grad is None) or (before is not None and not torch.equal(before, p.grad)):
                changed.append(f"gradient of {name}")
        return changed
