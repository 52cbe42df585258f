"""ULRL: unlearn to expose suspicious neurons, reset them, relearn while pushing them away from what they were.

Source: arXiv 2405.14781 and the authors' released v1 code. The preset "authors-v1" follows the release to the letter,
but for its second forward, which ``double_bn`` switches on; the general form scores any layers of any network.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbackdoor.augmentation import Augmentation
from unbackdoor.defenses.ascent import ascend
from unbackdoor.defenses.recovery import Recovery
from unbackdoor.defenses.steadiness import Steady, epochs_for, steady_lr
from unbackdoor.errors import ConfigError
from unbackdoor.models.attention_heads import AttentionHeads, attention_heads
from unbackdoor.models.surgery import UnitLayer, find_head, reset_units, unit_layers
from unbackdoor.rng import Rng
from unbackdoor.training import CrossEntropy, Objective, Recipe, Step, fit
from unbackdoor.types import Epoch, Phase, Removal, Samples, Trace, UnitScores

#: 1 / Φ⁻¹(3/4): makes the median absolute deviation a standard deviation for normal data.
MAD_TO_SIGMA = 1.4826


@dataclass(frozen=True, kw_only=True)
class ULRL:
    """ULRL, unlearn and relearn: gradient ascent shows which units are too sensitive; reset those and relearn.

    Maximise the loss on the clean samples for a moment: units that serve a backdoor move far more than the others. Go
    back to the given weights, reset the units that stood out, and relearn, with a term that pushes each of them away
    from what it was.

    Source: arXiv 2405.14781 (v1 May 2024, v2 June 2025), its abstracts and the authors' released code of v1, which
    ``authors-v1`` follows. The general form, which is the default, is ours.

    Deviations:

    - The release keeps at most two rows *of lowest index*, which favours class 0, the usual target of benchmarks.
      ``authors-v1`` does the same; by default there is no cap, and where one is stated (``cap=2``) the highest scores
      are kept (``by=score``).
    - The release runs a second forward pass in train mode after each relearning step, so that BatchNorm's statistics
      move twice: ``double_bn``, off by default and in the preset; ``ulrl(preset=authors-v1, double_bn=true)`` is the
      release with it.
    - torch's median takes the lower of the two middle values; a MAD of 0 needs a guard. In a layer of two units, such
      as the head of a two-class task, none is flagged: the lower middle makes the other one an outlier at any
      difference.
    - A relearning rate that would break the network at hand is lowered first, and an unlearning that diverges is run
      again at a tenth of its rate (``steady``, on by default, off in the preset).

    Costs: Two short trainings on the clean samples: at most ``unlearn_epochs`` of ascent, then about
    ``relearn_images`` images (in the preset 20 epochs).

    Fails:

    - In ``authors-v1``, two flagged rows at most cannot cover an all-to-all backdoor.
    - With ``layers=head``, a backdoor that lives before the last layer is only reached by the relearning, as
      fine-tuning would.
    - The row of the head that stands out is that of the class to which ascent sends most images, and this need not be
      the target. On scikit-learn's digits it is another one: the wrong row is reset, and ``authors-v1`` leaves the
      backdoor where it was. The general form resets units before the head as well and removes it.
    - Relearning for longer can bring the backdoor back: a fixed number of epochs means more steps on more samples.
    - An attacker who expects it can train so that all rows move alike under gradient ascent.

    Attributes:
        layers: "head", the classifier's rows (v1); "all", the output units of every linear and convolution layer.
        threshold: z above which a unit is flagged.
        cap: most units flagged in a layer, or None.
        by: which units the cap keeps: the highest "score" (ours) or the lowest "index" (the release, which favours
            class 0, the usual default target).
        unlearn_lr, unlearn_epochs, unlearn_stop: gradient ascent, until the epoch's running accuracy is at most
            ``unlearn_stop``.
        relearn_lr, relearn_epochs, alpha: SGD with a cosine schedule; alpha weighs the sum of signed cosines.
        relearn_clip: largest norm of relearning's gradient, or None (ours: distillation pulls hard at first).
        relearn_images: instead of ``relearn_epochs``, where above 0: as many epochs as pass about so many images, so
            that relearning means the same at every number of samples (ours).
        distill: weight, in relearning, of the divergence from the given network's outputs at temperature 2; 0 is off.
            Resetting units of every layer takes skill that few true labels cannot give back (ours).
        mix: blend each relearning batch with itself in another order, as SEAM's recovery does (ours).
        batch_size: images a step, in both phases.
        double_bn: a second train-mode forward after each relearning step, as the release runs it, so that BatchNorm's
            statistics move twice a batch.
        augment: "crop", or "crop-flip" where a flip preserves the label, or "none"; in both phases.
        steady: lower a learning rate that would break the network (ours).
    """

    layers: Literal["head", "all"] = "all"
    threshold: float = 3.5
    cap: int | None = None
    by: Literal["score", "index"] = "score"
    unlearn_lr: float = 0.01
    unlearn_epochs: int = 20
    unlearn_stop: float = 0.20
    relearn_lr: float = 0.05
    relearn_clip: float | None = 5.0
    relearn_epochs: int = 20
    relearn_images: int = 24_000
    alpha: float = 0.7
    distill: float = 0.5
    mix: bool = True
    batch_size: int = 32
    double_bn: bool = False
    augment: Augmentation = "crop"
    steady: bool = True
    VERSION: ClassVar[int] = 1
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "authors-v1": {
            "layers": "head",
            "threshold": 3.5,
            "cap": 2,
            "by": "index",
            "unlearn_lr": 0.01,
            "unlearn_epochs": 20,
            "unlearn_stop": 0.20,
            "relearn_lr": 0.005,
            "relearn_clip": None,
            "relearn_epochs": 20,
            "relearn_images": 0,
            "alpha": 0.7,
            "distill": 0.0,
            "mix": False,
            "batch_size": 128,
            "double_bn": False,
            "augment": "crop-flip",
            "steady": False,
        },
    }

    def __post_init__(self) -> None:
        if self.threshold <= 0:
            raise ConfigError(f"threshold must be > 0, not {self.threshold}")
        if self.cap is not None and self.cap < 1:
            raise ConfigError(f"cap must be None or at least 1, not {self.cap}")
        if self.distill < 0:
            raise ConfigError(f"distill must be at least 0, not {self.distill}")
        if not 0 <= self.unlearn_stop < 1:
            raise ConfigError(f"unlearn_stop must be in [0, 1), not {self.unlearn_stop}")

    def __call__(self, model: nn.Module, clean: Samples, rng: Rng) -> Removal:
        """See :class:`unbackdoor.types.Defense`.

        Raises:
            UnsupportedModel: ``layers="head"`` and no classification head was found, or there are no unit layers.
        """
        notes: list[str] = []
        names = [layer.name for layer in self._scored(model, clean)]
        unlearned, ascent = self._unlearn(model, clean, rng.child("unlearn"), notes)
        scores = [self.score(before, after) for before, after in _pairs(model, unlearned, names)]
        flagged = sum(len(s.flagged) for s in scores)
        if not flagged:
            notes.append("no unit was flagged: nothing is reset, and what follows is fine-tuning")
        cleaned, relearning, tried = self._relearn(model, clean, scores, rng.child("relearn"), notes)
        phases = (Phase("unlearn", tuple(ascent)), Phase("relearn", tuple(relearning)))
        values: dict[str, float | int | str | bool] = {
            "flagged units": flagged,
            "scored units": sum(len(s.scores) for s in scores),
            "unlearning epochs": len(ascent),
        }
        seen = [self._head_scores(layer, scores) for layer in attention_heads(model)]
        heads = tuple(layer for layer in seen if layer.scores)
        return Removal(cleaned, Trace(phases, tuple(scores), values, tuple(notes), tried, heads))

    def _scored(self, model: nn.Module, clean: Samples) -> list[UnitLayer]:
        return [find_head(model, clean)] if self.layers == "head" else unit_layers(model)

    def _unlearn(self, model: nn.Module, clean: Samples, rng: Rng, notes: list[str]) -> tuple[nn.Module, list[Epoch]]:
        """Phase 1: maximise the cross-entropy on a copy, which only serves to score."""
        recipe = Recipe(
            epochs=self.unlearn_epochs,
            batch_size=self.batch_size,
            lr=self.unlearn_lr,
            weight_decay=5e-4,
            schedule="multistep",
            milestones=(10, 20),
            clip_norm=20.0,
            augment=self.augment,
        )
        tries = 4 if self.steady else 1
        found = ascend(model, clean, recipe, rng, stop=self.unlearn_stop, tries=tries)
        notes.extend(found.notes)
        return found.model, found.epochs

    def score(self, before: UnitLayer, after: UnitLayer) -> UnitScores:
        """A layer's scores: s_i = Σ_j |W1_ij − W0_ij|, their median and MAD, z_i and the flagged set."""
        s = (after.rows() - before.rows()).detach().double().abs().sum(1).cpu()
        return self._standing_out(before.name, s, self.cap)

    def _head_scores(self, attention: AttentionHeads, scores: Sequence[UnitScores]) -> UnitScores:
        """How far each attention head moved: the sum over its rows of queries, keys and values. Ours; nothing is reset
        by it. Empty where those rows were not scored."""
        s = torch.zeros(attention.heads, dtype=torch.float64)
        rows = {layer.layer: torch.tensor(layer.scores, dtype=torch.float64) for layer in scores}
        layers = [(rows[name], parts) for name, parts in attention.layers if name in rows]
        for moved, parts in layers:
            s.index_add_(0, torch.tensor(attention.of_rows(len(moved), parts)), moved)
        return self._standing_out(attention.name, s if layers else s[:0], None)

    def _standing_out(self, name: str, s: Tensor, cap: int | None) -> UnitScores:
        """Median, MAD, z_i and the flagged set, at most ``cap`` of them, of the scores s (units)."""
        if not len(s):
            return UnitScores(name, (), 0.0, 0.0, (), ())
        median = s.median()  # torch's, the lower middle for an even count, as in the release
        mad = (s - median).abs().median()
        # Equal scores have no outliers; the guard keeps 0/0 and a lone deviation over 0 finite.
        scale = MAD_TO_SIGMA * mad if mad > 0 else torch.tensor(1e-12, dtype=torch.float64)
        z = (s - median).abs() / scale
        # Of two units one is always the lower middle and the other an outlier: two cannot be told apart so.
        outliers = [i for i in range(len(s)) if z[i] > self.threshold and s[i] > median] if len(s) > 2 else []
        if cap is not None and len(outliers) > cap:
            ranked = sorted(outliers, key=lambda i: -float(s[i])) if self.by == "score" else outliers
            outliers = sorted(ranked[:cap])
        return UnitScores(name, tuple(s.tolist()), median.item(), mad.item(), tuple(z.tolist()), tuple(outliers))

    def _relearn(
        self, model: nn.Module, clean: Samples, scores: list[UnitScores], rng: Rng, notes: list[str]
    ) -> tuple[nn.Module, list[Epoch], int]:
        """Phase 2, from the given weights again: reset the flagged units, then fit while pushing them away.

        Returns the network, its epochs, and the images that the test of the learning rate used.
        """
        cleaned = copy.deepcopy(model)
        layers = {layer.name: layer for layer in unit_layers(cleaned)}
        pushed: list[tuple[UnitLayer, Tensor, Tensor]] = []
        resets = rng.stream("reset")
        for found in scores:
            if found.flagged:
                layer = layers[found.layer]
                units = torch.tensor(found.flagged, device=layer.weight.device)
                pushed.append((layer, units, layer.rows()[units].detach().clone()))
                reset_units(layer, found.flagged, resets)
        recipe = Recipe(
            epochs=epochs_for(self.relearn_images, len(clean)) if self.relearn_images else self.relearn_epochs,
            batch_size=self.batch_size,
            lr=self.relearn_lr,
            schedule="epoch-cosine",
            clip_norm=self.relearn_clip,
            augment=self.augment,
        )

        def objective(stream: str) -> _Relearning:
            skill: Objective = CrossEntropy()
            if self.distill or self.mix:
                skill = Recovery(copy.deepcopy(model).eval(), self.distill, self.mix, rng.stream(stream))
            return _Relearning(skill, pushed, self.alpha)

        stands, minimised = Steady(self.relearn_lr, (), 0), objective("mix")
        if self.steady:
            stands = steady_lr(cleaned, clean, recipe, rng.child("steady"), objective=objective("steady-mix"))
            recipe, notes[:] = replace(recipe, lr=stands.lr), [*notes, *stands.notes]
        epochs = fit(
            cleaned,
            clean,
            recipe,
            rng.child("fit"),
            objective=minimised,
            after_step=minimised.second_forward if self.double_bn else None,
            name="relearn",
        )
        return cleaned, epochs, stands.images


