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
from unbackdoor.errors import ConfigError, TrainingDiverged, UnsupportedModel
from unbackdoor.inference import device_of, evaluating, predict
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

    Costs: A stage passes ``images`` clean samples once through a copy of the given network and twice through the
    network, and the triggered ones a third time where they are sharpened. There are two stages at least, one more than
    learning rates at most.

    Fails: With a trigger unlike all that is drawn. An attacker who trains with random triggers that do nothing beside
    his own that does, as noise modes and cover samples do, has taught the network to tell them apart already. A word
    that changes the meaning, or a patch over what an image shows, is noise in what is taught. With a few dozen held-out
    samples a stage that costs a few points is not seen to.

    Attributes:
        lrs: peak learning rates of AdamW, one-cycle, a stage each, from gentle to harsh. The next stage begins where
            the last one ended, and counts while the held-out samples do not show that it cost skill.
        images: clean samples that pass in a stage, in whole epochs, at most 300 of them.
        held_out: share of the clean samples, by class, that tells what a stage cost.
        tolerance: what a stage may cost against the best so far, as mean probability of the true class, on top of one
            standard error.
        join: end with one more stage at the learning rate that was reached, on all samples.
        batch_size: a step, before their triggered copies.
        shrink: how far decoupled weight decay shrinks, over a stage, a weight that no gradient holds: by exp(−shrink).
        step_cap: see :class:`unbackdoor.training.Recipe`.
        triggered: weight of the triggered copies' loss against that of the clean ones.
        labels: weight of the true labels' cross-entropy.
        distill: weight of the divergence from the given network's outputs at temperature 2.
        mix: blend the batch with itself in another order first (mixup, uniform weights; texts joined).
        kinds: which triggers images get, of "patch", "blend", "wave", "warp" and "tint".
        sharpen: double what in a trigger misleads the network and leave out what does not, by one gradient more a step;
            of images and features.
        train_mode: whether BatchNorm's statistics and dropout are live in the training. Statistics of blended and
            triggered samples are not those that the network meets later, so they are not by default.
        augment: "crop", "crop-flip" where a flip preserves the label, or "none".
    """

    lrs: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
    images: int = 6000
    held_out: float = 0.2
    tolerance: float = 0.01
    join: bool = True
    batch_size: int = 32
    shrink: float = 0.05
    step_cap: float | None = 0.5
    triggered: float = 1.0
    labels: float = 1.0
    distill: float = 1.0
    mix: bool = True
    kinds: tuple[ImageKind, ...] = ("patch", "blend", "wave", "warp", "tint")
    sharpen: bool = False
    train_mode: bool = False
    augment: Augmentation = "crop"
    VERSION: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not self.lrs or min(self.lrs) <= 0 or list(self.lrs) != sorted(self.lrs):
            raise ConfigError(f"lrs must be one or more numbers > 0, the smallest first, not {self.lrs}")
        if self.images < 1:
            raise ConfigError(f"images must be at least 1, not {self.images}")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out must lie between 0 and 1, not {self.held_out}")
        for name in ("shrink", "triggered", "labels", "distill", "tolerance"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a finite number, at least 0, not {getattr(self, name)}")
        if not self.kinds or any(kind not in get_args(ImageKind) for kind in self.kinds):
            raise ConfigError(f"kinds must be one or more of {', '.join(get_args(ImageKind))}, not {self.kinds}")
        self.recipe(self.lrs[0], 1)

    def __call__(self, model: nn.Module, clean: Samples, rng: Rng) -> Removal:
        """See :class:`unbackdoor.types.Defense`."""
        return _Climb(self.suited(clean), model, clean, rng).run()

    #: What texts take where none of these was stated: a pretrained transformer does not come back from larger steps.
    TEXTS: ClassVar[dict[str, Any]] = {"lrs": (5e-5, 1e-4, 2e-4), "images": 3000}

    def suited(self, clean: Samples) -> Inoculation:
        """These settings, or for texts, where none of ``TEXTS`` was stated, the same with these."""
        usual = all(getattr(self, f.name) == f.default for f in fields(self) if f.name in self.TEXTS)
        return replace(self, **self.TEXTS) if clean.kind == "text" and usual else self

    def recipe(self, lr: float, samples: int) -> Recipe:
        """A stage on so many samples."""
        recipe = Recipe(
            epochs=epochs_for(self.images, samples),
            batch_size=self.batch_size,
            optimizer="adamw",
            lr=lr,
            schedule="one-cycle",
            step_cap=self.step_cap,
            augment=self.augment,
        )
        return replace(recipe, weight_decay=self.shrink / summed_lr(recipe, samples))


#: Learning rates of the first stage that are tried, each a quarter of the one before.
TRIES = 4


class _Climb:
    """One run: stages from gentle to harsh, as far as the held-out samples allow."""

    def __init__(self, settings: Inoculation, model: nn.Module, clean: Samples, rng: Rng) -> None:
        self.settings, self.rng = settings, rng
        self.clean = clean.to(device_of(model))
        self.given = copy.deepcopy(model).eval().requires_grad_(False)
        self.reached = copy.deepcopy(model)
        self.stamp = triggers_for(self.given, self.clean, settings.kinds, rng.stream("triggers"))
        self.phases: list[Phase] = []
        self.notes: list[str] = []

    def run(self) -> Removal:
        s = self.settings
        rest, held_out = self.clean.split(s.held_out, self.rng.stream("held-out"))
        watched = held_out or rest
        if held_out is None:
            self.notes.append("no class has two samples: nothing could be held out, and only the first stage is run")
        before = self._skill(self.given, watched)
        chosen, best = self._first(rest, watched, before)
        for lr in s.lrs[1:] if held_out and chosen == s.lrs[0] else ():
            model = self._stage(lr, rest, f"inoculate, lr {lr:g}")
            skill = before.new_zeros(len(before)) if model is None else self._skill(model, watched)
            if model is None or not self._holds(skill, best):
                break
            self.reached, chosen, best = model, lr, max(skill, best, key=lambda each: each.mean().item())
        if s.join and held_out and chosen:
            self.reached = self._stage(chosen, self.clean, f"inoculate, lr {chosen:g}, all samples") or self.reached
        values: dict[str, float | int | str | bool] = {
            "learning rate reached": chosen,
            "held-out samples": len(held_out) if held_out else 0,
            "held-out skill before": before.mean().item(),
            "held-out skill of the best stage": best.mean().item(),
        }
        # Each sample passes a second time with a trigger.
        images = sum(e.images for p in self.phases for e in p.epochs)
        return Removal(self.reached, Trace(tuple(self.phases), (), values, tuple(self.notes), images))

    def _first(self, samples: Samples, watched: Samples, before: Tensor) -> tuple[float, Tensor]:
        """(the learning rate of the first stage, its skill): a quarter as often as the network would break.

        0 and the given network's skill where it broke all the same: then that is returned as it was.
        """
        lr = self.settings.lrs[0]
        for _ in range(TRIES):
            model = self._stage(lr, samples, f"inoculate, lr {lr:g}")
            if model is not None:
                skill = self._skill(model, watched)
                if skill.mean() >= before.mean() / 2:
                    self.reached = model
                    return lr, skill
            self.notes.append(f"learning rate {lr:g} broke the network: a quarter of it was tried")
            lr /= 4
        self.notes.append("every learning rate broke the network: it is returned as it was given")
        return 0.0, before

    def _stage(self, lr: float, samples: Samples, name: str) -> nn.Module | None:
        """A copy of what was reached, one stage further; None where that diverged."""
        model, number = copy.deepcopy(self.reached), len(self.phases)
        objective = Unmoved(self.settings, self.given, self.stamp, self.rng.stream("mix", number))
        recipe = self.settings.recipe(lr, len(samples))
        try:
            epochs = fit(model, samples, recipe, self.rng.child("stage", number), objective=objective, name=name)
        except TrainingDiverged as error:
            self.notes.append(str(error))
            return None
        self.phases.append(Phase(name, tuple(epochs)))
        return model

    @staticmethod
    def _skill(model: nn.Module, samples: Samples) -> Tensor:
        """(n,) float64 on the CPU: the probability of each true class."""
        labels = samples.labels.cpu()
        return predict(model, samples, precision="auto").softmax(1).cpu().double().gather(1, labels[:, None])[:, 0]

    def _holds(self, skill: Tensor, best: Tensor) -> bool:
        """Whether the skill is as good as the best but for the tolerance and one standard error of the pairs."""
        lost = best - skill
        error = lost.std().item() / math.sqrt(len(lost)) if len(lost) > 1 else 0.0
        return lost.mean().item() <= self.settings.tolerance + error


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
        clean, foreign = (s.labels * labels.entropy(out) + s.distill * divergence(out, wanted) for out in (plain, triggered))
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
