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

    Costs: The training passes ``images`` clean samples once through a copy of the given network and twice through the
    network, and the triggered ones a third time where they are sharpened. Before it come trials of half the length: one
    at least, as many as there are learning rates at most.

    Fails: With a trigger unlike all that is drawn. An attacker who trains with random triggers that do nothing beside
    his own that does, as noise modes and cover samples do, has taught the network to tell them apart already. A word
    that changes the meaning, or a patch over what an image shows, is noise in what is taught. With a few dozen held-out
    samples it is not seen that a learning rate costs a few points. What it does to backdoors in texts is not measured.

    Attributes:
        lrs: peak learning rates of AdamW, one-cycle, from gentle to harsh. Trials go up while that costs hardly any
            skill on the held-out samples. A single one is not tried first.
        images: clean samples that pass in the training, in whole epochs, at most 300 of them.
        held_out: share of the clean samples, by class, that tells what a trial cost. The training itself has them all.
        max_loss: what any but the gentlest may cost on the held-out samples, as mean probability of the true class
            against that of the given network.
        batch_size: a step, before their triggered copies.
        shrink: how far decoupled weight decay shrinks, over a training, a weight that no gradient holds: by
            exp(−shrink).
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
    images: int = 12_000
    held_out: float = 0.2
    max_loss: float = 0.06
    batch_size: int = 32
    shrink: float = 0.1
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
        for name in ("shrink", "triggered", "labels", "distill", "max_loss"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a finite number, at least 0, not {getattr(self, name)}")
        if not self.kinds or any(kind not in get_args(ImageKind) for kind in self.kinds):
            raise ConfigError(f"kinds must be one or more of {', '.join(get_args(ImageKind))}, not {self.kinds}")
        self.recipe(self.lrs[0], 1, self.images)

    def __call__(self, model: nn.Module, clean: Samples, rng: Rng) -> Removal:
        """See :class:`unbackdoor.types.Defense`."""
        return _Search(self.suited(clean), model, clean, rng).run()

    #: What texts take where none of these was stated: a pretrained transformer does not come back from larger steps.
    TEXTS: ClassVar[dict[str, Any]] = {"lrs": (5e-5, 1e-4, 2e-4), "images": 6000}

    def suited(self, clean: Samples) -> Inoculation:
        """These settings, or for texts, where none of ``TEXTS`` was stated, the same with these."""
        usual = all(getattr(self, f.name) == f.default for f in fields(self) if f.name in self.TEXTS)
        return replace(self, **self.TEXTS) if clean.kind == "text" and usual else self

    def recipe(self, lr: float, samples: int, images: int) -> Recipe:
        """A training on so many samples until about so many images have passed."""
        recipe = Recipe(
            epochs=epochs_for(images, samples),
            batch_size=self.batch_size,
            optimizer="adamw",
            lr=lr,
            schedule="one-cycle",
            step_cap=self.step_cap,
            augment=self.augment,
        )
        return replace(recipe, weight_decay=self.shrink / summed_lr(recipe, samples))


#: How often the gentlest learning rate is tried, each time a quarter of it, where it breaks the network.
TRIES = 4


class _Search:
    """One run: short trials from gentle to harsh as far as the held-out samples allow, then the training itself."""

    def __init__(self, settings: Inoculation, model: nn.Module, clean: Samples, rng: Rng) -> None:
        self.settings, self.model, self.rng = settings, model, rng
        self.clean = clean.to(device_of(model))
        self.given = copy.deepcopy(model).eval().requires_grad_(False)
        self.notes: list[str] = []
        self.tried: list[Phase] = []

    def run(self) -> Removal:
        s = self.settings
        rest, held_out = self.clean.split(s.held_out, self.rng.stream("held-out"))
        values: dict[str, float | int | str | bool] = {"held-out samples": len(held_out) if held_out else 0}
        if held_out is not None and len(s.lrs) > 1:
            lrs = self._searched(rest, held_out, values)
        else:
            lrs = self._gentler(s.lrs[0])
            if len(s.lrs) > 1:
                self.notes.append("no class has two samples: nothing was held out, the gentlest learning rate is used")
        for lr in lrs:
            found = self._train(lr, self.clean, s.images, "inoculate")
            if found is not None:
                values["learning rate"] = lr
                return Removal(found[0], self._trace((found[1],), values))
        self.notes.append("every learning rate broke the network: it is returned as it was given")
        return Removal(copy.deepcopy(self.model), self._trace((), values))

    def _trace(self, phases: tuple[Phase, ...], values: dict[str, float | int | str | bool]) -> Trace:
        # Each sample passes a second time with a trigger.
        trials, shown = (sum(e.images for p in ps for e in p.epochs) for ps in (self.tried, phases))
        return Trace(phases, (), values, tuple(self.notes), 2 * trials + shown)

    @staticmethod
    def _gentler(lr: float) -> list[float]:
        return [lr / 4**k for k in range(TRIES)]

    def _searched(
        self, samples: Samples, held_out: Samples, values: dict[str, float | int | str | bool]
    ) -> list[float]:
        """Learning rates, the chosen one first and gentler ones behind it, by trials of half the length."""
        gentle, *harsher = self.settings.lrs
        before = self._skill(self.given, held_out)
        values["held-out skill before"] = before
        lrs, best = self._gentler(gentle), None
        while lrs and best is None:
            best = self._trial(lrs[0], samples, held_out)
            if best is None or best < before / 2:
                self.notes.append(f"learning rate {lrs[0]:g} broke the network: a quarter of it was tried")
                lrs, best, harsher = lrs[1:], None, []
        for lr in harsher:
            # Where the gentlest costs skill already, nothing is left to spend on a harsher one.
            if best is None or before - best > self.settings.max_loss:
                break
            skill = self._trial(lr, samples, held_out)
            if skill is None or before - skill > self.settings.max_loss:
                break
            lrs, best = [lr, *lrs], skill
        if best is not None:
            values["held-out skill of the chosen trial"] = best
        return lrs

    def _trial(self, lr: float, samples: Samples, held_out: Samples) -> float | None:
        """Its skill on the held-out samples; None where it diverged."""
        found = self._train(lr, samples, max(1, self.settings.images // 2), f"inoculate (trial, lr {lr:g})")
        if found is None:
            return None
        self.tried.append(found[1])
        return self._skill(found[0], held_out)

    def _train(self, lr: float, samples: Samples, images: int, name: str) -> tuple[nn.Module, Phase] | None:
        """A copy of the given network after so many images; None where that diverged."""
        model, s = copy.deepcopy(self.model), self.settings
        stamp = triggers_for(self.given, self.clean, s.kinds, self.rng.stream("triggers", name))
        objective = Unmoved(s, self.given, stamp, self.rng.stream("mix", name))
        try:
            epochs = fit(
                model, samples, s.recipe(lr, len(samples), images), self.rng.child(name), objective=objective, name=name
            )
        except TrainingDiverged as error:
            self.notes.append(str(error))
            return None
        return model, Phase(name, tuple(epochs))

    @staticmethod
    def _skill(model: nn.Module, samples: Samples) -> float:
        """The mean probability of the true class."""
        labels = samples.labels.cpu()
        probabilities = predict(model, samples, precision="auto").softmax(1).cpu().double()
        return probabilities.gather(1, labels[:, None]).mean().item()


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
        clean, foreign = (
            s.labels * labels.entropy(out) + s.distill * divergence(out, wanted) for out in (plain, triggered)
        )
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