def _pairs(model: nn.Module, changed: nn.Module, names: list[str]) -> list[tuple[UnitLayer, UnitLayer]]:
    before = {layer.name: layer for layer in unit_layers(model)}
    after = {layer.name: layer for layer in unit_layers(changed)}
    return [(before[name], after[name]) for name in names]


class _Relearning:
    """``skill`` + α · Σ cos(w_i, V_i) over the reset units: signed, so that the optimum points away; without biases."""

    def __init__(self, skill: Objective, pushed: list[tuple[UnitLayer, Tensor, Tensor]], alpha: float) -> None:
        self.skill, self.pushed, self.alpha = skill, pushed, alpha
        self.images: Tensor | None = None

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Step:
        self.images = x
        done = self.skill(model, x, y)
        if not self.pushed:
            return Step(done.loss, done.logits, {"cross_entropy": done.loss, **done.terms})
        parts = [F.cosine_similarity(layer.rows()[units].float(), old.float()) for layer, units, old in self.pushed]
        cosines = torch.cat(parts).sum()
        terms = {"cross_entropy": done.loss, **done.terms, "cosines": cosines}
        return Step(done.loss + self.alpha * cosines, done.logits, terms)

    def second_forward(self, model: nn.Module) -> None:
        assert self.images is not None
        with torch.no_grad():
            model(self.images)
