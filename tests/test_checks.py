"""Every flag is raised where it should be and stays down where it should not."""

import pytest
import torch
from scipy import stats
from torch import nn

from unbackdoor.errors import DataError
from unbackdoor.evaluation import checks
from unbackdoor.evaluation.assessment import Assessment, Rate
from unbackdoor.evaluation.verdict import judge
from unbackdoor.evaluation.weights import WeightChange
from unbackdoor.types import Samples


def found(confusion, asr=None, non_finite=0):
    """An assessment from a confusion matrix."""
    total = sum(map(sum, confusion)) + non_finite
    right = sum(row[i] for i, row in enumerate(confusion))
    cells = tuple((t, p, n) for t, row in enumerate(confusion) for p, n in enumerate(row) if n)
    per_class = tuple(row[i] / sum(row) if sum(row) else None for i, row in enumerate(confusion))
    rate = None if asr is None else Rate.of(asr, 100)
    return Assessment(Rate.of(right / total, total), 0.1, per_class, cells, non_finite, rate, rate)


def samples(labels, classes, names=()):
    return Samples(torch.zeros(len(labels), 1, 2, 2), torch.tensor(labels), classes, names)


GOOD, HALF, ONE = [[95, 5], [5, 95]], [[50, 50], [50, 50]], [[100, 0], [100, 0]]


def test_every_flag_is_in_the_table_and_in_the_documentation():
    table = checks.flags_table()
    assert table.count("\n") == len(checks.FLAGS) + 2
    for name, meaning in checks.FLAGS.items():
        assert callable(getattr(checks, name)), name
        assert f"| `{name}` | {'yes' if meaning.serious else 'no'} | {meaning.raised_if} |" in table


def test_attack_did_not_take():
    assert checks.attack_did_not_take(Rate.of(0.8, 100)) is None
    flag = checks.attack_did_not_take(Rate.of(0.79, 100))
    assert flag is not None
    assert flag.serious
    assert "79.0%" in flag.message


def test_accuracy_at_chance_knows_the_largest_class():
    assert checks.accuracy_at_chance(found(GOOD)) is None
    assert checks.accuracy_at_chance(found(HALF)) is not None
    # 90 % right sounds good; always answering class 0 gets the same.
    assert checks.accuracy_at_chance(found([[90, 0], [10, 0]])) is not None


def test_non_finite_weights_sees_buffers_too():
    model = nn.BatchNorm1d(3)
    assert checks.non_finite_weights(model) is None
    model.running_var[1] = torch.inf
    flag = checks.non_finite_weights(model)
    assert flag is not None
    assert "running_var" in flag.message


def test_outputs_differ_between_evaluations():
    logits = torch.randn(6, 3)
    assert checks.outputs_differ_between_evaluations(logits, logits + 1e-7) is None
    other = logits.clone()
    other[2] += 0.1
    flag = checks.outputs_differ_between_evaluations(logits, other)
    assert flag is not None
    assert "1 of 6" in flag.message


def test_clean_set_flags_name_what_is_missing():
    few = samples([0, 1], 3, ("ant", "bee", "<cat>"))
    assert checks.clean_set_smaller_than_classes(few) is not None
    flag = checks.missing_classes(few)
    assert flag is not None
    assert flag.message.endswith("<cat>")
    assert checks.clean_set_smaller_than_classes(samples([0, 1, 1], 3)) is None
    assert checks.missing_classes(samples([0, 1, 2], 3)) is None


@pytest.mark.parametrize(
    ("classes", "clean", "least"),
    [
        (10, None, 0.325),  # a quarter of the way from guessing to all
        (2, None, 0.625),
        (100, None, 0.2575),
        (10, 0.9, 0.5),  # half of what the clean network gains
        (2, 0.9, 0.7),
        (100, 0.41, 0.21),
        (10, 0.12, 0.325),  # a clean network that does not work either is no measure
    ],
)
def test_an_attacked_network_works_from_an_accuracy_on(classes, clean, least):
    assert checks.least_accuracy(classes, clean) == pytest.approx(least)


