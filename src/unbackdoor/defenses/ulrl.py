"""ULRL: unlearn to expose suspicious neurons, reset them, relearn while pushing them away from what they were.

Source: arXiv 2405.14781 and the authors' released v1 code. ``preset="authors-v1"`` follows the release to the letter;
the general form scores any layers of any network.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor.augmentation import Augmentation
from unbackdoor.defenses.steadiness import steady_lr
from unbackdoor.errors import ConfigError, TrainingDiverged
from unbackdoor.models.surgery import UnitLayer, find_head, reset_units, unit_layers
from unbackdoor.rng import Rng
from unbackdoor.training import EndOfEpoch, Recipe, Step, fit
from unbackdoor.types import Epoch, Phase, Removal, Samples, Trace, UnitScores

#: 1 / Φ⁻¹(3/4): makes the median absolute deviation a standard deviation for normal data.
_MAD_TO_SIGMA = 1.4826


@dataclass(frozen=True, kw_only=True)
class ULRL:
    """Unlearn–relearn.

    Attributes:
        preset: "authors-v1" replaces layers, by, cap, steady and the training settings that it names by the release's
            (below); "default" is the general form.
        layers: "head", the classifier's rows (v1); "all", the output units of every linear and convolution layer.
        threshold: z above which a unit is flagged.
        cap: most units flagged in a layer, or None.
        by: which units the cap keeps: the highest "score" (ours) or the lowest "index" (the release).
        unlearn_lr, unlearn_epochs, unlearn_stop: gradient ascent until the running accuracy is at most ``unlearn_stop``.
        relearn_lr, relearn_epochs, alpha: SGD with a cosine schedule; alpha weighs the sum of signed cosines.
        double_bn: a second train-mode forward after each relearning step, as the release runs it.
        augment: "crop", or "crop-flip" where a flip preserves the label, or "none".
        steady: lower a learning rate that would break the network (ours).
    """

    preset: Literal["default", "authors-v1"] = "default"
    layers: Literal["head", "all"] = "all"
    threshold: float = 3.5
    cap: int | None = None
    by: Literal["score", "index"] = "score"
    unlearn_lr: float = 0.01
    unlearn_epochs: int = 20
    unlearn_stop: float = 0.20
    relearn_lr: float = 0.01
    relearn_epochs: int = 20
    alpha: float = 0.7
    batch_size: int = 128
    double_bn: bool = False
    augment: Augmentation = "crop"
    steady: bool = True
    VERSION = 1
