"""``auto``: which method suits this network, found out on a copy of it that carries backdoors we know."""

from __future__ import annotations

import copy
import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from unbackdoor import specs
from unbackdoor.attacks.poisoning import Contamination
from unbackdoor.augmentation import Augmentation
from unbackdoor.errors import ConfigError, DataError, TrainingDiverged, UnsupportedModel
from unbackdoor.evaluation.assessment import assess
from unbackdoor.evaluation.canaries import Planting, plant_canaries, usable_canaries, usual_canaries
from unbackdoor.evaluation.checks import ATTACK_TOOK
from unbackdoor.inference import measure
from unbackdoor.rng import Rng
from unbackdoor.types import Defense, Removal, Samples


@dataclass(frozen=True, kw_only=True)
class Auto:
    """Auto: tries methods on a copy with known backdoors, and takes the first that leaves little of them.

    Nobody can measure a backdoor whose trigger he does not have, but he can plant others, of several kinds, into a copy
    of the very network (canaries). The methods are tried on that copy, the gentlest first. The first that leaves
    little of the canaries and keeps the accuracy on held-out samples is run on the network itself, on all samples.

    Source: ours.

    Deviations: None.

    Costs: The planting, each method that is tried, and the chosen one once more: about three times as much as that one,
    where the first will do.

    Fails: How well the choice suits the true backdoor is not measured yet. Where no method keeps the rule all are
    tried, and the one that is taken may cost more accuracy than a gentler one would have. Canaries are planted in a
    short training and of kinds that we thought of; a backdoor that was trained in from the start may sit deeper, and
    one of another kind may stay. The first method is trained against triggers of the canaries' kinds, so that they
    say less of it than of the others. With one image a class nothing can be tried and the first method is taken as it
    is; of texts and features, which have no canaries yet, ``otherwise``.

    Attributes:
        candidates: names or specs of defenses, in the order in which they are tried.
        most_left: success that may be left of the canaries that took, in the mean, in [0, 1], beyond what their
            triggers do to the given network, which knows nothing of them.
        max_loss: held-out accuracy, in [0, 1], that a method may cost on the copy. Where none keeps to both, the one
            that leaves least among those that keep to this one is taken, or else the one that costs least.
        held_out: share of the clean samples, by class, on which the canaries and the accuracy are measured.
        otherwise: the method for texts and features.
        planting: images that pass in planting.
        augment: "none", "crop" or "crop-flip", handed to the candidates that augment and do not say how.
    """

    candidates: tuple[str, ...] = ("inoculation", "seam", "ulrl")
    most_left: float = 0.25
    max_loss: float = 0.05
    held_out: float = 0.2
    otherwise: str = "seam"
    planting: int = 6000
    augment: Augmentation = "crop"
    VERSION: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not self.candidates:
            raise ConfigError("candidates must name one or more defenses, not none")
        for name in ("most_left", "max_loss"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in [0, 1], not {getattr(self, name)}")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out must lie between 0 and 1, not {self.held_out}")
        if any(specs.parse(text)[0] == "auto" for text in (*self.candidates, self.otherwise)):
            raise ConfigError("auto cannot choose itself: candidates and otherwise must name other defenses")
        self.defenses()
        self.plan()

    def defenses(self) -> dict[str, Defense]:
        """What may be chosen, by spec, with the augmentation for those that do not state one."""
        return {text: self._built(text) for text in (*self.candidates, self.otherwise)}

    def _built(self, text: str) -> Defense:
        name, given = specs.parse(text)
        made: Defense = specs.build("defense", text)
        fields = {f.name for f in dataclasses.fields(specs.lookup("defense", name))}
        if "augment" in fields and not {"augment", "preset"} & given.keys():
            changed: Any = made
            made = dataclasses.replace(changed, augment=self.augment)
        return made

    def plan(self) -> Planting:
        """How the canaries are planted."""
        return Planting(images=self.planting, augment=self.augment)

    def __call__(self, model: nn.Module, clean: Samples, rng: Rng) -> Removal:
        """See :class:`unbackdoor.types.Defense`."""
        defenses = self.defenses()
        choice = _Choice(first=self.candidates[0])
        rest, held_out = clean.split(self.held_out, rng.stream("held-out"))
        if clean.kind != "image":
            choice.name = self.otherwise
            choice.notes.append(f"there are no canaries but for images: {choice.name} was taken without a trial")
        elif held_out is None:
            choice.notes.append(f"no class has two samples to try with: {choice.name} was taken without a trial")
        else:
            _Trials(self, model, rest, held_out, rng).choose({t: defenses[t] for t in self.candidates}, choice)
        removal = defenses[choice.name](model, clean, rng.child("defense"))
        trace = removal.trace
        values = {"method": choice.name, **choice.values, **trace.values}
        notes = (*choice.notes, *trace.notes)
        images = trace.trial_images + choice.images
        return Removal(removal.model, dataclasses.replace(trace, values=values, notes=notes, trial_images=images))


