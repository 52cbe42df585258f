"""What would this removal leave of a backdoor that we know? Canaries: known backdoors planted into a copy.

Nobody can measure a backdoor whose trigger he does not have. But he can plant others, of several kinds, into a copy of
the very network with the very samples that he has, put that copy through the same removal, and see what is left of
them. Source: ours. How well it foretells what is left of the real backdoor is measured in
``benchmarks/canary_study.py``.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor import specs
from unbackdoor.attacks.poisoning import Contamination
from unbackdoor.attacks.workshop import Workshop
from unbackdoor.augmentation import Augmentation
from unbackdoor.defenses.recovery import divergence, softened
from unbackdoor.errors import ConfigError, DataError
from unbackdoor.evaluation.assessment import Rate, assess, stamp
from unbackdoor.evaluation.checks import ATTACK_TOOK
from unbackdoor.inference import evaluating
from unbackdoor.rng import Rng
from unbackdoor.training import Recipe, Step, fit
from unbackdoor.types import Defense, Epoch, Samples


@dataclass(frozen=True, slots=True)
class Canary:
    """One planted backdoor and what became of it.

    Attributes:
        spec: the trigger and its target, as an attack's spec.
        given: attack success rate on the given network, which knows nothing of it.
        planted: on the copy.
        left: on the copy, after the removal.
    """

    spec: str
    given: Rate
    planted: Rate
    left: Rate

    @property
    def took(self) -> bool:
        """Whether it was there to be removed."""
        return self.planted.value >= ATTACK_TOOK


@dataclass(frozen=True, slots=True)
class CanaryTest:
    """What a removal left of the canaries.

    Attributes:
        canaries: in the order in which they were asked for.
        accuracy_given: of the given network, on the samples that are judged.
        accuracy_planted: of the copy that carries the canaries.
        accuracy_left: of that copy, after the removal.
        images: that passed through the network in planting and in the second removal.
        seconds: that both took.
        notes: what could not be done, in plain words.
    """

    canaries: tuple[Canary, ...]
    accuracy_given: Rate
    accuracy_planted: Rate
    accuracy_left: Rate
    images: int
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> float | None:
        """The highest success rate left among the canaries that took; None where none did."""
        return max((c.left.value for c in self.canaries if c.took), default=None)

    @property
    def mean(self) -> float | None:
        """The mean success rate left over the canaries that took; None where none did."""
        left = [c.left.value for c in self.canaries if c.took]
        return sum(left) / len(left) if left else None


@dataclass(frozen=True, kw_only=True)
class Planting:
    """How canaries are planted: all into one copy, on the samples at hand.

    Each batch is seen as it is, with its true labels and the given network's own outputs to hold on to, and once more
    with a canary's trigger on each image, and that canary's target. How long and how hard decides how deep the canaries
    sit, and the defaults are not calibrated yet: on the one CIFAR-10 network where they were looked at, fine-tuning
    left far more of the patches than it leaves of patches that were trained in.

    Attributes:
        images: that pass by (each batch counts once), at most 300 epochs.
        lr: peak learning rate of AdamW, one-cycle.
        weight_decay: decoupled.
        step_cap: see :class:`unbackdoor.training.Recipe`.
        batch_size: images a step, before their triggered copies.
        distill: weight of the given network's outputs on the clean images.
        train_mode: whether BatchNorm's statistics and dropout are live. They are not by default: on one CIFAR-10
            network fine-tuning then left less of the canaries, and the copy lost as much accuracy either way.
        again: where no more than half of the canaries took, plant once more into a fresh copy, four times as long and
            at twice the learning rate: small and plain networks need it.
        augment: "crop", "crop-flip" or "none"; triggers stand where they stand.
    """

    images: int = 6000
    lr: float = 1e-3
    weight_decay: float = 0.0
    step_cap: float | None = 0.5
    batch_size: int = 32
    distill: float = 1.0
    train_mode: bool = False
    again: bool = True
    augment: Augmentation = "crop"

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ConfigError(f"images must be at least 1, not {self.images}")
        if self.distill < 0:
            raise ConfigError(f"distill must be at least 0, not {self.distill}")

    def recipe(self, samples: int) -> Recipe:
        """The training on so many samples."""
        return Recipe(
            epochs=min(300, max(1, round(self.images / samples))),
            batch_size=self.batch_size,
            optimizer="adamw",
            lr=self.lr,
            weight_decay=self.weight_decay,
            step_cap=self.step_cap,
            schedule="one-cycle",
            augment=self.augment,
        )


def usual_canaries(image_shape: tuple[int, int, int], num_classes: int, rng: Rng) -> tuple[str, ...]:
    """Specs of backdoors of different kinds that suit the images: two patches, a blend, a sinusoid, a warp.

    Places, sizes, pictures and targets are drawn, so that no attacker can know them; targets differ as far as there
    are classes.

    Args:
        image_shape: (C, H, W).
    """
    generator = rng.stream("canaries")

    def draw(count: int) -> int:
        return int(torch.randint(count, (1,), generator=generator))

    side = min(image_shape[1:])
    corners = ["top-left", "top-right", "bottom-left", "bottom-right"]
    first, second = torch.randperm(4, generator=generator)[:2].tolist()
    small, large = max(2, round(side * 3 / 32)), max(2, round(side * 5 / 32))
    targets = torch.randperm(num_classes, generator=generator).tolist()
    kinds = (
        f"badnets(size={small}, margin={draw(max(1, side // 8))}, corner={corners[first]}",
        f"badnets(size={large}, margin={draw(max(1, side // 8))}, corner={corners[second]}, pattern=grid",
        f"blended(alpha=0.2, picture_seed={1000 + draw(1000)}",
        f"sig(frequency={3 + draw(max(1, side // 4 - 3))}",
        f"wanet(s={side / 16:g}",
    )
    return tuple(f"{kind}, target={targets[i % num_classes]})" for i, kind in enumerate(kinds))


def try_canaries(
    model: nn.Module,
    clean: Samples,
    judged: Samples,
    defense: Defense,
    rng: Rng,
    *,
    kinds: Sequence[str] | None = None,
    planting: Planting | None = None,
) -> CanaryTest:
    """Plant known backdoors into a copy of the network, remove, and measure what is left of each.

    Args:
        model: the given network; left as it is.
        clean: what the removal gets; the canaries are planted with the same samples.
        judged: labelled samples on which the canaries are measured, best others than ``clean``.
        defense: the removal.
        rng: "defense" of it is what the removal gets.
        kinds: attack specs whose triggers are planted; :func:`usual_canaries` where none are named.
        planting: how; the defaults where it is None.

    Raises:
        ConfigError: a kind that is no attack.
        DataError: the samples are no images, or no kind works on them.
    """
    clean.require_images("a test by canaries")
    if kinds is None:
        kinds = usual_canaries(clean.image_shape, clean.num_classes, rng)
    attacks, notes = usable_canaries(kinds, clean, rng)
    began = time.perf_counter()
    planted, epochs = plant_canaries(model, clean, attacks, planting or Planting(), rng)
    removal = defense(copy.deepcopy(planted), clean, rng.child("defense"))
    seconds = time.perf_counter() - began
    removal.model.eval()
    found = [[assess(m, judged, attack=attack) for m in (model, planted, removal.model)] for attack in attacks]
    rates = [[a.asr for a in row if a.asr is not None] for row in found]
    canaries = tuple(Canary(specs.text_of(attack, "attack"), *row) for attack, row in zip(attacks, rates, strict=True))
    given, carrying, left = (assessment.accuracy for assessment in found[0])
    images = sum(e.images for e in epochs) + removal.trace.images
    return CanaryTest(canaries, given, carrying, left, images, seconds, notes)


def plant_canaries(
    model: nn.Module, clean: Samples, attacks: Sequence[Contamination], planting: Planting, rng: Rng
) -> tuple[nn.Module, list[Epoch]]:
    """A copy of the network that obeys all of the attacks' triggers and otherwise does as before.

    The epochs are those of both plantings, where there were two.
    """
    copied = copy.deepcopy(model)
    objective = _Implanting(copy.deepcopy(model).eval(), attacks, clean.num_classes, planting, rng)
    recipe = planting.recipe(len(clean))
    epochs = fit(copied, clean, recipe, rng.child("canaries"), objective=objective, name="plant canaries")
    found = [assess(copied, clean, attack=attack).asr for attack in attacks]
    took = [rate is not None and rate.value >= ATTACK_TOOK for rate in found]
    if not planting.again or sum(took) > len(took) / 2:
        return copied, epochs
    harder = dataclasses.replace(planting, images=4 * planting.images, lr=2 * planting.lr, again=False)
    copied, more = plant_canaries(model, clean, attacks, harder, rng.child("again"))
    return copied, epochs + more


def usable_canaries(kinds: Sequence[str], clean: Samples, rng: Rng) -> tuple[list[Contamination], tuple[str, ...]]:
    """The attacks that can stamp such images, with what they draw, and notes on the others.

    Raises:
        ConfigError: a kind that is no attack, or a target that is no class.
        DataError: none can.
    """
    usable: list[Contamination] = []
    notes: list[str] = []
    few = clean.images(slice(0, 1))
    for index, kind in enumerate(kinds):
        attack: Contamination = specs.build("attack", kind)
        attack.check_target(clean.num_classes)
        try:
            ready = attack.prepare(clean, rng.child("canary", index), Workshop())
            stamp(ready, few)
        except (ConfigError, DataError) as error:
            notes.append(f"{kind} was left out: {error}")
            continue
        usable.append(ready)
    if not usable:
        raise DataError(f"no canary can be planted in images of {clean.image_shape}: {'; '.join(notes)}")
    return usable, tuple(notes)


class _Implanting:
    """CE and distillation on the clean batch, CE with a canary's target on its triggered copy."""

    def __init__(
        self, teacher: nn.Module, attacks: Sequence[Contamination], classes: int, planting: Planting, rng: Rng
    ) -> None:
        self.teacher, self.attacks, self.classes = teacher, attacks, classes
        self.distill, self.train_mode = planting.distill, planting.train_mode
        self.draws = rng.stream("canary-of-each-image")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Step:
        stamped, wanted = self._stamped(x.float(), y)
        both = torch.cat([x, stamped.to(x.dtype)]).contiguous(memory_format=torch.channels_last)
        with nullcontext() if self.train_mode else evaluating(model):
            logits = model(both).float()
        plain, triggered = logits[: len(x)], logits[len(x) :]
        entropy, obeyed = F.cross_entropy(plain, y), F.cross_entropy(triggered, wanted)
        terms = {"cross_entropy": entropy, "canaries": obeyed}
        if not self.distill:
            return Step(entropy + obeyed, plain, terms)
        gap = divergence(plain, softened(self.teacher, x))
        return Step(entropy + obeyed + self.distill * gap, plain, {**terms, "distillation": gap})

    def _stamped(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Each image with the trigger of a canary drawn for it, and that canary's label."""
        which = torch.randint(len(self.attacks), y.shape, generator=self.draws).to(y.device)
        stamped, wanted = x.clone(), y.clone()
        for index, attack in enumerate(self.attacks):
            mine = (which == index).nonzero()[:, 0]
            if len(mine):
                stamped[mine] = stamp(attack, x[mine])
                wanted[mine] = attack.relabel(y[mine], self.classes)
        return stamped, wanted
