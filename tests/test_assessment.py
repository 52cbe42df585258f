"""An assessment agrees with counting by hand, and does not touch the model."""

from dataclasses import dataclass

import pytest
import torch
from sklearn.metrics import confusion_matrix, log_loss
from torch import nn

from unbackdoor.errors import ConfigError, DataError
from unbackdoor.evaluation.assessment import assess
from unbackdoor.evaluation.weights import weight_changes
from unbackdoor.types import Samples


@dataclass(frozen=True, kw_only=True)
class Corner:
    """Sets the first pixel to one."""

    target: int = 0

    def plan(self, labels, num_classes, rng):
        return torch.arange(0)

    def trigger(self, x, /):
        x = x.clone()
        x[:, 0, 0, 0] = 1
        return x

    def relabel(self, labels, num_classes):
        return torch.full_like(labels, self.target)


class Backdoored(nn.Module):
    """Reads the class from pixel (0, 1) in steps of 0.25; class 0 when the first pixel is one."""

    def forward(self, x):
        classes = (x[:, 0, 0, 1] * 4).round().long()
        classes = torch.where(x[:, 0, 0, 0] == 1, 0, classes)
        return nn.functional.one_hot(classes.clamp(max=2), 3).float() * 5


def make(labels, shown):
    x = torch.zeros(len(labels), 1, 2, 2)
    x[:, 0, 0, 1] = torch.tensor(shown) / 4
    return Samples(x, torch.tensor(labels), 3)


def test_against_counting_by_hand():
    samples = make([0, 1, 2, 2, 1], [0, 1, 2, 1, 1])
    got = assess(Backdoored(), samples, attack=Corner())
    assert got.accuracy.value == 0.8
    assert got.per_class == (1.0, 1.0, 0.5)
    assert got.count == 5
    # Class 0's own sample is left out of both.
    assert (got.asr.value, got.asr.count, got.ra.value) == (1.0, 4, 0.0)
    assert got.accuracy.interval.low < 0.8 < got.accuracy.interval.high


def test_against_scikit_learn_on_a_random_network():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    inputs = torch.rand(700, 1, 2, 2, generator=generator)
    samples = Samples(inputs, torch.randint(0, 3, (700,), generator=generator), 3)
    got = assess(model, samples)
    with torch.no_grad():
        logits = model(samples.inputs)
    assert got.loss == pytest.approx(log_loss(samples.labels, logits.double().softmax(1), labels=range(3)), rel=1e-5)
    cells = torch.zeros(3, 3, dtype=torch.int64)
    for true, answer, count in got.confusion:
        cells[true, answer] = count
    assert cells.tolist() == confusion_matrix(samples.labels, logits.argmax(1)).tolist()
    assert got.asr is None
    assert got.majority_share() == samples.counts().max().item() / 700


def test_modes_are_left_alone_and_dropout_is_off():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(4, 3))
    model.train()
    model[1].eval()
    samples = Samples(torch.rand(50, 1, 2, 2), torch.randint(0, 3, (50,)), 3)
    assert assess(model, samples) == assess(model, samples)
    assert [m.training for m in model] == [True, False, True]


def test_non_finite_outputs_count_as_wrong():
    class Broken(nn.Module):
        def forward(self, x):
            logits = torch.zeros(len(x), 3)
            logits[0] = torch.nan
            return logits

    got = assess(Broken(), make([0, 0, 0, 1], [0, 0, 0, 0]))
    assert got.non_finite == 1
    assert got.accuracy.value == 0.5
    assert got.loss is None


def test_wrong_output_count_target_or_lone_class_is_an_error():
    samples = make([0, 1], [0, 1])
    with pytest.raises(DataError, match=r"\(2, 7\)"):
        assess(nn.Sequential(nn.Flatten(), nn.Linear(4, 7)), samples)
    with pytest.raises(ConfigError, match="target 9"):
        assess(Backdoored(), samples, attack=Corner(target=9))
    with pytest.raises(DataError, match="another class"):
        assess(Backdoored(), make([0, 0], [0, 0]), attack=Corner())


def test_weight_changes_against_numpy():
    before, after = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    changes = {c.name: c for c in weight_changes(before, after)}
    a, b = before[0].weight.detach().double().numpy().ravel(), after[0].weight.detach().double().numpy().ravel()
    got = changes["0.weight"]
    assert got.relative == pytest.approx(((a - b) ** 2).sum() ** 0.5 / (a**2).sum() ** 0.5)
    assert got.cosine == pytest.approx(a @ b / ((a @ a) * (b @ b)) ** 0.5)
    assert got.shape == (2, 3)
    assert [c.buffer for c in changes.values()] == [False, False, False, False, True, True]
    assert changes["1.running_mean"].relative == 0.0
    assert changes["1.running_mean"].cosine is None
    after[1].running_mean.fill_(1)
    after[0].weight.data[0, 0] = torch.nan
    changes = {c.name: c for c in weight_changes(before, after)}
    assert changes["1.running_mean"].relative is None
    assert changes["0.weight"].relative is None
    with pytest.raises(DataError, match="different tensors"):
        weight_changes(before, nn.Linear(3, 2))
