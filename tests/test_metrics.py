"""Metrics against scipy, scikit-learn and direct counting."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as reference

from unbackdoor.errors import ConfigError, DataError
from unbackdoor.evaluation import metrics

CLASSES = 5
RATE = st.floats(0, 1)


@st.composite
def answers(draw):
    """(predictions, labels) of 1 to 40 samples."""
    n = draw(st.integers(1, 40))
    column = st.lists(st.integers(0, CLASSES - 1), min_size=n, max_size=n)
    return torch.tensor(draw(column)), torch.tensor(draw(column))


@given(answers())
def test_accuracy_and_confusion_are_those_of_scikit_learn(pair):
    predictions, labels = pair
    assert metrics.accuracy(predictions, labels) == pytest.approx(reference.accuracy_score(labels, predictions))
    cells = metrics.confusion_matrix(predictions, labels, CLASSES)
    assert cells.tolist() == reference.confusion_matrix(labels, predictions, labels=range(CLASSES)).tolist()


@given(answers())
def test_per_class_accuracy_is_recall_and_nan_where_a_class_is_absent(pair):
    predictions, labels = pair
    found = metrics.per_class_accuracy(predictions, labels, CLASSES).numpy()
    wanted = reference.recall_score(labels, predictions, labels=range(CLASSES), average=None, zero_division=np.nan)
    absent = [c not in labels.tolist() for c in range(CLASSES)]
    assert np.isnan(found).tolist() == absent
    np.testing.assert_allclose(found[~np.array(absent)], wanted[~np.array(absent)])


@given(answers(), st.integers(0, CLASSES - 1))
def test_asr_and_ra_leave_out_the_attackers_own_class(pair, target):
    predictions, labels = pair
    rows = [(p, y) for p, y in zip(predictions.tolist(), labels.tolist(), strict=True) if y != target]
    wanted = torch.full_like(labels, target)
    if not rows:
        with pytest.raises(DataError, match="already have the label"):
            metrics.attack_success_rate(predictions, labels, wanted)
        return
    asr = metrics.attack_success_rate(predictions, labels, wanted)
    ra = metrics.robust_accuracy(predictions, labels, wanted)
    assert asr == pytest.approx(sum(p == target for p, _ in rows) / len(rows))
    assert ra == pytest.approx(sum(p == y for p, y in rows) / len(rows))
    assert asr + ra <= 1 + 1e-12


def test_no_answer_is_wrong_everywhere():
    predictions, labels = torch.tensor([-1, 1]), torch.tensor([0, 1])
    assert metrics.accuracy(predictions, labels) == 0.5
    assert metrics.confusion_matrix(predictions, labels, 2).tolist() == [[0, 0], [0, 1]]
    assert metrics.per_class_accuracy(predictions, labels, 2).tolist() == [0, 1]


@given(RATE, RATE, RATE, RATE)
def test_der_lies_between_its_bounds_and_rewards_a_lower_asr(acc_b, asr_b, acc_a, asr_a):
    found = metrics.der(acc_b, asr_b, acc_a, asr_a)
    assert 0 <= found <= 1
    assert metrics.der(acc_b, asr_b, acc_a, 0.0) >= found
    assert metrics.der(acc_b, asr_b, 1.0, asr_a) >= found
    assert metrics.der(acc_b, asr_b, acc_b, asr_b) == 0.5


def test_der_of_a_published_row():
    # (max(0, 97.5 - 15.3) - max(0, 92.1 - 91.7) + 100) / 2, by hand
    assert metrics.der(0.921, 0.975, 0.917, 0.153) == pytest.approx(0.909)
    assert metrics.der(0.9, 0.1, 0.95, 0.4) == 0.5  # a rise of both counts for nothing


def test_the_three_fidelities_differ():
    assert metrics.fidelity(0.9, 0.85, 0.05) == pytest.approx(0.8 / 0.9)
    assert metrics.fidelity_gap(0.85, 0.05) == pytest.approx(0.8)
    assert metrics.nist_fidelity(0.9, 0.85, 0.98, 0.05) == pytest.approx((0.93 / 0.98) * (0.85 / 0.9))
    assert metrics.nist_fidelity(0.9, 0.85) == pytest.approx(0.85 / 0.9)


def test_fidelities_without_a_denominator_are_nan():
    assert math.isnan(metrics.fidelity(0, 0.5, 0.1))
    assert math.isnan(metrics.nist_fidelity(0.9, 0.8, 0, 0))
    with pytest.raises(ConfigError, match="go together"):
        metrics.nist_fidelity(0.9, 0.8, 0.5)


@given(st.integers(1, 5000), st.data(), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_is_scipys(total, data, confidence):
    successes = data.draw(st.integers(0, total))
    found = metrics.wilson_interval(successes, total, confidence)
    wanted = stats.binomtest(successes, total).proportion_ci(confidence, method="wilson")
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-9)
    assert 0 <= found.low <= successes / total <= found.high <= 1


@given(st.lists(st.integers(0, 1000).map(lambda k: k / 1000), min_size=2, max_size=10))
def test_mean_interval_is_scipys(values):
    found = metrics.mean_interval(values)
    if len(set(values)) == 1:
        assert found.low == pytest.approx(values[0])
        assert found.width == pytest.approx(0, abs=1e-12)
        return
    wanted = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: metrics.accuracy(torch.zeros(2), torch.zeros(3)), DataError, r"\(2,\) and \(3,\)"),
        (lambda: metrics.accuracy(torch.zeros(0), torch.zeros(0)), DataError, "no samples"),
        (lambda: metrics.confusion_matrix(torch.tensor([7]), torch.tensor([0]), 3), DataError, "prediction 7"),
        (lambda: metrics.confusion_matrix(torch.tensor([0]), torch.tensor([-1]), 3), DataError, "label -1"),
        (lambda: metrics.der(1.2, 0, 0, 0), ConfigError, r"1\.2"),
        (lambda: metrics.fidelity_gap(math.nan, 0), ConfigError, "nan"),
        (lambda: metrics.wilson_interval(3, 2), ConfigError, "3 of 2"),
        (lambda: metrics.wilson_interval(0, 0), ConfigError, "0 of 0"),
        (lambda: metrics.wilson_interval(1, 2, 95), ConfigError, "95"),
        (lambda: metrics.mean_interval([0.5]), DataError, "at least 2"),
        (lambda: metrics.mean_interval([0.5, math.nan]), DataError, "finite"),
    ],
)
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()
