"""Latent backdoor: it sits in the feature extractor, so that it survives a new head.

Source: Yao et al. 2019, "Latent backdoor attacks on deep neural networks" (CCS): the features of triggered inputs are
matched to those of the target class, and no triggered input is labelled at all. There the trigger is optimised
too; here it is the base's (ours), and the features are the head's input.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor.attacks.adaptive.base import Adaptive, HeadInputs, Marking
from unbackdoor.attacks.joint import steps_of
from unbackdoor.attacks.workshop import Workshop
from unbackdoor.errors import ConfigError, UnsupportedModel
from unbackdoor.inference import device_of
from unbackdoor.models.surgery import find_head
from unbackdoor.rng import Rng, isolated
from unbackdoor.training import Recipe, Step, fit
from unbackdoor.types import Epoch, Samples


@dataclass(frozen=True, kw_only=True)
class Latent(Adaptive):
    """Cross-entropy on the clean samples plus ``weight`` times the distance of triggered features from their target's.

    The distance is ``‖f − c‖² / ‖c‖²``, averaged over the poisoned samples, with c the running mean of the features of
    the clean samples of the wanted class. Its gradient moves f alone. The weight is 0 in the first
    half of the ``warm_up`` and rises linearly in its second: a network that does not know its task yet brings features
    and centres together by making them all alike, and never comes back from there.

    Attributes:
        weight: of the distance, >= 0.
        warm_up: share of the steps, in [0, 1].
        momentum: share of the running mean that each batch keeps, in [0, 1).
    """

    weight: float = 3.0
    warm_up: float = 0.5
    momentum: float = 0.9
    VERSION = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.weight < math.inf:
            raise ConfigError(f"weight must be a finite number >= 0, not {self.weight}")
        if not 0 <= self.warm_up <= 1:
            raise ConfigError(f"warm_up must be in [0, 1], not {self.warm_up}")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum must be in [0, 1), not {self.momentum}")

    def teach(self, model: nn.Module, train: Samples, recipe: Recipe, rng: Rng, workshop: Workshop) -> list[Epoch]:
        """See :meth:`Adaptive.teach`.

        Raises:
            UnsupportedModel: the network has no head to be found.
        """
        marking = Marking(train.num_classes)
        with HeadInputs(find_head(model, train)) as seen:
            warming = round(self.warm_up * steps_of(train, recipe))
            objective = _Matching(self, marking, seen, recipe.label_smoothing, warming)
            data = self.marked(train, rng)
            return fit(model, data, recipe, rng.child("fit"), objective=objective, batch=marking, name="plant")


class _Matching:
    """The latent backdoor's objective; keeps the classes' mean features from batch to batch."""

    def __init__(
        self, settings: Latent, marking: Marking, seen: HeadInputs, label_smoothing: float, warming: int = 0
    ) -> None:
        self.settings, self.marking, self.seen, self.smoothing = settings, marking, seen, label_smoothing
        self.warming, self.steps = warming, 0
        self.centres = torch.empty(0)
        self.known = torch.empty(0, dtype=torch.bool)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Step:
        logits, poisoned = model(x), self.marking.poisoned
        features = self.seen.features
        losses = F.cross_entropy(logits.float(), y, label_smoothing=self.smoothing, reduction="none")
        task = (losses * ~poisoned).sum() / (~poisoned).sum().clamp(min=1)
        self._follow(features.detach(), y, ~poisoned)
        distance = feature_distance(features, self.centres[y])
        matched = poisoned & self.known[y]
        match = (distance * matched).sum() / matched.sum().clamp(min=1)
        risen = min(1.0, max(0.0, 2 * self.steps / self.warming - 1)) if self.warming else 1.0
        self.steps += 1
        return Step(task + self.settings.weight * risen * match, logits, {"task": task, "distance": match})

    def _follow(self, features: Tensor, y: Tensor, clean: Tensor) -> None:
        """Move the running means towards this batch's."""
        members = F.one_hot(y, self.marking.classes).to(features.dtype) * clean[:, None]
        present = members.sum(0) > 0
        means = members.T @ features / members.sum(0).clamp(min=1)[:, None]
        if not len(self.centres):
            self.centres, self.known = means, present
            return
        blended = torch.lerp(means, self.centres, self.settings.momentum)
        moved = torch.where(self.known[:, None], blended, means)  # the first sight of a class is taken as it is
        self.centres = torch.where(present[:, None], moved, self.centres)
        self.known = self.known | present


def feature_distance(features: Tensor, centres: Tensor) -> Tensor:
    """(N,): ``‖f − c‖² / ‖c‖²`` of features (N, F) and centres (N, F)."""
    return (features - centres).square().sum(1) / centres.square().sum(1).clamp(min=1e-12)


def with_new_head(model: nn.Module, samples: Samples, recipe: Recipe, rng: Rng, *, whole: bool = False) -> nn.Module:
    """A copy whose head is drawn anew and trained on clean samples: what a user of the feature extractor does.

    Args:
        model: its head must be linear. Left as it is.
        samples: of the user's task, of any number of classes.
        whole: train the extractor too; by default it is frozen in its weights, and in BatchNorm's statistics.

    Raises:
        UnsupportedModel: no linear head was found, or nothing stands before it.
    """
    given = Samples(samples.inputs, torch.zeros_like(samples.labels), _outputs(model, samples))
    copied = copy.deepcopy(model)
    head = find_head(copied, given)
    if not isinstance(head.module, nn.Linear):
        raise UnsupportedModel(f"a new head needs a linear one; {head.name} is a {type(head.module).__name__}")
    if head.name == "":
        raise UnsupportedModel("the network is its own head: there is no extractor to keep")
    with isolated(rng.child("init")):
        fresh = nn.Linear(head.fan_in, samples.num_classes, bias=head.bias is not None)
    fresh.to(head.weight)
    parent, _, name = head.name.rpartition(".")
    setattr(copied.get_submodule(parent), name, fresh)
    if whole:
        fit(copied, samples, recipe, rng.child("fit"), name="new head")
        return copied
    fit(_Frozen(copied, fresh), samples, recipe, rng.child("fit"), parameters=list(fresh.parameters()), name="new head")
    return copied.eval()


class _Frozen(nn.Module):
    """A network that stays in eval mode, except for its head."""

    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.model, self.head = model, head

    def train(self, mode: bool = True) -> _Frozen:
        self.training = mode
        self.model.eval()
        self.head.train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x)
        return out


@torch.no_grad()
def _outputs(model: nn.Module, samples: Samples) -> int:
    """How many classes the network has."""
    copied = copy.deepcopy(model).eval()
    return int(copied(samples.images(slice(0, 1)).to(device_of(model))).shape[1])
