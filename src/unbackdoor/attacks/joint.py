"""What the attackers share who train the network themselves: which images of a batch are attacked, and a generator
that learns beside the classifier and is kept in the attack's state.

All but LIRA stamp the batch that the objective sees, after augmentation: the attacker holds the loop, so nothing that
the loop does to an image needs to move or cut his trigger, and the network learns it where it will stand at test time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor.attacks.poisoning import Contamination, Manipulation
from unbackdoor.augmentation import augment
from unbackdoor.errors import ConfigError
from unbackdoor.rng import Rng, isolated
from unbackdoor.training import Recipe, batch_starts
from unbackdoor.types import Samples


class Picked(NamedTuple):
    """Indices into a batch, int64 on its device: (n,) to attack, (m,) bystanders; and what the attacked shall be."""

    attacked: Tensor
    bystanders: Tensor
    wanted: Tensor


class Picker:
    """Chooses the attacked images of each batch, so that over the batches their share is the attack's rate exactly.

    A rate below one image a batch attacks one image every few batches. As for poison in a training set, an all-to-one
    attack takes images of other classes than the target's; only where a batch has too few of them, the target's too.
    The batches come shuffled, so the first images will do, and a choice costs no random draw and no host sync.

    Args:
        attack: gives rate, target and labels.
        bystanders: images that are changed too but keep their labels (a noise mode, a cross-trigger), for each
            attacked one.

    Raises:
        ConfigError: the target is no class, or attacked images and bystanders are more than there are.
    """

    def __init__(self, attack: Manipulation, num_classes: int, *, bystanders: float = 0.0) -> None:
        attack.check_target(num_classes)
        if attack.rate * (1 + bystanders) > 1:
            raise ConfigError(
                f"rate {attack.rate} with {bystanders} bystanders for each attacked image is more than a whole batch; "
                f"a rate up to {1 / (1 + bystanders):.3g} is possible"
            )
        self._attack, self._num_classes, self._bystanders = attack, num_classes, bystanders
        self._seen = 0

    def __call__(self, y: Tensor) -> Picked:
        """The choice for a batch of labels (N,)."""
        before, self._seen = self._seen, self._seen + len(y)
        each = self._attack.rate
        n = round(each * self._seen) - round(each * before)
        each *= self._bystanders
        m = min(round(each * self._seen) - round(each * before), len(y) - n)
        if self._attack.labels == "all-to-one":
            order = (y == self._attack.target).to(torch.uint8).argsort(stable=True)
        else:
            order = torch.arange(len(y), device=y.device)
        rest = order[n:].sort().values
        attacked = order[:n]
        return Picked(attacked, rest[len(rest) - m :], self._attack.relabel(y[attacked], self._num_classes))


def cross_entropy(logits: Tensor, y: Tensor, recipe: Recipe) -> Tensor:
    """The mean cross-entropy in float32, with the recipe's label smoothing."""
    return F.cross_entropy(logits.float(), y, label_smoothing=recipe.label_smoothing)


def replaced(values: Tensor, *parts: tuple[Tensor, Tensor]) -> Tensor:
    """A copy of (N, ...) in which ``values[indices] = new`` for each (indices, new); gradients reach the new ones."""
    made = values.clone()
    for indices, new in parts:
        made[indices] = new
    return made


def steps_of(train: Samples, recipe: Recipe) -> int:
    """How many optimiser steps :func:`unbackdoor.training.fit` takes."""
    return recipe.epochs * (len(batch_starts(len(train), recipe.batch_size)) - 1)


