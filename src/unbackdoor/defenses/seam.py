"""SEAM, selective amnesia: forget both tasks on random labels, then recover the primary one on true labels.

Source: arXiv 2212.04687 and the authors' public code; the presets name which. The default is ours: it searches the
strongest recovery that keeps the skill on held-out clean samples. Nothing here sees a test set, a trigger or a target.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unbackdoor.augmentation import Augmentation
from unbackdoor.defenses.recovery import Recovery
from unbackdoor.defenses.steadiness import epochs_for
from unbackdoor.errors import ConfigError, TrainingDiverged
from unbackdoor.inference import Fit, measure, predict
from unbackdoor.rng import Rng
from unbackdoor.training import BatchHook, EndOfEpoch, Optimizer, Recipe, Schedule, batch_starts, fit, lr_factor
from unbackdoor.types import Epoch, Phase, Removal, Samples, Trace


@dataclass(frozen=True, kw_only=True)
class SEAM:
    """SEAM, selective amnesia: forget on wrong labels, recover on the true ones, and let fade what clean images never
    use.

    Train on clean images with random wrong labels until the network has forgotten its task, and the backdoor with it.
    Then train on the true labels: the task comes back, the backdoor has nothing that would bring it back. Neither the
    trigger nor the target has to be known.

    Source: Zhu et al., "Selective Amnesia: On Efficient, High-Fidelity and Blind Suppression of Backdoor Effects in
    Trojaned Machine Learning Models", IEEE S&P 2023, arXiv 2212.04687: its abstract and the authors' public code. The
    default is ours from its second step on; the presets name what they follow.

    Deviations:

    - The default's recovery mixes images, learns from the given network's outputs, lets weights fade, and chooses its
      strength on held-out clean samples; the paper recovers by training on the true labels and nothing else.
    - The authors' code stops on *test* accuracy, and reports the epoch with the best difference of accuracy and attack
      success under the true trigger. Here a stop rule reads held-out clean samples, or training samples where a preset
      says so, and no epoch is chosen with knowledge of the trigger.
    - With two classes, 2/C is 1, which is no limit at all: in the default, accuracy has to fall below 0.6 and the loss
      has to reach 0.95 · ln 2, nearly that of guessing. And a label that is always wrong would be a fixed flip, which
      teaches the inverse of the task instead of forgetting it: labels are drawn from both classes there.
    - On texts, where none of ``forget_lr``, ``recover_lrs``, ``recover_images`` and ``shrinks`` is stated, they are
      2e-4, (1e-4, 5e-4, 2e-3), 6000 and (0.25, 1): a pretrained transformer does not come back from what suits a
      network of images. The trace says so.

    Costs: The default is three short recoveries, one or two of full length, and the refit, each with its own
    forgetting; a preset is one. Accuracy after recovery depends on the number of samples: what was forgotten and is not
    in the clean samples stays forgotten, and what they exercise too rarely fades like a backdoor.

    Fails:

    - A backdoor that lives in weights which clean images use as well does not fade.
    - A shrinkage is kept when the held-out samples do not show its price: with a few dozen of them, one standard error
      is several points.
    - Words that the clean texts do not hold fade with the trigger's: in a network that learned its words from nothing,
      a rare word's backdoor goes only as far as other rare words may go.
    - Triggered images among the clean samples bring the backdoor back: recovery and distillation both teach it.
    - An attacker who expects it can tie the backdoor to the features of the task (entangled watermarks, soft nearest
      neighbours).

    Attributes:
        held_out: share of the clean samples, by class, on which the stop rules and the choice of strength look.
        wrong_label: "not-true", uniform over the other classes; "any", uniform over all. Redrawn for every batch. With
            two classes "not-true" would be a fixed flip, which teaches the inverse of the task instead of forgetting
            it; there "any" is used in its place, and the trace says so.
        forget_share: share of the samples used to forget, drawn by class and at least one a class; 1 is all of them.
        forget_per_class: instead, so many a class, drawn with replacement; 0 is off.
        forget_most: samples used to forget, at most, drawn by class and at least one a class; 0 is no limit. The stop
            rule looks after each epoch: over thousands of samples one epoch goes far past it, to where small networks
            without normalisation do not come back from (ours).
        forget_optimizer, forget_lr, forget_weight_decay, forget_epochs: the forgetting's training.
        forget_stop: stop after an epoch whose accuracy is below "chance", min(2/C, 0.6), with two classes also a loss
            of at least 0.95 · ln 2; "2/C"; "half", 0.5; or "never".
        forget_stop_on: where that accuracy is measured, on the "held-out" samples or the "forget-set" itself.
        forget_patience: how many epochs must have been below before it stops.
        recover_optimizer, recover_betas, recover_weight_decay, recover_schedule: the recovery's training.
        recover_epochs: epochs at most.
        recover_images: instead, where above 0: as many epochs as pass about so many images, so that a recovery means
            the same at every number of samples (at most 300 epochs).
        recover_stop: "plateau", ten epochs without a better held-out loss; "credits", the authors' rule,
            ``recover_credits`` of which one is lost per epoch with accuracy above ``recover_target``, or after epoch 50
            with accuracy more than 0.001 below the best; or "never".
        recover_target, recover_credits: of "credits": the accuracy, in [0, 1], and the number of credits.
        recover_stop_on: where that accuracy is measured: "held-out", "recover-set", or "running" (train mode, over the
            epoch).
        distill: weight of the recovery's second term, the divergence from the given network's outputs on the same
            clean batch at temperature 2; 0 is off. It carries the skill back: no triggered input is among them.
        mix: blend the batch with itself in another order (mixup, uniform weights), images and labels alike, so that few
            samples show the given network's function at many more places.
        recover_lrs: learning rates to choose from by short recoveries, whose skill on the held-out samples decides. A
            single one is not searched.
        shrinks: how far decoupled weight decay shrinks, over a whole recovery, every weight that the recovery does not
            hold against it: by exp(−shrink). What the clean samples never exercise fades, the backdoor with it. The
            search starts at the middle one (of an even number, the upper) and goes up while the held-out accuracy stays
            within ``tolerance`` plus one standard error of the best and the loss against the given network within
            ``max_loss``; where more is lost at the start, it goes down until less is, and keeps what lost least. A
            single one is not searched; without any, ``recover_weight_decay`` holds.
        tolerance: held-out accuracy, in [0, 1], that the next shrinkage may cost against the best so far.
        max_loss: held-out accuracy, in [0, 1], that the removal may cost before less is tried. It is a wish: where even
            the least shrinkage costs more, what costs least is kept. More lets more of a stubborn backdoor be removed.
        refit: run the chosen strength once more with the held-out samples joined to the others.
        step_cap: see :class:`unbackdoor.training.Recipe`.
        batch_size: images a step, in both phases.
        augment: "crop", "crop-flip" where a flip preserves the label, or "none"; in both phases.
    """

    held_out: float = 0.2
    wrong_label: Literal["not-true", "any"] = "not-true"
    forget_share: float = 1.0
    forget_per_class: int = 0
    forget_most: int = 600
    forget_optimizer: Optimizer = "adamw"
    forget_lr: float = 1e-3
    forget_weight_decay: float = 0.0
    forget_epochs: int = 30
    forget_stop: Literal["chance", "2/C", "half", "never"] = "chance"
    forget_stop_on: Literal["held-out", "forget-set"] = "held-out"
    forget_patience: int = 1
    recover_optimizer: Optimizer = "adamw"
    recover_betas: tuple[float, float] = (0.9, 0.999)
    recover_lrs: tuple[float, ...] = (5e-4, 2e-3, 8e-3)
    recover_weight_decay: float = 0.0
    recover_schedule: Schedule = "one-cycle"
    recover_epochs: int = 40
    recover_images: int = 24_000
    recover_stop: Literal["plateau", "credits", "never"] = "never"
    recover_stop_on: Literal["held-out", "recover-set", "running"] = "held-out"
    recover_target: float = 1.0
    recover_credits: int = 1
    distill: float = 0.5
    mix: bool = True
    shrinks: tuple[float, ...] = (0.25, 2.0, 4.0)
    tolerance: float = 0.01
    max_loss: float = 0.05
    refit: bool = True
    step_cap: float | None = 0.5
    batch_size: int = 32
    augment: Augmentation = "crop"
    VERSION: ClassVar[int] = 2  # 1 forgot on all samples, however many

    #: What every fixed recipe has in common: one strength, no distillation, no step cap.
    _PLAIN: ClassVar[dict[str, Any]] = {
        "forget_most": 0,
        "forget_optimizer": "adam",
        "recover_optimizer": "adam",
        "recover_weight_decay": 0.0,
        "recover_schedule": "constant",
        "recover_images": 0,
        "distill": 0.0,
        "mix": False,
        "shrinks": (),
        "refit": False,
        "step_cap": None,
        "augment": "none",
    }
    _TROJAI: ClassVar[dict[str, Any]] = {
        **_PLAIN,
        "wrong_label": "any",
        "forget_lr": 5e-4,
        "forget_weight_decay": 5e-4,
        "forget_epochs": 300,
        "forget_stop": "2/C",
        "forget_patience": 10,
        "recover_betas": (0.9, 0.5),
        "recover_lrs": (5e-4,),
        "recover_weight_decay": 5e-5,
        "recover_epochs": 300,
        "recover_stop": "credits",
        "recover_target": 0.99,
        "recover_credits": 10,
    }
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "plain": {
            **_PLAIN,
            "recover_lrs": (1e-3,),
            "recover_epochs": 100,
            "recover_stop": "plateau",
            "augment": "crop",
        },
        "authors-cifar10": {
            **_PLAIN,
            "forget_per_class": 5,
            "forget_lr": 3e-5,
            "forget_weight_decay": 5e-5,
            "forget_epochs": 300,
            "forget_stop": "2/C",
            "recover_betas": (0.5, 0.9),
            "recover_lrs": (5e-4,),
            "recover_weight_decay": 5e-5,
            "recover_epochs": 300,
            "recover_stop": "credits",
            "recover_target": 0.92,
            "recover_credits": 10,
        },
        "authors-trojai-image": _TROJAI,
        # For a head over features: the authors freeze the embedding and compute it once. Else as for images.
        "authors-trojai-text": _TROJAI,
        "authors-2022-08": {
            **_PLAIN,
            "wrong_label": "any",
            "forget_share": 0.01,
            "forget_optimizer": "sgd",
            "forget_lr": 1e-2,
            "forget_weight_decay": 5e-4,
            "forget_epochs": 3,
            "forget_stop": "half",
            "recover_optimizer": "sgd",
            "recover_lrs": (1e-3,),
            "recover_epochs": 10,
            "recover_stop": "credits",
            "recover_stop_on": "running",
            "recover_target": 0.9,
        },
        "toolbox": {
            **_PLAIN,
            "forget_share": 0.1,
            "forget_lr": 1e-3,
            "forget_epochs": 10,
            "forget_stop_on": "forget-set",
            "recover_lrs": (1e-3,),
            "recover_epochs": 100,
            "recover_stop": "credits",
            "recover_stop_on": "recover-set",
            "recover_target": 0.97,
        },
    }

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out must lie between 0 and 1, not {self.held_out}")
        if not 0 < self.forget_share <= 1:
            raise ConfigError(f"forget_share must be in (0, 1], not {self.forget_share}")
        if not self.recover_lrs or min(self.recover_lrs) <= 0:
            raise ConfigError(f"recover_lrs must be one or more numbers > 0, not {self.recover_lrs}")
        if self.shrinks and (min(self.shrinks) <= 0 or self.recover_optimizer != "adamw"):
            raise ConfigError(f"shrinks must be numbers > 0 and need recover_optimizer=adamw, not {self.shrinks}")
        if self.forget_most < 0:
            raise ConfigError(f"forget_most must be 0 (no limit) or more, not {self.forget_most}")
        if self.forget_patience < 1 or self.recover_credits < 1:
            raise ConfigError("forget_patience and recover_credits must be at least 1")
        for name in ("distill", "tolerance", "max_loss"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, not {getattr(self, name)}")

    def __call__(self, model: nn.Module, clean: Samples, rng: Rng) -> Removal:
        """See :class:`unbackdoor.types.Defense`."""
        return _Amnesia(self.suited(clean), model, clean, rng).run()

    #: What the default takes for texts.
    TEXTS: ClassVar[dict[str, Any]] = {
        "forget_lr": 2e-4,
        "recover_lrs": (1e-4, 5e-4, 2e-3),
        "recover_images": 6000,
        "shrinks": (0.25, 1.0),
    }

    def suited(self, clean: Samples) -> SEAM:
        """These settings, or for texts, where none of ``TEXTS`` was stated, the same with these."""
        usual = all(getattr(self, f.name) == f.default for f in fields(self) if f.name in self.TEXTS)
        return replace(self, **self.TEXTS) if clean.kind == "text" and usual else self


@dataclass(frozen=True)
class _Strength:
    """How a recovery is driven: its learning rate, and the shrinkage that its decay amounts to (None: no such rule)."""

    lr: float
    shrink: float | None

    def __str__(self) -> str:
        return f"lr {self.lr:g}" + ("" if self.shrink is None else f", shrink {self.shrink:g}")


@dataclass(frozen=True)
class _Trial:
    """One recovery: the model, its phases, and how it does on the held-out samples."""

    strength: _Strength
    model: nn.Module
    phases: tuple[Phase, ...]
    probability: Tensor  # (n,) of the true class
    right: Tensor  # (n,) 0 or 1

    @property
    def skill(self) -> float:
        return self.probability.mean().item()

    @property
    def accuracy(self) -> float:
        return self.right.mean().item()


class _Amnesia:
    """One run: what the settings, the given model, the samples and the generator make of each other."""

    def __init__(self, settings: SEAM, model: nn.Module, clean: Samples, rng: Rng) -> None:
        self.settings, self.given, self.rng = settings, model, rng
        self.notes: list[str] = []
        self.tried: list[_Strength] = []
        self.images = 0
        if clean.kind == "text" and all(getattr(settings, k) == v for k, v in settings.TEXTS.items()):
            told = ", ".join(f"{key} {value}" for key, value in settings.TEXTS.items())
            self._note(f"texts: {told}")
        rest, held_out = clean.split(settings.held_out, rng.stream("held-out"))
        if held_out is None:
            self._note("no class has two samples: nothing could be held out, the rules look at the training samples")
        self.clean, self.rest, self.watched = clean, rest, held_out or rest
        self.teacher = copy.deepcopy(model).eval()
        self.before = measure(model, self.watched)
        self.classes = clean.num_classes
        self.wrong_label = settings.wrong_label
        if self.classes == 2 and self.wrong_label == "not-true":
            self.wrong_label = "any"
            self._note("two classes: random labels are drawn from both, since a fixed flip would not be forgetting")

    def run(self) -> Removal:
        chosen = self._search()
        phases, model = chosen.phases, chosen.model
        searched = "; ".join(str(strength) for strength in self.tried)
        if self.settings.refit and len(self.rest) < len(self.clean):
            # The same generators: the refit differs from the trial by the samples that join, and by nothing else.
            again = self._trial(chosen.strength, self.clean, "all samples")
            if again is not None and self._holds(again, chosen):
                model, phases = again.model, (*phases, *again.phases)
            else:
                self._note("training on all samples lost what the trial had kept: the trial's network is returned")
        values: dict[str, float | int | str | bool] = {
            "recovery": str(chosen.strength),
            "recoveries tried": searched,
            "held-out samples": len(self.watched),
            "held-out accuracy before": self.before.accuracy,
            "held-out accuracy of the chosen recovery": chosen.accuracy,
        }
        shown = sum(e.images for p in phases for e in p.epochs)
        return Removal(model, Trace(phases, (), values, tuple(self.notes), self.images - shown))

    def _search(self) -> _Trial:
        """The learning rate that recovers best, then the largest shrinkage that keeps the accuracy."""
        shrinks = sorted(self.settings.shrinks)
        start = len(shrinks) // 2
        lr, *others = self._lrs(shrinks[start] if shrinks else None)
        if not shrinks:
            chosen = self._trial(_Strength(lr, None), self.rest, "")
            if chosen is None:
                raise TrainingDiverged(f"SEAM diverged at learning rate {lr:g}; a smaller one would be right")
            return chosen

        def attempt(index: int) -> _Trial | None:
            return self._trial(_Strength(lr, shrinks[index]), self.rest, f"shrink {shrinks[index]:g}")

        chosen = best = attempt(start)
        for index in range(start + 1, len(shrinks)):
            if best is None or chosen is None or self._costs_much(chosen):
                break
            stronger = attempt(index)
            if stronger is None or self._costs_much(stronger) or not self._holds(stronger, best):
                break
            chosen, best = stronger, max(stronger, best, key=lambda t: t.accuracy)
        for index in reversed(range(start)):
            if chosen is not None and not self._costs_much(chosen):
                break
            weaker = attempt(index)
            if chosen is None or (weaker is not None and weaker.accuracy > chosen.accuracy):
                chosen = weaker
        for other in others:
            if chosen is not None and not self._broken(chosen):
                break
            self._note(f"the recovery at learning rate {lr:g} broke the network: other learning rates were tried")
            gentle = self._trial(_Strength(other, shrinks[0]), self.rest, f"retreat, lr {other:g}")
            if chosen is None or (gentle is not None and gentle.accuracy > chosen.accuracy):
                chosen = gentle
        if chosen is None:
            raise TrainingDiverged(f"SEAM diverged at every shrinkage ({', '.join(f'{s:g}' for s in shrinks)})")
        if self._broken(chosen):
            self._note("no recovery brought the network back: what is returned has lost more than half of its accuracy")
        return chosen

    def _lrs(self, shrink: float | None) -> list[float]:
        """The learning rates, that one first whose short recovery (a third of the length) keeps most skill."""
        lrs = sorted(self.settings.recover_lrs)
        if len(lrs) == 1:
            return lrs
        trials = [self._trial(_Strength(lr, shrink), self.rest, f"short, lr {lr:g}", length=1 / 3) for lr in lrs]
        kept = [trial for trial in trials if trial is not None]
        if not kept:
            raise TrainingDiverged(f"SEAM diverged at every learning rate ({', '.join(f'{lr:g}' for lr in lrs)})")
        return [trial.strength.lr for trial in sorted(kept, key=lambda t: -t.skill)]

    def _broken(self, trial: _Trial) -> bool:
        return trial.accuracy < self.before.accuracy / 2

    def _holds(self, trial: _Trial, best: _Trial) -> bool:
        """Whether ``trial`` is as accurate as ``best`` but for the tolerance and one standard error of the pairs."""
        lost = best.right - trial.right
        error = lost.std().item() / math.sqrt(len(lost)) if len(lost) > 1 else 0.0
        return lost.mean().item() <= self.settings.tolerance + error

    def _costs_much(self, trial: _Trial) -> bool:
        """Whether to go no further up, and have a look further down: more than ``max_loss`` is gone."""
        return self.before.accuracy - trial.accuracy > self.settings.max_loss

    def _trial(self, strength: _Strength, samples: Samples, name: str, length: float = 1.0) -> _Trial | None:
        model = copy.deepcopy(self.given)
        self.tried.append(strength)
        label = f" ({name})" if name else ""
        try:
            forgotten = self._forget(model, samples, f"forget{label}")
            recovered = self._recover(model, samples, strength, f"recover{label}", length)
        except TrainingDiverged as error:
            self._note(f"{strength}: {error}")
            return None
        phases = (Phase(f"forget{label}", tuple(forgotten)), Phase(f"recover{label}", tuple(recovered)))
        self.images += sum(e.images for p in phases for e in p.epochs)
        probabilities = predict(model, self.watched, precision="auto").softmax(1).cpu().double()
        labels = self.watched.labels.cpu()
        right = (probabilities.argmax(1) == labels).double()
        return _Trial(strength, model, phases, probabilities.gather(1, labels[:, None])[:, 0], right)

    def _forget(self, model: nn.Module, samples: Samples, name: str) -> list[Epoch]:
        s = self.settings
        chosen = self._forget_set(samples)
        recipe = Recipe(
            epochs=s.forget_epochs,
            batch_size=s.batch_size,
            optimizer=s.forget_optimizer,
            lr=s.forget_lr,
            weight_decay=s.forget_weight_decay,
            step_cap=s.step_cap,
            augment=s.augment,
        )
        looked_at = self._watched(samples) if s.forget_stop_on == "held-out" else ("forget_set", chosen)
        until = _Forgotten(s.forget_stop, self.classes, *looked_at, s.forget_patience)
        law = redraw_labels(self.classes, self.wrong_label)
        epochs = fit(model, chosen, recipe, self.rng.child("forget"), batch=law, until=until, name=name)
        if until.below < until.patience and s.forget_stop != "never":
            self._note(f"forgetting ended after {len(epochs)} epochs without reaching its stop rule ({s.forget_stop})")
        return epochs

    def _forget_set(self, samples: Samples) -> Samples:
        s, generator = self.settings, self.rng.stream("forget-set")
        labels = samples.labels.cpu()
        if s.forget_per_class:
            present = [(labels == c).nonzero()[:, 0] for c in torch.unique(labels).tolist()]
            draws = [m[torch.randint(len(m), (s.forget_per_class,), generator=generator)] for m in present]
            return samples.select(torch.cat(draws))
        share = min(s.forget_share, s.forget_most / len(labels)) if s.forget_most else s.forget_share
        if share == 1:
            return samples
        order = torch.randperm(len(labels), generator=generator)
        members = [order[labels[order] == c] for c in torch.unique(labels).tolist()]
        return samples.select(torch.cat([m[: max(1, round(share * len(m)))] for m in members]).sort().values)

    def _recover(
        self, model: nn.Module, samples: Samples, strength: _Strength, name: str, length: float
    ) -> list[Epoch]:
        s = self.settings
        full = s.recover_images or s.recover_epochs * len(samples)
        recipe = Recipe(
            epochs=epochs_for(full * length, len(samples)),
            batch_size=s.batch_size,
            optimizer=s.recover_optimizer,
            betas=s.recover_betas,
            lr=strength.lr,
            weight_decay=s.recover_weight_decay,
            schedule=s.recover_schedule,
            step_cap=s.step_cap,
            augment=s.augment,
        )
        if strength.shrink is not None:
            recipe = replace(recipe, weight_decay=strength.shrink / summed_lr(recipe, len(samples)))
        looked_at = {
            "held-out": self._watched(samples),
            "recover-set": ("recover_set", samples),
            "running": ("running", None),
        }[s.recover_stop_on]
        rng = self.rng.child("recover")
        objective = Recovery(self.teacher, s.distill, s.mix, rng.stream("mix")) if s.distill or s.mix else None
        return fit(model, samples, recipe, rng, objective=objective, until=_Recovered(s, *looked_at), name=name)

    def _watched(self, trained_on: Samples) -> tuple[str, Samples]:
        """What a "held-out" rule looks at, and its name: in the refit, and where none could be spared, another."""
        return "training" if trained_on is self.clean else "held_out", self.watched

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def redraw_labels(classes: int, law: Literal["not-true", "any"]) -> BatchHook:
    """A batch hook that draws every label anew: uniform over the other classes, or over all of them."""

    def redraw(x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if law == "any":
            return x, torch.randint(0, classes, y.shape, generator=generator).to(y.device)
        shift = torch.randint(1, classes, y.shape, generator=generator).to(y.device)
        return x, (y + shift) % classes

    return redraw


def summed_lr(recipe: Recipe, samples: int) -> float:
    """Σ of the learning rate over all steps: decoupled decay w shrinks an idle weight by about exp(−w · Σ lr)."""
    steps = len(batch_starts(samples, recipe.batch_size)) - 1
    return recipe.lr * sum(lr_factor(recipe, e, k, steps) for e in range(recipe.epochs) for k in range(steps))


class _Forgotten:
    """The forgetting's stop rule; counts the epochs that were below."""

    def __init__(self, rule: str, classes: int, name: str, samples: Samples, patience: int) -> None:
        self.name, self.samples, self.patience, self.below = name, samples, patience, 0
        self.accuracy = {"chance": min(2 / classes, 0.6), "2/C": 2 / classes, "half": 0.5, "never": -1.0}[rule]
        # With two classes the accuracy rule is met by a network that has hardly begun to forget.
        self.loss = 0.95 * math.log(2) if rule == "chance" and classes == 2 else -math.inf

    def __call__(self, model: nn.Module, epoch: EndOfEpoch) -> bool:
        now = measure(model, self.samples)
        epoch.measured.update({f"{self.name}_accuracy": now.accuracy, f"{self.name}_loss": now.loss})
        self.below += now.accuracy < self.accuracy and now.loss >= self.loss
        return self.below >= self.patience


