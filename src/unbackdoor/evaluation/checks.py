"""Flags: reasons to distrust an evaluation or a result, and the one table that documents them.

Every check returns a :class:`Flag` or None. A *serious* flag means that the figures, or the model, should not be used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

import torch
from torch import Tensor, nn

from unbackdoor.errors import DataError
from unbackdoor.evaluation.assessment import Assessment, Rate
from unbackdoor.types import Samples

#: Below this ASR before the removal, there was no working backdoor to remove.
ATTACK_TOOK = 0.8
#: A network works that gains over guessing at least this share of what a network without a backdoor gains; half of it.
GAIN_OF_CLEAN = 0.5
#: Where no such network is at hand: of all that can be gained. Lower, for a hard task is no sign of a broken network.
GAIN_OF_ALL = 0.25
#: A 95% interval wider than this (in accuracy) tells too little.
WIDEST_INTERVAL = 0.10
#: A model is destroyed when its accuracy is surely below this share of what it was.
KEPT_SHARE = 0.8
#: Accuracy lost beyond this is worth a word of its own.
NOTABLE_LOSS = 0.05


@dataclass(frozen=True, slots=True)
class Flag:
    """One reason for distrust: its name in :data:`FLAGS`, what was found, and whether it is serious."""

    name: str
    message: str
    serious: bool


@dataclass(frozen=True, slots=True)
class Meaning:
    """The documentation of a flag."""

    raised_if: str
    means: str
    serious: bool


#: Every flag there is, in the order of the documentation.
FLAGS: dict[str, Meaning] = {
    "destroyed": Meaning(
        "the accuracy's upper 95% bound after is below 0.8 × the accuracy before, or the model came to answer one "
        "class only, or a weight or an output is not finite",
        "the removal broke the network; it must not be used",
        serious=True,
    ),
    "non_finite_weights": Meaning(
        "a weight or a buffer is NaN or infinite",
        "outputs are meaningless; training diverged or the checkpoint is damaged",
        serious=True,
    ),
    "accuracy_at_chance": Meaning(
        "the accuracy's lower 95% bound does not exceed what always answering one class would get",
        "the input format, the class order or the architecture is probably wrong, or the model never worked",
        serious=True,
    ),
    "outputs_differ_between_evaluations": Meaning(
        "two forward passes over the same samples differ by more than rounding",
        "the network is random in eval mode; no single figure describes it",
        serious=True,
    ),
    "attack_did_not_take": Meaning(
        "the attack success rate before the removal is below 80%",
        "there was no working backdoor of this kind, so a low rate afterwards shows nothing",
        serious=True,
    ),
    "measured_on_given_samples": Meaning(
        "there were too few clean samples to set a share aside, and no test set was given",
        "the accuracy afterwards was measured on samples that the defense trained on; it is optimistic",
        serious=False,
    ),
    "held_out_too_small": Meaning(
        "the 95% interval of an accuracy is wider than 10 points",
        "the accuracy is only roughly known; more labelled samples would tell",
        serious=False,
    ),
    "accuracy_fell": Meaning(
        "the accuracy fell by more than 5 points, without the model being destroyed",
        "the removal has a price; weigh it, or try another method or more clean samples",
        serious=False,
    ),
    "clean_set_smaller_than_classes": Meaning(
        "there are fewer clean samples than classes",
        "some classes cannot be represented; the network may forget them",
        serious=False,
    ),
    "missing_classes": Meaning(
        "a class has no clean sample",
        "the defense cannot relearn that class and the report cannot measure it",
        serious=False,
    ),
    "seed_spread_exceeds_difference": Meaning(
        "Welch's 95% interval of a difference of means over seeds contains zero",
        "the difference claimed may be luck; more seeds would tell",
        serious=False,
    ),
}


def _flag(name: str, message: str) -> Flag:
    return Flag(name, message, FLAGS[name].serious)


def attack_did_not_take(before: Rate) -> Flag | None:
    """``before`` is the attack success rate of the model as given."""
    if before.value >= ATTACK_TOOK:
        return None
    return _flag(
        "attack_did_not_take",
        f"the attack succeeded on {before.value:.1%} of {before.count} triggered samples before the removal; "
        f"a working backdoor has at least {ATTACK_TOOK:.0%}",
    )


def least_accuracy(num_classes: int, clean: float | None = None) -> float:
    """The accuracy in [0, 1] from which on an attacked network counts as one that works.

    A network that does not know its task obeys any trigger, and shows nothing by not obeying it afterwards; nor can a
    removal keep what was never there. So an attack that broke its network says as little about a defense as one that
    did not take. What counts is the gain over guessing, 1 / classes, so that one rule does for two classes and for a
    hundred.

    Args:
        clean: the accuracy of the same network, trained alike without the attack, where that is known. One that does
            not work itself is no measure.
    """
    guessing = 1 / num_classes
    alone = guessing + GAIN_OF_ALL * (1 - guessing)
    return alone if clean is None or clean < alone else guessing + GAIN_OF_CLEAN * (clean - guessing)


def accuracy_at_chance(found: Assessment) -> Flag | None:
    """Chance is what the best constant answer gets: the largest class's share, at least 1 / classes."""
    chance = max(1 / found.num_classes, found.majority_share())
    if found.accuracy.interval.low > chance:
        return None
    return _flag(
        "accuracy_at_chance",
        f"accuracy is {found.accuracy.value:.1%} of {found.count} samples (95% interval from "
        f"{found.accuracy.interval.low:.1%}); always answering one class would get {chance:.1%}",
    )


