"""What the tests of the command line share: running it in this process, samples on disk, defenses that misbehave."""

from __future__ import annotations

import copy
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner, Result

from unbackdoor import specs
from unbackdoor.cli.app import app
from unbackdoor.rng import Rng
from unbackdoor.types import Removal, Samples, Trace

#: Four plain colours: a network learns them in a few steps.
COLOURS = ((220, 40, 40), (40, 220, 40), (40, 40, 220), (220, 220, 40))


def run(*arguments: object) -> Result:
    """The command line with these arguments. ``stdout`` and ``stderr`` are apart; a bug's exception comes through."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def colours(count: int, *, size: int = 32, seed: int = 0) -> Samples:
    """Noisy squares of four colours, (count, 3, size, size) uint8, the classes in turn."""
    generator = Rng(seed).stream("colours")
    labels = torch.arange(count) % len(COLOURS)
    base = torch.tensor(COLOURS)[labels][:, :, None, None]
    noise = torch.randint(-30, 31, (count, 3, size, size), generator=generator)
    return Samples((base + noise).clamp(0, 255).to(torch.uint8), labels, len(COLOURS))


def as_folder(samples: Samples, folder: Path) -> Path:
    """A folder of PNG images for each class."""
    for index, (image, label) in enumerate(zip(samples.inputs, samples.labels.tolist(), strict=True)):
        place = folder / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{index}.png")
    return folder


def as_npz(samples: Samples, path: Path) -> Path:
    """An .npz of images (N, H, W, C) and labels."""
    np.savez(path, x=samples.inputs.permute(0, 2, 3, 1).numpy(), y=samples.labels.numpy())
    return path


@dataclass(frozen=True, kw_only=True)
class Wreck:
    """Returns a network that answers one class to everything."""

    def __call__(self, model: nn.Module, clean: Samples, rng: Rng) -> Removal:
        model = copy.deepcopy(model)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        return Removal(model, Trace())


@dataclass(frozen=True, kw_only=True)
class Interrupted:
    """The user presses Ctrl-C while it works."""

    def __call__(self, model: nn.Module, clean: Samples, rng: Rng) -> Removal:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal should have come")


@dataclass(frozen=True, kw_only=True)
class Spy:
    """Notes what it was given and returns it as it is."""

    seen = []  # noqa: RUF012

    def __call__(self, model: nn.Module, clean: Samples, rng: Rng) -> Removal:
        self.seen.append((model, clean, rng))
        return Removal(copy.deepcopy(model), Trace())


@pytest.fixture
def misbehaving(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--method wreck``, ``interrupted`` and ``spy``."""
    extra = {name: f"cli_runs:{name.capitalize()}" for name in ("wreck", "interrupted", "spy")}
    monkeypatch.setitem(specs.REGISTRY, "defense", {**specs.REGISTRY["defense"], **extra})
    Spy.seen.clear()


def listed(folder: Path) -> list[str]:
    """Every path below ``folder``, sorted."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def control_characters(text: str) -> set[Any]:
    """What has no place in a pipe."""
    return {c for c in text if ord(c) < 32 and c != "\n"} | ({"\x7f"} & set(text))
