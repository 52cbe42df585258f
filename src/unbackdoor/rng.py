"""Named random streams: every random choice has an explicit generator, derived from one seed and a name.

Nothing in the package seeds a global generator for good. Code of others that only knows the global one (dropout,
``torch.nn.init``) runs inside :func:`isolated`, which puts the caller's state back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from unbackdoor.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Rng:
    """A seed and a path of names. Two different paths give independent streams; the same path gives the same one.

    >>> Rng(0).child("seam").stream("forget").initial_seed() == Rng(0).stream("seam", "forget").initial_seed()
    True
    """

    seed: int
    path: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ConfigError(f"seed must be an integer >= 0, not {self.seed!r}")

    def child(self, *names: str | int) -> Rng:
        """The same seed, further down the path."""
        return Rng(self.seed, self.path + tuple(str(n) for n in names))

    def integer(self, *names: str | int) -> int:
        """A 63-bit integer that depends on the seed and the path alone (SHA-256)."""
        parts = [str(self.seed), *self.path, *(str(n) for n in names)]
        # Lengths keep ("a", "bc") apart from ("ab", "c").
        text = "".join(f"{len(p)}:{p};" for p in parts)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def stream(self, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh generator for this path. Call it once per use: a second call starts the stream again."""
        return torch.Generator(device=device).manual_seed(self.integer(*names))


@contextmanager
def isolated(rng: Rng, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch's global generators (the CPU's and ``device``'s) from ``rng`` and restore the caller's state after."""
    device = torch.device(device)
    cuda = [device] if device.type == "cuda" else []
    seed = rng.integer("global")
    with torch.random.fork_rng(devices=cuda):
        # Not torch.manual_seed: that reseeds every accelerator of the process, and nobody would put those back.
        torch.default_generator.manual_seed(seed)
        for each in cuda:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        yield