def non_finite_weights(model: nn.Module) -> Flag | None:
    """Parameters and buffers."""
    names = [
        name
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.isfinite().all()
    ]
    if not names:
        return None
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return _flag("non_finite_weights", f"not finite: {', '.join(names[:3])}{more}")


def outputs_differ_between_evaluations(first: Tensor, second: Tensor) -> Flag | None:
    """Logits (N, classes) of two passes over the same samples; rounding (1e-4 relative) is forgiven."""
    if first.shape == second.shape and torch.allclose(first, second, rtol=1e-4, atol=1e-5, equal_nan=True):
        return None
    if first.shape != second.shape:
        return _flag(
            "outputs_differ_between_evaluations", f"outputs were {tuple(first.shape)}, then {tuple(second.shape)}"
        )
    rows = int((~torch.isclose(first, second, rtol=1e-4, atol=1e-5, equal_nan=True)).any(1).sum())
    return _flag(
        "outputs_differ_between_evaluations",
        f"the outputs of {rows} of {len(first)} samples changed between two passes",
    )


def clean_set_smaller_than_classes(clean: Samples) -> Flag | None:
    """``clean`` is what the user gave."""
    if len(clean) >= clean.num_classes:
        return None
    return _flag(
        "clean_set_smaller_than_classes", f"{len(clean)} clean samples were given for {clean.num_classes} classes"
    )


def missing_classes(clean: Samples) -> Flag | None:
    """``clean`` is what the user gave."""
    absent = (clean.counts() == 0).nonzero()[:, 0].tolist()
    if not absent:
        return None
    shown = ", ".join(clean.class_names[c] if clean.class_names else str(c) for c in absent[:5])
    more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
    return _flag("missing_classes", f"{len(absent)} of {clean.num_classes} classes have no clean sample: {shown}{more}")


def held_out_too_small(found: Rate) -> Flag | None:
    """``found`` is an accuracy."""
    if found.interval.width <= WIDEST_INTERVAL:
        return None
    return _flag(
        "held_out_too_small",
        f"with {found.count} samples the accuracy is only known to lie between {found.interval.low:.1%} and "
        f"{found.interval.high:.1%} (95%)",
    )


def measured_on_given_samples(count: int) -> Flag:
    """Always a flag: the caller knows that nothing could be set aside of the ``count`` clean samples."""
    return _flag(
        "measured_on_given_samples",
        f"{count} clean samples are too few to set some aside: the accuracy afterwards is measured on samples that the "
        "defense has seen",
    )


def destroyed(before: Assessment, after: Assessment, model: nn.Module) -> Flag | None:
    """``before`` and ``after`` are of the same samples; ``model`` is the one after."""
    broken = non_finite_weights(model)
    if broken is not None:
        return _flag("destroyed", f"weights are {broken.message}")
    if after.non_finite:
        return _flag("destroyed", f"the outputs of {after.non_finite} of {after.count} samples are not finite")
    least = KEPT_SHARE * before.accuracy.value
    if after.accuracy.interval.high < least:
        return _flag(
            "destroyed",
            f"accuracy fell from {before.accuracy.value:.1%} to {after.accuracy.value:.1%} "
            f"(at most {after.accuracy.interval.high:.1%} with 95% confidence); at least {least:.1%} was to be kept",
        )
    answered = after.predicted_classes()
    # A model that knew one class only, or samples of one class, are no fault of the removal.
    if len(answered) == 1 < len(before.predicted_classes()) and after.accuracy.value < before.accuracy.value:
        return _flag("destroyed", f"the model answers class {min(answered)} to all {after.count} samples")
    return None


def accuracy_fell(before: Assessment, after: Assessment) -> Flag | None:
    """``before`` and ``after`` are of the same samples."""
    lost = before.accuracy.value - after.accuracy.value
    if lost <= NOTABLE_LOSS:
        return None
    return _flag(
        "accuracy_fell",
        f"accuracy fell by {100 * lost:.1f} points, from {before.accuracy.value:.1%} to {after.accuracy.value:.1%}",
    )


def seed_spread_exceeds_difference(first: Sequence[float], second: Sequence[float]) -> Flag | None:
    """Two methods' figures, one a seed each.

    Raises:
        DataError: fewer than two seeds on a side.
    """
    from scipy.special import stdtrit

    if len(first) < 2 or len(second) < 2:
        raise DataError(f"a spread needs at least 2 seeds on each side, not {len(first)} and {len(second)}")
    a, b = variance(first) / len(first), variance(second) / len(second)
    difference = fmean(first) - fmean(second)
    if a + b == 0:
        half = 0.0
    else:
        # Welch and Satterthwaite's degrees of freedom.
        freedom = (a + b) ** 2 / (a**2 / (len(first) - 1) + b**2 / (len(second) - 1))
        half = float(stdtrit(freedom, 0.975)) * (a + b) ** 0.5
    if abs(difference) > half:
        return None
    return _flag(
        "seed_spread_exceeds_difference",
        f"the means differ by {difference:.4g} ± {half:.2g} (95%) over {len(first)} and {len(second)} seeds",
    )


def flags_table() -> str:
    """:data:`FLAGS` as a Markdown table, for the documentation."""
    rows = [
        f"| `{name}` | {'yes' if meaning.serious else 'no'} | {meaning.raised_if} | {meaning.means} |"
        for name, meaning in FLAGS.items()
    ]
    return "\n".join(["| flag | serious | raised if | means |", "|---|---|---|---|", *rows]) + "\n"