def test_held_out_too_small():
    assert checks.held_out_too_small(Rate.of(0.9, 2000)) is None
    assert checks.held_out_too_small(Rate.of(0.9, 50)) is not None


def test_destroyed_by_accuracy_needs_certainty():
    whole = nn.Linear(1, 1)
    assert checks.destroyed(found(GOOD), found(HALF), whole) is not None
    # 75 % is below 0.8 × 95 %, but of so few samples it may be luck.
    assert checks.destroyed(found([[19, 1], [1, 19]]), found([[15, 5], [5, 15]]), whole) is None
    assert checks.destroyed(found(GOOD), found(GOOD), whole) is None


def test_destroyed_by_answering_one_class():
    whole = nn.Linear(1, 1)
    flag = checks.destroyed(found([[3, 0], [0, 1]]), found([[3, 0], [1, 0]]), whole)
    assert flag is not None
    assert "class 0 to all 4" in flag.message
    # Samples of one class cannot show it, and a model that was so before was not made so.
    assert checks.destroyed(found([[4, 0], [0, 0]]), found([[4, 0], [0, 0]]), whole) is None
    assert checks.destroyed(found(ONE), found(ONE), whole) is None


def test_destroyed_by_numbers_that_are_none():
    broken = nn.Linear(1, 1)
    broken.weight.data.fill_(torch.nan)
    assert checks.destroyed(found(GOOD), found(GOOD), broken) is not None
    assert checks.destroyed(found(GOOD), found(GOOD, non_finite=1), nn.Linear(1, 1)) is not None


def test_accuracy_fell():
    assert checks.accuracy_fell(found(GOOD), found([[91, 9], [9, 91]])) is None
    flag = checks.accuracy_fell(found(GOOD), found([[85, 15], [15, 85]]))
    assert flag is not None
    assert "10.0 points" in flag.message


@pytest.mark.parametrize(
    ("first", "second"),
    [([0.9, 0.91, 0.92], [0.5, 0.52, 0.51]), ([0.9, 0.2, 0.5], [0.6, 0.7, 0.4]), ([0.9, 0.8], [0.7, 0.75, 0.72, 0.71])],
)
def test_seed_spread_is_welchs_interval(first, second):
    interval = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    contains_zero = interval.low <= 0 <= interval.high
    assert (checks.seed_spread_exceeds_difference(first, second) is not None) == contains_zero


def test_seed_spread_of_constant_and_of_single_values():
    assert checks.seed_spread_exceeds_difference([0.5, 0.5], [0.4, 0.4]) is None
    assert checks.seed_spread_exceeds_difference([0.5, 0.5], [0.5, 0.5]) is not None
    with pytest.raises(DataError, match="at least 2 seeds"):
        checks.seed_spread_exceeds_difference([0.5], [0.4, 0.3])


MOVED = (WeightChange("w", (1,), False, 0.1, 0.9),)
STILL = (WeightChange("w", (1,), False, 0.0, 1.0),)
CHANCE = (checks.Flag("accuracy_at_chance", "", True),)
BROKEN = (checks.Flag("destroyed", "", True),)


@pytest.mark.parametrize(
    ("before", "after", "flags", "changes", "verdict"),
    [
        (1.0, 0.02, (), MOVED, "cleaned"),
        (1.0, 0.2, (), MOVED, "backdoor_remains"),
        (0.05, 0.02, (), MOVED, "unproven"),
        (None, None, (), MOVED, "unproven"),
        (None, None, (), STILL, "unchanged"),
        (1.0, 0.02, CHANCE, MOVED, "unproven"),
        (1.0, 0.02, BROKEN, MOVED, "destroyed"),
        (1.0, 1.0, (), STILL, "unchanged"),
    ],
)
def test_verdict(before, after, flags, changes, verdict):
    assert judge(found(GOOD, before), found(GOOD, after), flags, changes) == verdict
