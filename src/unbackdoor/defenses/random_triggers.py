"""Random triggers: every sample gets one of its own, of a random kind, so that no single one can be learned.

They look like the triggers that attacks use, and stand for all that nobody has thought of. Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from unbackdoor.types import PADDING, trimmed

ImageKind = Literal["patch", "blend", "wave", "warp", "tint"]


class RandomImageTriggers:
    """Stamps each image of a batch with a trigger drawn for it.

    - "patch": a rectangle of 1/16 to 1/5 of the side, anywhere: noise, one colour, a black-and-white pattern or a piece
      of another image.
    - "blend": 5 to 30 % of a picture, smooth, rough or another image of the batch.
    - "wave": a sinusoid of any direction and up to a period of two pixels, up to 15 % of the range, as an amplitude of
      its own in each channel.
    - "warp": a smooth field that moves pixels by a quarter to 1.5 in the mean, or to 1/16 of the side if that is more.
    - "tint": another gain (0.7 to 1.3) and offset (up to 10 % of the range) in each channel.

    Args:
        kinds: which are drawn, each as often as the others.
        generator: on the CPU; the draws are the same on every device.
    """

    def __init__(self, kinds: tuple[ImageKind, ...], generator: torch.Generator) -> None:
        every: dict[ImageKind, Callable[[Tensor, Tensor], Tensor]] = {
            "patch": self._patch,
            "blend": self._blend,
            "wave": self._wave,
            "warp": self._warp,
            "tint": self._tint,
        }
        self.makers = [every[kind] for kind in kinds]
        self.generator = generator

    def __call__(self, x: Tensor) -> Tensor:
        """Float images (N, C, H, W) in [0, 1] in and out."""
        which = torch.randint(len(self.makers), (len(x),), generator=self.generator)
        out = x.clone()
        for index, maker in enumerate(self.makers):
            mine = (which == index).nonzero()[:, 0].to(x.device)
            if len(mine):
                out[mine] = maker(x[mine], x)
        return out

    def _patch(self, x: Tensor, batch: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        inside = self._interval(n, height)[:, :, None] & self._interval(n, width)[:, None, :]
        contents = torch.stack(
            [
                self._uniform(n, channels, height, width),
                self._uniform(n, channels, 1, 1).expand(-1, -1, height, width),
                (self._uniform(n, 1, height, width) > 0.5).float().expand(-1, channels, -1, -1),
            ]
        ).to(x)
        # Half of the noise and of the colours are as loud as can be: attackers like those.
        loud = self._uniform(n, 1, 1, 1).to(x) < 0.5
        contents = torch.cat([torch.where(loud, contents.round(), contents), self._others(batch, n)[None]])
        chosen = torch.randint(len(contents), (n,), generator=self.generator).to(x.device)
        return torch.where(inside[:, None].to(x.device), contents[chosen, torch.arange(n, device=x.device)], x)

    def _interval(self, n: int, size: int) -> Tensor:
        """(n, size) bool: a random interval of 1/16 to 1/5 of the pixels in each row."""
        least, most = max(1, size // 16), max(2, size // 5)
        length = torch.randint(least, most + 1, (n, 1), generator=self.generator)
        start = (self._uniform(n, 1) * (size - length + 1)).long()
        place = torch.arange(size)
        return (place >= start) & (place < start + length)

    def _blend(self, x: Tensor, batch: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        # One roughness for all: it changes from batch to batch.
        cells = min(2 ** (2 + int(torch.randint(4, (1,), generator=self.generator))), height, width)
        rough = F.interpolate(self._uniform(n, channels, cells, cells), size=(height, width), mode="bilinear").to(x)
        low, high = rough.amin((1, 2, 3), keepdim=True), rough.amax((1, 2, 3), keepdim=True)
        picture = (rough - low) / (high - low).clamp(min=1e-6)
        another = self._uniform(n, 1, 1, 1).to(x) < 0.3
        picture = torch.where(another, self._others(batch, n), picture)
        return torch.lerp(x, picture, (0.05 + 0.25 * self._uniform(n, 1, 1, 1)).to(x))

    def _wave(self, x: Tensor, _batch: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        rows = torch.arange(height).view(1, -1, 1) * (self._uniform(n, 1, 1) - 0.5)
        columns = torch.arange(width).view(1, 1, -1) * (self._uniform(n, 1, 1) - 0.5)
        # As many slow waves as quick ones: the frequency's size is drawn on a logarithmic scale.
        quick = 8 ** -self._uniform(n, 1, 1)
        phase = quick * (rows + columns) * 2 + self._uniform(n, 1, 1)
        amplitude = 0.15 * (2 * self._uniform(n, channels, 1, 1) - 1)
        return (x + (amplitude * torch.sin(2 * math.pi * phase)[:, None]).to(x)).clamp(0, 1)

    def _warp(self, x: Tensor, _batch: Tensor) -> Tensor:
        n, _, height, width = x.shape
        points = 3 + int(torch.randint(4, (1,), generator=self.generator))
        noise = 2 * self._uniform(n, 2, points, points) - 1
        field = F.interpolate(noise, size=(height, width), mode="bicubic", align_corners=True)
        side = min(height, width)
        pixels = 0.25 + (max(1.5, side / 16) - 0.25) * self._uniform(n, 1, 1, 1)
        size = 2 * pixels / side  # coordinates run from -1 to 1
        field = field / field.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-6) * size
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        grid = (torch.stack([columns, rows], -1) + field.permute(0, 2, 3, 1)).clamp(-1, 1).to(x)
        return F.grid_sample(x, grid, align_corners=True, padding_mode="border")

    def _tint(self, x: Tensor, _batch: Tensor) -> Tensor:
        gain = 0.7 + 0.6 * self._uniform(len(x), x.shape[1], 1, 1)
        offset = 0.2 * self._uniform(len(x), x.shape[1], 1, 1) - 0.1
        return (x * gain.to(x) + offset.to(x)).clamp(0, 1)

    def _others(self, batch: Tensor, n: int) -> Tensor:
        return batch[torch.randint(len(batch), (n,), generator=self.generator).to(batch.device)]

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)


class RandomWords:
    """Puts one to three random tokens into each text, side by side, anywhere behind its first token.

    Args:
        vocabulary: tokens are drawn from 0..vocabulary-1.
        generator: on the CPU.
    """

    MOST = 3

    def __init__(self, vocabulary: int, generator: torch.Generator) -> None:
        self.vocabulary, self.generator = vocabulary, generator

    def __call__(self, ids: Tensor) -> Tensor:
        """Token ids (N, L), padding at the end, in; (N, l) out, l at most L + 3. Each text gets longer."""
        n, longest = ids.shape
        lengths = (ids != PADDING).sum(1)
        count = torch.randint(1, self.MOST + 1, (n,), generator=self.generator).to(ids.device)
        start = 1 + (torch.rand(n, generator=self.generator).to(ids.device) * (lengths - 1).clamp(min=1)).long()
        words = torch.randint(self.vocabulary, (n, longest + self.MOST), generator=self.generator).to(ids.device)
        place = torch.arange(longest + self.MOST, device=ids.device).expand(n, -1)
        start, count = start[:, None], count[:, None]
        source = torch.where(place < start, place, place - count).clamp(0, longest - 1)
        kept = torch.where(place < lengths[:, None] + count, ids.gather(1, source), PADDING)
        return trimmed(torch.where((place >= start) & (place < start + count), words, kept))


class RandomFeatures:
    """Overwrites a random tenth of each feature vector, at least one entry, with values from anywhere in their range.

    Args:
        low, high: (D,) of each feature.
        generator: on the CPU.
    """

    SHARE = 0.1

    def __init__(self, low: Tensor, high: Tensor, generator: torch.Generator) -> None:
        self.low, self.high, self.generator = low, high, generator

    def __call__(self, x: Tensor) -> Tensor:
        """Float (N, D) in and out."""
        order = torch.rand(x.shape, generator=self.generator).argsort(1).to(x.device)
        drawn = torch.rand(x.shape, generator=self.generator).to(x)
        return torch.where(order < max(1, round(self.SHARE * x.shape[1])), torch.lerp(self.low, self.high, drawn), x)
