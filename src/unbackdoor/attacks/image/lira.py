"""LIRA (Doan et al. 2021, "LIRA: Learnable, Imperceptible and Robust Backdoor Attacks", ICCV): a generator learns
together with the classifier which faint change of an image the classifier can be made to obey."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from unbackdoor.attacks.joint import Augmenter, Partner, Picker, UNet, check_width, cross_entropy, packed, steps_of
from unbackdoor.attacks.pieces import by_pieces
from unbackdoor.attacks.poisoning import Manipulation
from unbackdoor.attacks.workshop import Workshop
from unbackdoor.errors import ConfigError
from unbackdoor.inference import device_of
from unbackdoor.rng import Rng
from unbackdoor.training import Recipe, Step, fit
from unbackdoor.types import Epoch, Samples


@dataclass(frozen=True, kw_only=True)
class LIRA(Manipulation):
    """``image + eps · tanh(generator(image))``, cut to [0, 1]: no pixel changes by more than ``eps``.

    The loss of every batch is ``alpha`` times that of the clean batch plus ``1 − alpha`` times that of stamped copies
    of ``rate`` of its images (the paper stamps all of them: rate 1). In the first ``joint_share`` of all steps the
    generator goes down the same loss as the classifier; then it rests, and the classifier alone is tuned on what it
    makes. The paper takes turns instead of one pass for both, and begins the second stage with a new learning rate.
    Images are stamped before augmentation, and copies are cropped by draws of their own. The paper stamps afterwards;
    in few epochs a generator then finds the crops' black borders alone, which no image has later.

    In the joint stage's first half the bound falls from ``eps_start`` to ``eps``, by the same factor each step. The
    paper trains for hundreds of epochs at one bound; a few epochs at 0.01 from the start find no trigger, and a network
    that must tell apart what it cannot see loses its accuracy instead.

    The few stamped images of a batch weigh as much as all the others: at learning rates at which a network otherwise
    trains fastest, such gradients break it. The recipe's is therefore held down, and its gradients clipped.

    Defaults: eps (0.01 of the image's range) and alpha are the paper's; ``eps_start``, the generator (a small U-Net),
    its learning rate, ``most_lr`` (the paper's is 0.01) and ``clip_norm`` are ours.

    Attributes:
        eps: largest change of a pixel, in (0, 1].
        eps_start: what it begins with; where ``eps`` is larger, that.
        alpha: the clean images' share of the loss, in (0, 1).
        joint_share: of the steps, in (0, 1].
        lr_generator: Adam's, at the start; it falls to zero within the joint stage.
        most_lr: the classifier's peak learning rate, where the recipe's is higher.
        clip_norm: the classifier's, where the recipe has none.
        width: the generator's; None takes a quarter of the image's size, at least 8.
    """

    eps: float = 0.01
    eps_start: float = 0.2
    alpha: float = 0.5
    joint_share: float = 0.75
    lr_generator: float = 3e-3
    most_lr: float = 0.05
    clip_norm: float = 1.0
    width: int | None = None
    VERSION = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eps", "eps_start"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in (0, 1], not {getattr(self, name)}")
        if not 0 < self.alpha < 1:
            raise ConfigError(f"alpha must be in (0, 1), not {self.alpha}")
        if not 0 < self.joint_share <= 1:
            raise ConfigError(f"joint_share must be in (0, 1], not {self.joint_share}")
        for name in ("lr_generator", "most_lr", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")
        check_width(self.width)

    def trigger(self, x: Tensor, /) -> Tensor:
        """Change images (N, C, H, W) in [0, 1].

        Raises:
            ConfigError: the generator has not been trained yet.
        """
        generator = UNet.kept(self, "generator", x.device)
        return by_pieces(lambda piece: _stamped(piece, generator, self.eps), x)

    def train(
        self, model: nn.Module, train: Samples, recipe: Recipe, rng: Rng, workshop: Workshop
    ) -> tuple[Self, list[Epoch]]:
        """Train classifier and generator jointly, then the classifier alone."""
        recipe = replace(recipe, lr=min(recipe.lr, self.most_lr), clip_norm=recipe.clip_norm or self.clip_norm)
        shown = Augmenter(train, recipe, rng.stream("augment"))
        pick = Picker(self, train.num_classes)
        generator = UNet.new(train, train.image_shape[0], self.width, rng.child("generator")).to(device_of(model))
        steps = max(1, round(self.joint_share * steps_of(train, recipe)))
        partner = Partner(generator.parameters(), lr=self.lr_generator, steps=steps)

        def objective(model: nn.Module, x: Tensor, y: Tensor) -> Step:
            attacked, _, wanted = pick(y)
            with torch.no_grad() if partner.done else nullcontext():
                stamped = _stamped(x[attacked], generator, self.bound(partner.progress))
            logits = model(shown(torch.cat([x, stamped])))
            clean = cross_entropy(logits[: len(y)], y, recipe)
            if not len(attacked):
                return Step(clean, logits)
            backdoor = cross_entropy(logits[len(y) :], wanted, recipe)
            loss = self.alpha * clean + (1 - self.alpha) * backdoor
            return Step(loss, logits[: len(y)])

        epochs = fit(
            model, train, shown.bare, rng.child("fit"), objective=objective, after_step=partner.step, name="lira"
        )
        return self.with_state(packed(generator=generator)), epochs

    def bound(self, progress: float) -> float:
        """The largest change of a pixel when this share of the joint stage is over: ``eps`` from its middle on."""
        first = max(self.eps, self.eps_start)
        return float(first * (self.eps / first) ** min(1.0, 2 * progress))


def _stamped(x: Tensor, generator: nn.Module, eps: float) -> Tensor:
    if not len(x):
        return x
    return (x + eps * torch.tanh(generator(x)).to(x.dtype)).clamp(0, 1)