class _Recovered:
    """The recovery's stop rule."""

    #: Epochs without a better held-out loss after which "plateau" stops.
    PATIENCE = 10
    #: From this epoch on the authors' rule also takes a credit for an accuracy below the best.
    LATE, DROP = 50, 1e-3

    def __init__(self, settings: SEAM, name: str, samples: Samples | None) -> None:
        self.settings, self.name, self.samples = settings, name, samples
        self.credits = settings.recover_credits
        self.best_accuracy, self.best_loss, self.stale = 0.0, math.inf, 0

    def __call__(self, model: nn.Module, epoch: EndOfEpoch) -> bool:
        if self.samples is None:
            now = Fit(epoch.loss, epoch.accuracy)
        else:
            now = measure(model, self.samples)
            epoch.measured.update({f"{self.name}_accuracy": now.accuracy, f"{self.name}_loss": now.loss})
        self.stale = 0 if now.loss < self.best_loss else self.stale + 1
        self.best_loss = min(self.best_loss, now.loss)
        self.best_accuracy = max(self.best_accuracy, now.accuracy)
        rule = self.settings.recover_stop
        if rule == "plateau":
            return self.stale >= self.PATIENCE
        if rule == "credits":
            late = epoch.index + 1 > self.LATE and now.accuracy < self.best_accuracy - self.DROP
            self.credits -= now.accuracy > self.settings.recover_target or late
            return self.credits <= 0
        return False
