"""Lengths and learning rates that suit the samples and the network at hand, found on the clean samples alone.

A fixed learning rate does not travel: what fine-tunes one network sends another, without normalisation or with inputs
in 0..255, to chance, from where it cannot come back.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

from torch import nn

from unbackdoor.errors import TrainingDiverged
from unbackdoor.inference import measure
from unbackdoor.rng import Rng
from unbackdoor.training import Objective, Recipe, fit
from unbackdoor.types import Samples

#: Steps of the trial run, the factor between two tries, and how many tries there are.
TRIAL_STEPS, FACTOR, TRIES = 30, 0.3, 6


#: An epoch over a handful of samples is one step; more of them than this are not run.
MOST_EPOCHS = 300


def epochs_for(images: float, samples: int) -> int:
    """How many epochs over ``samples`` pass about ``images`` images: at least 1, at most 300."""
    return min(MOST_EPOCHS, max(1, round(images / samples)))


def steady_lr(
    model: nn.Module, clean: Samples, recipe: Recipe, rng: Rng, *, objective: Objective | None = None
) -> tuple[float, tuple[str, ...]]:
    """The largest of ``recipe.lr · 0.3^k``, k = 0..5, that does not break a copy of the model in 30 steps.

    Broken means: a loss that is not finite, or clean samples that are afterwards fitted both worse than at chance by
    loss (above ln C) and clearly worse than before. Source: ours.

    Returns:
        The learning rate, and a note where it is not the asked one.
    """
    before = measure(model, clean)
    limit = max(math.log(clean.num_classes), before.loss + 0.5)
    per_epoch = max(1, math.ceil(len(clean) / recipe.batch_size))
    trial = replace(recipe, epochs=math.ceil(TRIAL_STEPS / per_epoch), schedule="constant")
    lr = recipe.lr
    for _ in range(TRIES):
        attempt = copy.deepcopy(model)
        try:
            fit(attempt, clean, replace(trial, lr=lr), rng, objective=objective, name="learning-rate test")
            after = measure(attempt, clean)
        except TrainingDiverged:
            after = None
        if after is not None and after.loss < limit and after.accuracy > before.accuracy / 2:
            break
        lr *= FACTOR
    if lr == recipe.lr:
        return lr, ()
    return lr, (
        f"the learning rate was lowered from {recipe.lr:g} to {lr:g}, since more broke the network in a short test",
    )
