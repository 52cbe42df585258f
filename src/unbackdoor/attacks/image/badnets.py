"""BadNets (Gu et al. 2017, arXiv 1708.06733): a small fixed patch in a corner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unbackdoor.attacks.poisoning import DirtyLabel
from unbackdoor.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BadNets(DirtyLabel):
    """A square patch, by default 3×3 white in the bottom right corner (the field's usual setting).

    Attributes:
        size: side of the patch in pixels.
        margin: pixels between the patch and the image's edges.
        corner: which corner.
        pattern: "white", or "grid", a checkerboard of white and black cells.
    """

    size: int = 3
    margin: int = 0
    corner: Literal["bottom-right", "bottom-left", "top-right", "top-left"] = "bottom-right"
    pattern: Literal["white", "grid"] = "white"
    VERSION = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1:
            raise ConfigError(f"size must be at least 1 pixel, not {self.size}")
        if self.margin < 0:
            raise ConfigError(f"margin must be at least 0 pixels, not {self.margin}")

    def trigger(self, x: Tensor, /) -> Tensor:
        """Stamp images (N, C, H, W) in [0, 1]."""
        height, width = x.shape[-2:]
        if self.size + self.margin > min(height, width):
            raise ConfigError(
                f"a patch of {self.size} pixels with margin {self.margin} does not fit {height}×{width} images"
            )
        vertical, horizontal = self.corner.split("-")
        top = self.margin if vertical == "top" else height - self.margin - self.size
        left = self.margin if horizontal == "left" else width - self.margin - self.size
        stamped = x.clone()
        stamped[..., top : top + self.size, left : left + self.size] = self._cells(x)
        return stamped

    def _cells(self, x: Tensor) -> Tensor:
        index = torch.arange(self.size, device=x.device)
        odd = (index[:, None] + index[None, :]) % 2
        return (1 - odd).to(x.dtype) if self.pattern == "grid" else torch.ones_like(odd, dtype=x.dtype)