class _Choice:
    """What the trials came to."""

    def __init__(self, first: str) -> None:
        self.name = first
        self.notes: list[str] = []
        self.values: dict[str, float | int | str | bool] = {}
        self.images = 0


@dataclass(frozen=True)
class _Tried:
    """A method on the copy: what it left of the canaries in the mean, and the held-out accuracy that it cost."""

    name: str
    left: float
    lost: float


class _Trials:
    """The copy with canaries in it, and what the methods make of it."""

    def __init__(self, settings: Auto, model: nn.Module, rest: Samples, held_out: Samples, rng: Rng) -> None:
        self.settings, self.model, self.rest, self.held_out, self.rng = settings, model, rest, held_out, rng

    def choose(self, defenses: dict[str, Defense], choice: _Choice) -> None:
        """Write the name of the method to take, and why, into ``choice``."""
        s, rng = self.settings, self.rng.child("canaries")
        kinds = usual_canaries(self.rest.image_shape, self.rest.num_classes, rng)
        try:
            attacks, notes = usable_canaries(kinds, self.rest, rng)
            carrier, epochs = plant_canaries(self.model, self.rest, attacks, s.plan(), rng)
        except (DataError, TrainingDiverged) as error:
            choice.notes.append(f"no canary could be planted, so {choice.name} was taken without a trial: {error}")
            return
        choice.notes += notes
        choice.images += sum(e.images for e in epochs)
        taken = {a: self._success(self.model, a) for a in attacks if self._success(carrier, a) >= ATTACK_TOOK}
        choice.values["canaries that took"] = len(taken)
        if not taken:
            choice.notes.append(f"no canary took, so {choice.name} was taken without a trial")
            return
        tried: list[_Tried] = []
        for name, defense in defenses.items():
            found = self._try(name, defense, carrier, taken, choice)
            if found is None:
                continue
            tried.append(found)
            choice.values[f"canaries left by {name}"] = found.left
            choice.values[f"held-out accuracy lost by {name}"] = found.lost
            if found.left <= s.most_left and found.lost <= s.max_loss:
                choice.name = name
                return
        if not tried:
            raise UnsupportedModel(f"none of {', '.join(defenses)} runs on this network: {'; '.join(choice.notes)}")
        kept = [t for t in tried if t.lost <= s.max_loss]
        best = min(kept, key=lambda t: t.left) if kept else min(tried, key=lambda t: t.lost)
        choice.name = best.name
        choice.notes.append(
            f"no method left at most {s.most_left:.0%} of the canaries for at most {s.max_loss:.0%} of accuracy: "
            f"{best.name} left {best.left:.0%} for {best.lost:.1%}"
        )

    def _try(
        self, name: str, defense: Defense, carrier: nn.Module, taken: dict[Contamination, float], choice: _Choice
    ) -> _Tried | None:
        try:
            removal = defense(copy.deepcopy(carrier), self.rest, self.rng.child("trial"))
        except (UnsupportedModel, DataError, TrainingDiverged) as error:
            choice.notes.append(f"{name} could not be tried: {error}")
            return None
        choice.images += removal.trace.images
        left = statistics.fmean(self._success(removal.model, attack) - given for attack, given in taken.items())
        before, after = (measure(m, self.held_out).accuracy for m in (carrier, removal.model))
        return _Tried(name, left, before - after)

    @torch.no_grad()
    def _success(self, model: nn.Module, attack: Contamination) -> float:
        found = assess(model, self.held_out, attack=attack).asr
        return 0.0 if found is None else found.value