class Augmenter:
    """Augments what the objective made, as far into the training as the recipe would; give ``fit`` :attr:`bare`.

    For a trigger that must be found on whole images: a crop's black border is the same in all of them, where the
    faintest change is told apart that no image without a border would show.

    Args:
        train: the training set.
        recipe: whose augmentation this takes over.
        generator: on the CPU.
    """

    def __init__(self, train: Samples, recipe: Recipe, generator: torch.Generator) -> None:
        self.bare = replace(recipe, augment="none")
        self._how, self._generator = recipe.augment, generator
        self._left = steps_of(train, recipe) // recipe.epochs * (recipe.epochs - recipe.plain_epochs)

    def __call__(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1], each by a draw of its own; gradients pass. To be called once a step."""
        self._left -= 1
        return augment(x, self._how if self._left >= 0 else "none", self._generator)


class Partner:
    """What the attacker trains beside the classifier, with Adam of its own.

    Its learning rate falls to zero along a cosine, so that the trigger comes to rest before the classifier does.

    Args:
        parameters: what to train.
        lr: at the start.
        steps: after so many it has learned all it will; :meth:`step` then does nothing more.
    """

    def __init__(self, parameters: Iterable[Tensor], *, lr: float, steps: int) -> None:
        self._parameters, self._lr, self._steps, self._taken = list(parameters), lr, steps, 0
        self._optimizer = torch.optim.Adam(self._parameters, lr=lr, fused=True)

    @property
    def done(self) -> bool:
        """Whether it has taken all its steps."""
        return self._taken >= self._steps

    @property
    def progress(self) -> float:
        """The share of its steps that it has taken, in [0, 1]."""
        return self._taken / self._steps

    def step(self, model: nn.Module | None = None) -> None:
        """Go down the gradients that are there, and drop them.

        This is an ``after_step`` hook (hence the argument, which is not used): where the objective's loss depends on
        the partner, the classifier's backward pass leaves the gradients.
        """
        if not self.done:
            for group in self._optimizer.param_groups:
                group["lr"] = self._lr * (1 + math.cos(math.pi * self._taken / self._steps)) / 2
            self._optimizer.step()
            self._taken += 1
        self._optimizer.zero_grad(set_to_none=True)


class UNet(nn.Module):
    """Images (N, C, H, W) in [0, 1] to maps (N, outputs, H, W) of any value: two halvings and back, with skips.

    GroupNorm treats each image by itself, so that a trigger does not depend on the batch. Everything runs in float32,
    under autocast too: the trigger is then the same in training and at test time.

    Args:
        channels: C.
        outputs: channels of the result.
        width: channels at full resolution, a multiple of 4; 2 and 4 times as many below.
    """

    def __init__(self, channels: int, outputs: int, width: int) -> None:
        super().__init__()
        self.enter = _block(channels, width, 1)
        self.down1 = _block(width, 2 * width, 2)
        self.down2 = _block(2 * width, 4 * width, 2)
        self.narrow1 = nn.Conv2d(4 * width, 2 * width, 1)
        self.up1 = _block(2 * width, 2 * width, 1)
        self.narrow2 = nn.Conv2d(2 * width, width, 1)
        self.up2 = _block(width, width, 1)
        self.leave = nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            fine = self.enter(2 * x.float() - 1)
            middle = self.down1(fine)
            coarse = self.down2(middle)
            # Skips are added after a 1×1 convolution at the lower resolution: a third of the work of joining channels.
            middle = self.up1(middle + _enlarged(self.narrow1(coarse), middle))
            fine = self.up2(fine + _enlarged(self.narrow2(middle), fine))
            out: Tensor = self.leave(fine)
            return out

    @classmethod
    def new(cls, train: Samples, outputs: int, width: int | None, rng: Rng) -> Self:
        """One with fresh weights for the images of ``train``, on their device.

        Args:
            width: None derives it from the image's size.
        """
        channels, *size = train.image_shape
        with isolated(rng.child("init"), train.device):
            return cls(channels, outputs, usual_width(max(size)) if width is None else width).to(train.device)

    @classmethod
    def kept(cls, attack: Contamination, name: str, device: torch.device) -> Self:
        """The one that the attack's state keeps under ``name``, frozen.

        Raises:
            ConfigError: nothing has been learned yet.
        """
        names = [key for key in attack.state if key.startswith(f"{name}.")]
        state = {key: attack.learned(key, device) for key in names or [f"{name}.leave.weight"]}
        state = {key.removeprefix(f"{name}."): value for key, value in state.items()}
        width, channels = state["enter.0.weight"].shape[:2]
        with torch.device("meta"):  # no time and no random draws for weights that are replaced at once
            network = cls(channels, len(state["leave.weight"]), width)
        network.load_state_dict(state, assign=True)
        return network.requires_grad_(False).eval()


def usual_width(size: int) -> int:
    """A :class:`UNet`'s width for images of this many pixels: a quarter of them, between 8 and 32, in fours."""
    return min(32, max(8, size // 16 * 4))


def check_width(width: int | None) -> None:
    """Raise a ConfigError where a :class:`UNet` cannot have this width."""
    if width is not None and (width < 4 or width % 4):
        raise ConfigError(f"width must be None or a multiple of 4, not {width}")


def packed(**networks: nn.Module) -> Mapping[str, Tensor]:
    """The networks' weights as one state, each under its keyword, copied to the CPU; :meth:`UNet.kept` reads it."""
    return {
        f"{name}.{key}": value.detach().cpu().clone()
        for name, network in networks.items()
        for key, value in network.state_dict().items()
    }


def _block(inside: int, outside: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.GroupNorm(4, outside), nn.ReLU(inplace=True)
    )


def _enlarged(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="nearest")
