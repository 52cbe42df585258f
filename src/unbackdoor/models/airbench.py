"""A network that is meant to learn small colour images in few epochs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from unbackdoor.errors import ConfigError

#: Smaller images have nothing left after three halvings.
SMALLEST = 16

#: √(σ² + 0.0005) of what the first layer's patterns see in 5,000 of CIFAR-10's training images in [0, 1]: brightness
#: and two differences of colour (rows) × even, changing along one axis, along both (columns). As in the authors' code
#: the small number keeps patterns down that hold little but noise.
_SPREAD = ((0.80, 0.15, 0.063), (0.23, 0.038, 0.025), (0.11, 0.028, 0.023))


class Group(nn.Module):
    """Two convolutions at half the size: conv, pool, BN, GELU, conv, BN, GELU. Both begin as the identity, as far as
    their channels go."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.activation = nn.GELU()
        for conv in (self.conv1, self.conv2):
            nn.init.dirac_(conv.weight[: conv.in_channels])

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.norm1(self.pool(self.conv1(x))))
        out: Tensor = self.activation(self.norm2(self.conv2(x)))
        return out


class Airbench(nn.Module):
    """2×2 patterns, three :class:`Group`, the largest of each channel, a linear layer.

    Source: Jordan, arXiv 2404.00498, whose authors' code whitens the first layer by the training set, keeps it fixed,
    trains biases faster and averages weights. Ours starts from a fixed basis that nearly whitens natural images
    (cosines over the channels × cosines over 2×2 pixels, and their negatives), trains everything at one rate, and has
    BatchNorm with scales, so that nothing needs to know the data beforehand.
    """

    def __init__(self, num_classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        patterns = 4 * in_channels
        self.whiten = nn.Conv2d(in_channels, 2 * patterns, 2)
        self.activation = nn.GELU()
        self.groups = nn.Sequential(Group(2 * patterns, width), Group(width, 4 * width), Group(4 * width, 4 * width))
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.linear = nn.Linear(4 * width, num_classes)
        with torch.no_grad():
            basis = whitening(in_channels).to(self.whiten.weight)
            self.whiten.weight.copy_(torch.cat([basis, -basis]))
            # Images lie around a half and not around zero.
            assert self.whiten.bias is not None
            self.whiten.bias.copy_(-0.5 * self.whiten.weight.flatten(1).sum(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.groups(self.activation(self.whiten(x))))
        # The maximum over places is large: a ninth keeps the first logits near zero.
        out: Tensor = self.linear(x.flatten(1)) / 9
        return out


def whitening(channels: int) -> Tensor:
    """(4 · channels, channels, 2, 2): patterns whose responses to natural images are about 1 in spread, unrelated."""
    colours, pixels = cosines(channels), cosines(2)
    rows = []
    for c in range(channels):
        for i in range(2):
            for j in range(2):
                pattern = colours[c][:, None, None] * pixels[i][:, None] * pixels[j]
                rows.append(pattern / _SPREAD[min(c, 2)][i + j])
    return torch.stack(rows)


def cosines(size: int) -> Tensor:
    """The orthonormal cosine transform (type II), a row a frequency, float32."""
    places = torch.arange(size, dtype=torch.float64)
    angles = math.pi / size * (places + 0.5) * places[:, None]
    return (torch.cos(angles) * torch.where(places == 0, 1.0, math.sqrt(2))[:, None] / math.sqrt(size)).float()


def airbench(num_classes: int = 10, in_channels: int = 3, image_size: int = 32, width: int = 64) -> nn.Module:
    """The network of airbench94, nearly: 2.0 M parameters, meant for ten epochs of its recipe.

    Raises:
        ConfigError: images smaller than 16 pixels.
    """
    if image_size < SMALLEST:
        raise ConfigError(f"airbench takes images of {SMALLEST} pixels and more, not of {image_size}")
    return Airbench(num_classes, in_channels, width)
