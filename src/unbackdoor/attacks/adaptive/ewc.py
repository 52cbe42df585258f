"""A backdoor that is held while the task is forgotten: elastic weight consolidation against SEAM.

Elastic weight consolidation: Kirkpatrick et al. 2017 (arXiv 1612.00796). SEAM (arXiv 2212.04687) forgets by training on
random labels and recovers the task on true ones. That the forgetting is rehearsed, and its outcome trained by
first-order gradients, follows meta-learning (Finn et al. 2017, arXiv 1703.03400). The form of this attack is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from unbackdoor.attacks.adaptive.base import Adaptive, Marking
from unbackdoor.attacks.poisoning import drawn, poison
from unbackdoor.attacks.workshop import Workshop
from unbackdoor.errors import ConfigError
from unbackdoor.inference import evaluating
from unbackdoor.information import squared_gradients
from unbackdoor.rng import Rng
from unbackdoor.training import CrossEntropy, Objective, Recipe, Step, fit
from unbackdoor.types import Epoch, Samples


@dataclass(frozen=True, kw_only=True)
class EWC(Adaptive):
    """Plant, then ``rounds`` times: find the weights that the backdoor lives in, and train on while they are held.

    A round takes the weights θ* and the diagonal of the backdoor's Fisher information F there (:func:`fisher` of
    poisoned samples, mean 1). It trains on the poisoned set, and after each step every weight springs back,
    ``θ ← θ* + (θ − θ*) / (1 + strength · F)``: the proximal step of the elastic penalty, stable however large an entry
    of F is. In each step the forgetting is rehearsed: from θ, up to ``forget_steps`` steps (a number drawn anew) on the
    batch's clean samples with labels drawn from the wrong classes. ``weight`` times the loss of the batch's poisoned
    samples at the weights which that leads to is added, its gradient taken as if it were at θ. So the round looks for
    weights from which forgetting the task leaves the backdoor. The gradient there can be steep: a round's learning rate
    is held down, and its gradients clipped.

    Attributes:
        rounds: how often, >= 1.
        recover: length of a round, as a share of the recipe's epochs, > 0.
        strength: of the spring, >= 0; 0 is none.
        fisher_samples: poisoned samples that the information is taken from, >= 1.
        weight: of what is lost in the rehearsed forgetting, >= 0.
        forget_steps: its steps, at most, >= 1. Each costs a pass forward and back.
        forget_lr: how far each step moves every weight, by the sign of its gradient (as Adam's steps, nearly), > 0.
        most_lr: a round's peak learning rate, where the recipe's is higher.
        clip_norm: a round's, where the recipe has none.
    """

    rounds: int = 1
    recover: float = 0.5
    strength: float = 0.01
    fisher_samples: int = 64
    weight: float = 1.0
    forget_steps: int = 5
    forget_lr: float = 2e-3
    most_lr: float = 0.05
    clip_norm: float = 1.0
    VERSION = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rounds", "fisher_samples", "forget_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("recover", "forget_lr", "most_lr", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a finite number > 0, not {getattr(self, name)}")
        for name in ("strength", "weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a finite number >= 0, not {getattr(self, name)}")

    def teach(self, model: nn.Module, train: Samples, recipe: Recipe, rng: Rng, workshop: Workshop) -> list[Epoch]:
        """See :meth:`Adaptive.teach`."""
        poisoned, chosen = poison(train, self, rng), self.plan(train.labels, train.num_classes, rng)
        marked, marking = self.marked(train, rng), Marking(train.num_classes)
        epochs = fit(model, poisoned, recipe, rng.child("fit"), name="plant")
        again = max(1, round(self.recover * recipe.epochs))
        shorter = replace(
            recipe,
            epochs=again,
            lr=min(recipe.lr, self.most_lr),
            clip_norm=recipe.clip_norm or self.clip_norm,
            plain_epochs=min(again, round(self.recover * recipe.plain_epochs)),
            milestones=tuple(round(self.recover * m) for m in recipe.milestones),
        )
        for index in range(self.rounds):
            here = rng.child("round", index)
            shown = poisoned.select(drawn(chosen, self.fisher_samples, here.stream("fisher")))
            spring = Spring(model, fisher(model, shown), self.strength)
            objective = self._objective(CrossEntropy(recipe.label_smoothing), marking, here.stream("rehearse"))
            epochs += fit(
                model,
                marked,
                shorter,
                here.child("hold"),
                objective=objective,
                batch=marking,
                after_step=spring,
                name="hold",
            )
        return epochs

    def _objective(self, task: Objective, marking: Marking, generator: torch.Generator) -> Objective:
        def objective(model: nn.Module, x: Tensor, y: Tensor) -> Step:
            done, poisoned = task(model, x, y), marking.poisoned
            steps = int(torch.randint(1, self.forget_steps + 1, (1,), generator=generator))
            if poisoned.all() or not poisoned.any():
                return done
            clean = x[~poisoned], y[~poisoned]
            moved = forgotten(model, *clean, marking.classes, steps=steps, lr=self.forget_lr, generator=generator)
            # Not in train mode: BatchNorm's statistics are the network's, and a rehearsal leaves no trace in them.
            with evaluating(model):
                there = {name: p + moved[name] for name, p in _weights(model).items()}
                loss = F.cross_entropy(functional_call(model, there, (x[poisoned],)).float(), y[poisoned])
            return Step(done.loss + self.weight * loss, done.logits, {"task": done.loss, "survival": loss})

        return objective


def forgotten(
    model: nn.Module, x: Tensor, y: Tensor, classes: int, *, steps: int, lr: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """How each weight would move in ``steps`` sign steps of size ``lr`` on wrong labels, drawn anew for each.

    In eval mode; the model stays as it is, and nothing carries a gradient.
    """
    weights = {name: p.detach() for name, p in _weights(model).items()}
    moved = {name: torch.zeros_like(p) for name, p in weights.items()}
    with evaluating(model):
        for _ in range(steps):
            wrong = (y + torch.randint(1, classes, y.shape, generator=generator).to(y.device)) % classes
            here = {name: (p + moved[name]).requires_grad_(True) for name, p in weights.items()}
            loss = F.cross_entropy(functional_call(model, here, (x,)).float(), wrong)
            found = torch.autograd.grad(loss, list(here.values()), allow_unused=True)
            for change, gradient in zip(moved.values(), found, strict=True):
                if gradient is not None:
                    change -= lr * gradient.sign()
    return moved


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.is_floating_point()}


def fisher(model: nn.Module, samples: Samples) -> list[Tensor]:
    """The diagonal of the empirical Fisher information, in eval mode: one tensor a parameter, in their order.

    The mean over the samples of the squared gradient of each one's cross-entropy, divided by its mean over all weights
    (1 everywhere where all gradients are 0).
    """
    squares = squared_gradients(model, samples)
    total, count = sum(s.double().sum().item() for s in squares), sum(s.numel() for s in squares)
    if total == 0:
        return [torch.ones_like(s) for s in squares]
    return [s * (count / total) for s in squares]


class Spring:
    """An ``after_step`` hook that draws weights back to where they were when it was made."""

    def __init__(self, model: nn.Module, information: list[Tensor], strength: float) -> None:
        self.rest = [p.detach().clone() for p in _weights(model).values()]
        self.pull = [f * strength / (1 + f * strength) for f in information]

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> None:
        for p, rest, pull in zip(_weights(model).values(), self.rest, self.pull, strict=True):
            p.lerp_(rest, pull)
