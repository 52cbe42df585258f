"""Inoculation: teach the network to take no notice of random triggers, with itself as the teacher."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from unbackdoor.augmentation import Augmentation
from unbackdoor.defenses.random_triggers import ImageKind, RandomFeatures, RandomImageTriggers, RandomWords
from unbackdoor.defenses.recovery import MixedLabels, blended, divergence, softened
from unbackdoor.defenses.seam import summed_lr
from unbackdoor.defenses.steadiness import epochs_for
from unbackdoor.errors import ConfigError, UnsupportedModel
from unbackdoor.inference import evaluating
from unbackdoor.rng import Rng
from unbackdoor.training import Recipe, Step, fit
from unbackdoor.types import Phase, Removal, Samples, Trace, as_float


@dataclass(frozen=True, kw_only=True)
class Inoculation:
    """Inoculation: fine-tune on clean samples with random triggers on them, of which the network is to take no notice.

    A backdoor lets a small, foreign change of the input decide. Each batch is seen once as it is and once with a random
    trigger on every sample (patches, blends, waves, warps and tints; random words; random features), and both times the
    network is to say what the given one said of the batch without. Whatever decides by such changes is unlearned, a
    trigger that was never seen with it; what the given network knows of clean samples is kept.

    Source: ours. Its parts are known: training under random corruptions with a consistency loss (Hendrycks et al.,
    "AugMix", ICLR 2020, arXiv 1912.02781), distillation from the given network (Hinton et al., arXiv 1503.02531), mixup
    (Zhang et al., ICLR 2018, arXiv 1710.09412).

    Deviations: None.

    Costs: ``images`` clean samples pass, each twice through the network and once through a copy of the given one.

    Fails: With a trigger unlike all that is drawn. An attacker who trains with random triggers that do nothing beside
    his own that does, as noise modes and cover samples do, has taught the network to tell them apart already. A word
    that changes the meaning, or a patch over what an image shows, is noise in what is taught.

    Attributes:
        images: clean samples that pass, in whole epochs, at most 300 of them.
        batch_size: a step, before their triggered copies.
        lr: peak learning rate of AdamW, one-cycle.
        shrink: how far decoupled weight decay shrinks, over all steps, a weight that no gradient holds: by
            exp(−shrink).
        step_cap: see :class:`unbackdoor.training.Recipe`.
        triggered: weight of the triggered copies' loss against that of the clean ones.
        distill: weight of the divergence from the given network's outputs at temperature 2, against the true labels'.
        mix: blend the batch with itself in another order first (mixup, uniform weights; texts joined).
        kinds: which triggers images get, of "patch", "blend", "wave", "warp" and "tint".
        train_mode: whether BatchNorm's statistics and dropout are live in the training. Statistics of blended and
            triggered samples are not those that the network meets later, so they are not by default.
        sharpen: double what in a trigger misleads the network and leave out what does not, by one gradient more a step;
            of images and features.
        augment: "crop", "crop-flip" where a flip preserves the label, or "none".
    """

    images: int = 12_000
    batch_size: int = 32
    lr: float = 5e-4
    shrink: float = 0.1
    step_cap: float | None = 0.5
    triggered: float = 1.0
    distill: float = 1.0
    mix: bool = True
    kinds: tuple[ImageKind, ...] = ("patch", "blend", "wave", "warp", "tint")
    train_mode: bool = False
    sharpen: bool = False
    augment: Augmentation = "crop"
    VERSION: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ConfigError(f"images must be at least 1, not {self.images}")
        for name in ("shrink", "triggered", "distill"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a finite number, at least 0, not {getattr(self, name)}")
        if not self.kinds or any(kind not in get_args(ImageKind) for kind in self.kinds):
            raise ConfigError(f"kinds must be one or more of {', '.join(get_args(ImageKind))}, not {self.kinds}")
        self._recipe(1)

    def __call__(self, model: nn.Module, clean: Samples, rng: Rng) -> Removal:
        """See :class:`unbackdoor.types.Defense`."""
        settings = self.suited(clean)
        tuned, given = copy.deepcopy(model), copy.deepcopy(model).eval().requires_grad_(False)
        clean = clean.to(next(iter(given.parameters())).device)
        stamp = triggers_for(given, clean, settings.kinds, rng.stream("triggers"))
        objective = Unmoved(settings, given, stamp, rng.stream("mix"))
        recipe = settings._recipe(len(clean))
        epochs = fit(tuned, clean, recipe, rng.child("inoculate"), objective=objective, name="inoculate")
        # Each sample passes a second time with a trigger.
        images = sum(e.images for e in epochs)
        values: dict[str, float | int | str | bool] = {"lr": settings.lr, "shrink": settings.shrink}
        return Removal(tuned, Trace((Phase("inoculate", tuple(epochs)),), (), values, (), images))

    #: What texts take where none of these was stated: a pretrained transformer does not come back from larger steps.
    TEXTS: ClassVar[dict[str, Any]] = {"lr": 1e-4, "images": 6000}

    def suited(self, clean: Samples) -> Inoculation:
        """These settings, or for texts, where none of ``TEXTS`` was stated, the same with these."""
        usual = all(getattr(self, f.name) == f.default for f in fields(self) if f.name in self.TEXTS)
        return replace(self, **self.TEXTS) if clean.kind == "text" and usual else self

    def _recipe(self, samples: int) -> Recipe:
        recipe = Recipe(
            epochs=epochs_for(self.images, samples),
            batch_size=self.batch_size,
            optimizer="adamw",
            lr=self.lr,
            schedule="one-cycle",
            step_cap=self.step_cap,
            augment=self.augment,
        )
        return replace(recipe, weight_decay=self.shrink / summed_lr(recipe, samples))


def triggers_for(
    model: nn.Module, clean: Samples, kinds: tuple[ImageKind, ...], generator: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """What puts random triggers on such samples.

    Raises:
        UnsupportedModel: texts, and a network without a table of embeddings, whose vocabulary is not known.
    """
    if clean.kind == "image":
        return RandomImageTriggers(kinds, generator)
    if clean.kind == "text":
        return RandomWords(_vocabulary(model), generator)
    values = as_float(clean.inputs)
    return RandomFeatures(values.amin(0), values.amax(0), generator)


def _vocabulary(model: nn.Module) -> int:
    """Rows of the largest table of embeddings."""
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    if not sizes:
        raise UnsupportedModel(
            f"random words need to know the vocabulary, and {type(model).__name__} has no table of embeddings "
            "(nn.Embedding)"
        )
    return max(sizes)


class Unmoved:
    """The objective: true labels and the given network's outputs, on the batch and on its triggered copy alike.

    Args:
        given: the teacher, frozen and in eval mode. It sees the batch without triggers.
        stamp: puts a random trigger on each sample.
        generator: on the CPU; of the mixing.
    """

    def __init__(
        self, settings: Inoculation, given: nn.Module, stamp: Callable[[Tensor], Tensor], generator: torch.Generator
    ) -> None:
        self.settings, self.given, self.stamp, self.generator = settings, given, stamp, generator

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Step:
        s = self.settings
        x, labels = blended(x, y, self.generator) if s.mix else (x, MixedLabels.pure(y))
        wanted = softened(self.given, x)
        with nullcontext() if s.train_mode else evaluating(model):
            plain, triggered = self._both(model, x, wanted)
        clean, foreign = (labels.entropy(out) + s.distill * divergence(out, wanted) for out in (plain, triggered))
        return Step(clean + s.triggered * foreign, plain, {"clean": clean, "triggered": foreign})

    def _both(self, model: nn.Module, x: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the batch and of its triggered copy: one pass, save for texts, whose lengths differ."""
        stamped = self.stamp(x if x.dtype == torch.int64 else x.float())
        if x.dtype == torch.int64:
            return model(x).float(), model(stamped).float()
        if self.settings.sharpen:
            stamped = self._sharpened(model, x, stamped, wanted)
        both = torch.cat([x, stamped.to(x.dtype)])
        if both.ndim == 4:
            both = both.contiguous(memory_format=torch.channels_last)
        plain, triggered = model(both).float().chunk(2)
        return plain, triggered

    def _sharpened(self, model: nn.Module, x: Tensor, stamped: Tensor, wanted: Tensor) -> Tensor:
        """Each trigger with what misleads the network doubled and what does not left out, by one gradient."""
        moving = stamped.detach().requires_grad_()
        with evaluating(model):
            (gradient,) = torch.autograd.grad(divergence(model(moving).float(), wanted), moving)
        change = stamped - x
        return (x + 2 * change * (gradient * change > 0)).clamp(0, 1)
