"""SEAM: its draws, stop rules, objective and search, each against what the description says."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import factories
from unbackdoor.defenses import seam as module
from unbackdoor.defenses.recovery import Recovery
from unbackdoor.defenses.seam import SEAM, redraw_labels, summed_lr
from unbackdoor.errors import ConfigError, TrainingDiverged
from unbackdoor.inference import Fit
from unbackdoor.rng import Rng
from unbackdoor.training import BatchHook, EndOfEpoch, Recipe, fit, lr_factor
from unbackdoor.types import Removal, Samples

QUICK: dict[str, Any] = {
    "forget_epochs": 2,
    "recover_images": 80,
    "recover_lrs": (1e-3,),
    "shrinks": (1.0,),
    "augment": "none",
}


def amnesia(clean: Samples | None = None, model: nn.Module | None = None, **settings: Any) -> module._Amnesia:
    return module._Amnesia(
        SEAM(**{**QUICK, **settings}), model or factories.linear(), clean or factories.samples(), Rng(0)
    )


def quick(clean: Samples | None = None, **settings: Any) -> Removal:
    clean = clean or factories.samples()
    return SEAM(**{**QUICK, **settings})(factories.linear(clean.num_classes), clean, Rng(0))


# Random labels


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_not_true_is_uniform_over_the_other_classes(classes: int) -> None:
    each = 6000
    y = torch.arange(classes).repeat_interleave(each)
    x = torch.zeros(len(y), 1)
    same_x, drawn = redraw_labels(classes, "not-true")(x, y, Rng(0).stream("draw"))
    assert same_x is x
    table = torch.zeros(classes, classes).index_put_((y, drawn), torch.ones(len(y)), accumulate=True)
    assert table.diagonal().sum() == 0
    _assert_uniform(table[~torch.eye(classes, dtype=torch.bool)].reshape(classes, classes - 1))


def test_any_is_uniform_over_all_classes() -> None:
    classes = 5
    y = torch.arange(classes).repeat_interleave(6000)
    _, drawn = redraw_labels(classes, "any")(torch.zeros(len(y), 1), y, Rng(0).stream("draw"))
    _assert_uniform(torch.zeros(classes, classes).index_put_((y, drawn), torch.ones(len(y)), accumulate=True))


def _assert_uniform(table: Tensor) -> None:
    """Chi-square of each row below its 1 - 1e-6 quantile, as Wilson and Hilferty approximate it."""
    expected = table.sum(1, keepdim=True) / table.shape[1]
    free = max(1, table.shape[1] - 1)
    part = 2 / (9 * free)
    assert ((table - expected).square() / expected).sum(1).max() <= free * (1 - part + 4.75 * math.sqrt(part)) ** 3


def test_labels_are_redrawn_for_every_batch() -> None:
    y, generator = torch.zeros(100, dtype=torch.int64), Rng(0).stream("draw")
    hook = redraw_labels(10, "not-true")
    assert not torch.equal(hook(torch.zeros(100), y, generator)[1], hook(torch.zeros(100), y, generator)[1])


def test_two_classes_draw_from_both_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    laws: list[str] = []

    def noted(classes: int, law: Any) -> BatchHook:
        laws.append(law)
        return redraw_labels(classes, law)

    monkeypatch.setattr(module, "redraw_labels", noted)
    assert any("two classes" in note for note in quick(factories.samples(20, 2)).trace.notes)
    assert set(laws) == {"any"}
    laws.clear()
    assert not any("two classes" in note for note in quick().trace.notes)
    assert set(laws) == {"not-true"}


# When forgetting stops


def forgetting(
    monkeypatch: pytest.MonkeyPatch, rule: str, classes: int, fits: Iterable[Fit], patience: int = 1
) -> list[bool]:
    fits = list(fits)
    given_fits = iter(fits)
    monkeypatch.setattr(module, "measure", lambda *_: next(given_fits))
    until = module._Forgotten(rule, classes, "held_out", factories.samples(), patience)
    ends = [EndOfEpoch(i, 0.0, 0.0) for i in range(len(fits))]
    stops = [until(nn.Identity(), end) for end in ends]
    assert [e.measured for e in ends] == [{"held_out_accuracy": f.accuracy, "held_out_loss": f.loss} for f in fits]
    return stops


@pytest.mark.parametrize(
    ("rule", "classes", "limit"),
    [("chance", 10, 0.2), ("chance", 3, 0.6), ("2/C", 10, 0.2), ("2/C", 3, 2 / 3), ("half", 10, 0.5), ("half", 2, 0.5)],
)
def test_forgetting_stops_strictly_below_its_limit(
    monkeypatch: pytest.MonkeyPatch, rule: str, classes: int, limit: float
) -> None:
    fits = [Fit(0.0, limit + 0.01), Fit(0.0, limit), Fit(0.0, limit - 0.01)]
    assert forgetting(monkeypatch, rule, classes, fits) == [False, False, True]


def test_never_does_not_stop_forgetting(monkeypatch: pytest.MonkeyPatch) -> None:
    assert forgetting(monkeypatch, "never", 10, [Fit(9.0, 0.0)] * 3) == [False] * 3


def test_patience_counts_the_epochs_below_in_a_row_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = [Fit(0.0, a) for a in (0.1, 0.9, 0.1, 0.9, 0.1)]
    assert forgetting(monkeypatch, "2/C", 10, fits, patience=3) == [False] * 4 + [True]


def test_two_classes_are_forgotten_by_loss_too(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 0.95 * math.log(2)
    fits = [Fit(limit - 0.01, 0.5), Fit(limit + 0.01, 0.7), Fit(limit + 0.01, 0.5)]
    assert forgetting(monkeypatch, "chance", 2, fits) == [False, False, True]
    assert forgetting(monkeypatch, "2/C", 2, [Fit(0.0, 0.99)]) == [True]


def test_a_forgetting_that_ends_too_early_is_noted() -> None:
    note = "without reaching its stop rule"
    clean = factories.samples()
    assert not any(note in n for n in quick(clean, forget_stop="never").trace.notes)
    network = factories.linear()  # has to know something that so small a learning rate does not take from it
    fit(network, clean, Recipe(epochs=20, lr=0.1, batch_size=16), Rng(1))
    removal = SEAM(**{**QUICK, "forget_lr": 1e-9, "held_out": 0.5})(network, clean, Rng(0))
    assert any(note in n for n in removal.trace.notes)


# When recovery stops


@given(
    st.lists(st.sampled_from([0.2, 0.5, 0.8, 0.8005, 0.802, 0.9, 0.93, 1.0]), min_size=1, max_size=90),
    st.sampled_from([0.4, 0.8, 0.92, 1.0]),
    st.integers(1, 12),
)
def test_credits_follow_the_authors_rule(accuracies: list[float], target: float, credit: int) -> None:
    until = module._Recovered(SEAM(recover_stop="credits", recover_target=target, recover_credits=credit), "", None)
    stops = [until(nn.Identity(), EndOfEpoch(i, 1.0, a)) for i, a in enumerate(accuracies)]
    spent = [
        a > target or (epoch > 50 and a < max(accuracies[:epoch]) - 1e-3) for epoch, a in enumerate(accuracies, start=1)
    ]
    assert stops == [sum(spent[:epoch]) >= credit for epoch in range(1, len(spent) + 1)]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60))
def test_plateau_is_ten_epochs_without_a_better_loss(losses: list[int]) -> None:
    until = module._Recovered(SEAM(recover_stop="plateau"), "", None)
    stops = [until(nn.Identity(), EndOfEpoch(i, float(loss), 0.0)) for i, loss in enumerate(losses)]
    for i, stop in enumerate(stops):
        best = losses.index(min(losses[: i + 1]))
        assert stop == (i - best >= 10)


def test_recovery_looks_where_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure", lambda *_: Fit(0.1, 0.95))
    settings = SEAM(recover_stop="credits", recover_target=0.9)
    end = EndOfEpoch(0, 3.0, 0.1)
    assert module._Recovered(settings, "held_out", factories.samples())(nn.Identity(), end)
    assert end.measured == {"held_out_accuracy": 0.95, "held_out_loss": 0.1}
    assert not module._Recovered(settings, "running", None)(nn.Identity(), end)
    assert not module._Recovered(replace(settings, recover_stop="never"), "", factories.samples())(nn.Identity(), end)


# The forget set


def test_so_many_a_class_are_drawn_with_replacement() -> None:
    clean = factories.samples(9, 4).select(torch.tensor([0, 1, 1, 1, 4, 5]))  # classes 0 and 1 alone
    chosen = amnesia(clean, forget_per_class=7)._forget_set(clean)
    assert chosen.counts().tolist() == [7, 7, 0, 0]


@pytest.mark.parametrize(("share", "counts"), [(0.1, [1, 1, 1, 1]), (0.5, [5, 5, 5, 1]), (1.0, [10, 10, 10, 1])])
def test_a_share_leaves_one_a_class_and_repeats_none(share: float, counts: list[int]) -> None:
    clean = factories.samples(40)
    clean = clean.select((clean.labels != 3) | (torch.arange(40) == 3))
    chosen = amnesia(clean, forget_share=share)._forget_set(clean)
    assert chosen.counts().tolist() == counts
    assert len({image.numpy().tobytes() for image in chosen.inputs}) == len(chosen)


@pytest.mark.parametrize(("most", "counts"), [(0, [10] * 4), (40, [10] * 4), (20, [5] * 4), (2, [1] * 4)])
def test_forgetting_takes_so_many_samples_at_most(most: int, counts: list[int]) -> None:
    clean = factories.samples(40)
    chosen = amnesia(clean, forget_most=most)._forget_set(clean)
    assert chosen.counts().tolist() == counts
    both = amnesia(clean, forget_most=20, forget_share=0.1)._forget_set(clean)
    assert both.counts().tolist() == [1] * 4  # the smaller of the two holds


# The objective


class _Seen(nn.Module):
    """Pools and classifies, and keeps what it was given."""

    def __init__(self, channels: int, classes: int, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, channels, generator=Rng(seed).stream("w")))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return x.mean((2, 3)) @ self.weight.T


def _divergence(teacher: Tensor, student: Tensor) -> float:
    """Mean over rows of Σ p log(p/q) at temperature 2, in double precision, times 4."""
    p, q = ((logits.double() / 2).exp() for logits in (teacher, student))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    return 4 * float((p * (p / q).log()).sum(1).mean())


def _cross_entropy(logits: Tensor, wanted: Tensor) -> float:
    p = logits.double().exp()
    return float(-(wanted * (p / p.sum(1, keepdim=True)).log()).sum(1).mean())


@pytest.mark.parametrize("weight", [0.0, 4.0])
@pytest.mark.parametrize("mix", [False, True])
def test_the_objective_is_what_it_says(weight: float, mix: bool) -> None:
    count, classes = 6, 3
    # Image i is lit in channel i alone, so the batch that the network saw shows the weights of the blend.
    x = torch.eye(count)[:, :, None, None].expand(-1, -1, 2, 2).contiguous()
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    student, teacher = _Seen(count, classes, 1), _Seen(count, classes, 2)
    step = Recovery(teacher, weight, mix, Rng(0).stream("mix"))(student, x, y)
    blend = student.seen[:, :, 0, 0].detach().double()
    torch.testing.assert_close(blend.sum(1), torch.ones(count, dtype=torch.float64))
    assert torch.equal(blend, torch.eye(count).double()) != mix
    wanted = blend @ nn.functional.one_hot(y, classes).double()
    entropy = _cross_entropy(step.logits.detach(), wanted)
    gap = _divergence(teacher(student.seen).detach(), step.logits.detach())
    assert step.loss.item() == pytest.approx(entropy + weight * gap, rel=1e-5)
    assert step.terms["cross_entropy"].item() == pytest.approx(entropy, rel=1e-5)
    assert ("distillation" in step.terms) == (weight > 0)
    step.loss.backward()  # type: ignore[no-untyped-call]
    assert student.weight.grad is not None
    assert student.weight.grad.abs().sum() > 0
    assert teacher.weight.grad is None


# Shrinking


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one-cycle"])
@pytest.mark.parametrize("count", [5, 33, 40])
def test_summed_lr_is_the_sum_over_the_steps(schedule: Any, count: int) -> None:
    recipe = Recipe(epochs=3, batch_size=8, lr=0.02, schedule=schedule)
    steps = {5: 1, 33: 4, 40: 5}[count]  # a lone last image joins the batch before it
    explicit = [0.02 * lr_factor(recipe, epoch, step, steps) for epoch in range(3) for step in range(steps)]
    assert summed_lr(recipe, count) == pytest.approx(sum(explicit))
    lrs = [e.lr for e in fit(factories.linear(), factories.samples(count), recipe, Rng(0))]
    assert lrs == pytest.approx([explicit[steps * (e + 1) - 1] for e in range(3)])


@pytest.mark.parametrize("shrink", [0.25, 1.0, 2.0])
@pytest.mark.parametrize("length", [1.0, 0.5])
@pytest.mark.parametrize(("cap", "scale"), [(None, 1.0), (0.5, 1.0), (0.5, 0.01)])
def test_an_idle_weight_shrinks_as_asked(shrink: float, length: float, cap: float | None, scale: float) -> None:
    clean = factories.samples()
    clean.inputs[:, :, 0, 7] = 0  # a pixel that is always dark
    model = factories.linear()
    with torch.no_grad():
        model[1].weight.mul_(scale)  # type: ignore[index]
    run = amnesia(clean, model, step_cap=cap, batch_size=4, recover_images=20 * len(clean))
    before = _of_pixel(model)
    run._recover(model, clean, module._Strength(0.004, shrink), "recover", length)
    torch.testing.assert_close(_of_pixel(model) / before, torch.full_like(before, math.exp(-shrink)), rtol=0.05, atol=0)


def _of_pixel(model: nn.Module) -> Tensor:
    weight: Tensor = model[1].weight  # type: ignore[index]
    return weight.detach().reshape(4, 3, 8, 8)[:, :, 0, 7].clone()


# The search


class _Searched:
    """A run whose recoveries have chosen accuracies: strength -> accuracy, or None where it diverges."""

    def __init__(self, before: float, accuracy: Callable[[module._Strength], float | None], **settings: Any) -> None:
        self.run = amnesia(**{"shrinks": (0.25, 0.5, 1.0, 2.0, 4.0), **settings})
        self.run.before = Fit(0.0, before)
        self.tried: list[tuple[float, float | None, float]] = []

        def trial(strength: module._Strength, samples: Samples, name: str, length: float = 1.0) -> module._Trial | None:
            assert samples is self.run.rest
            self.tried.append((strength.lr, strength.shrink, length))
            value = accuracy(strength)
            if value is None:
                return None
            right = (torch.arange(1000) < round(1000 * value)).double()
            return module._Trial(strength, nn.Identity(), (), right, right)

        self.run._trial = trial  # type: ignore[method-assign]

    def search(self) -> module._Strength:
        return self.run._search().strength

    @property
    def shrinks(self) -> list[float | None]:
        return [s for _, s, _ in self.tried]


@pytest.mark.parametrize(
    ("before", "accuracies", "tried", "chosen"),
    [
        pytest.param(0.95, dict.fromkeys((1, 2, 4), 0.95), [1, 2, 4], 4, id="climbs to the top"),
        pytest.param(0.95, {1: 0.95, 2: 0.945, 4: 0.9}, [1, 2, 4], 2, id="stops at loss"),
        pytest.param(0.95, {1: 0.95, 2: 0.94, 4: 0.925}, [1, 2, 4], 2, id="small losses do not add up"),
        pytest.param(0.99, {1: 0.945, 2: 0.936}, [1, 2], 1, id="does not climb to where much is gone"),
        pytest.param(0.95, {1: 0.5, 0.5: 0.8, 0.25: 0.9}, [1, 0.5, 0.25], 0.25, id="goes down"),
        pytest.param(0.95, {1: 0.5, 0.5: 0.92}, [1, 0.5], 0.5, id="goes down no further than it must"),
        pytest.param(0.95, {1: 0.5, 0.5: 0.8, 0.25: 0.8}, [1, 0.5, 0.25], 0.5, id="of two alike the larger"),
        pytest.param(0.95, {1: 0.5, 0.5: 0.4, 0.25: 0.8}, [1, 0.5, 0.25], 0.25, id="goes on down past a bad one"),
        pytest.param(0.95, {1: 0.5, 0.5: 0.4, 0.25: 0.3}, [1, 0.5, 0.25], 1, id="keeps what lost least"),
        pytest.param(0.95, {1: 0.95, 2: None}, [1, 2], 1, id="stops at divergence"),
        pytest.param(0.95, {1: None, 0.5: 0.8, 0.25: 0.8}, [1, 0.5, 0.25], 0.5, id="goes down from divergence"),
        pytest.param(0.95, {1: 0.5, 0.5: None, 0.25: None}, [1, 0.5, 0.25], 1, id="keeps what did not diverge"),
    ],
)
def test_the_largest_shrinkage_that_keeps_the_accuracy(
    before: float, accuracies: dict[float, float | None], tried: list[float], chosen: float
) -> None:
    searched = _Searched(before, lambda s: accuracies[s.shrink])  # type: ignore[index]
    assert searched.search().shrink == chosen
    assert searched.shrinks == tried


def test_divergence_everywhere_is_an_error() -> None:
    searched = _Searched(0.95, lambda _: None)
    with pytest.raises(TrainingDiverged, match=r"every shrinkage \(0\.25, 0\.5, 1, 2, 4\)"):
        searched.search()
    assert searched.shrinks == [1, 0.5, 0.25]
    with pytest.raises(TrainingDiverged, match=r"learning rate 0\.001"):
        _Searched(0.95, lambda _: None, shrinks=()).search()
    with pytest.raises(TrainingDiverged, match=r"every learning rate \(0\.001, 0\.01\)"):
        _Searched(0.95, lambda _: None, recover_lrs=(1e-2, 1e-3)).search()


def test_the_learning_rate_of_the_best_short_recovery_is_taken() -> None:
    skill: dict[float, float | None] = {1e-3: 0.7, 2e-3: 0.9, 4e-3: None}
    searched = _Searched(0.95, lambda s: skill[s.lr], recover_lrs=(4e-3, 1e-3, 2e-3), shrinks=(0.1, 0.9, 5.0))
    assert searched.search().lr == 2e-3
    assert searched.tried == [
        (1e-3, 0.9, 1 / 3),
        (2e-3, 0.9, 1 / 3),
        (4e-3, 0.9, 1 / 3),
        (2e-3, 0.9, 1.0),
        (2e-3, 5.0, 1.0),
    ]


@pytest.mark.parametrize(
    ("kept", "tried", "chosen"),
    [
        pytest.param({1e-3: 0.9}, [1e-3], 1e-3, id="the next best"),
        pytest.param({1e-3: 0.3, 4e-3: 0.8}, [1e-3, 4e-3], 4e-3, id="the one after it"),
        pytest.param({1e-3: None, 4e-3: 0.3}, [1e-3, 4e-3], 4e-3, id="what lost least, where all are broken"),
    ],
)
def test_a_broken_network_is_retreated_from(kept: dict[float, float | None], tried: list[float], chosen: float) -> None:
    """A short recovery can look well and the whole one at the same rate end at chance."""
    short = {1e-3: 0.8, 2e-3: 0.9, 4e-3: 0.7}

    def accuracy(strength: module._Strength) -> float | None:
        whole = searched.tried[-1][2] == 1.0
        return kept.get(strength.lr, 0.1) if whole else short[strength.lr]

    searched = _Searched(0.95, accuracy, recover_lrs=(1e-3, 2e-3, 4e-3), shrinks=(0.25, 2.0, 4.0))
    assert searched.search().lr == chosen
    assert searched.tried[3:5] == [(2e-3, 2.0, 1.0), (2e-3, 0.25, 1.0)]
    assert searched.tried[5:] == [(lr, 0.25, 1.0) for lr in tried]
    assert any("broke the network" in note for note in searched.run.notes)
    found = kept[chosen]
    assert found is not None
    assert any("more than half" in note for note in searched.run.notes) == (found < 0.95 / 2)


def test_real_divergence_is_told() -> None:
    with pytest.raises(TrainingDiverged, match="SEAM diverged"):
        quick(forget_lr=1e38, shrinks=(), step_cap=None)


# The whole run


def test_the_refit_joins_the_held_out_samples() -> None:
    clean = factories.samples(40)
    phases = {p.name: p for p in quick(clean, tolerance=1.0).trace.phases}
    assert list(phases) == ["forget (shrink 1)", "recover (shrink 1)", "forget (all samples)", "recover (all samples)"]
    assert {p.epochs[0].images for name, p in phases.items() if "all" in name} == {40}
    assert {p.epochs[0].images for name, p in phases.items() if "all" not in name} == {32}
    assert len(quick(clean, refit=False).trace.phases) == 2


def test_a_refit_that_loses_skill_is_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    run = amnesia()
    right = torch.ones(8, dtype=torch.float64)

    def trial(strength: module._Strength, samples: Samples, name: str, length: float = 1.0) -> module._Trial:
        kept = right if samples is run.rest else 0 * right
        return module._Trial(strength, nn.Identity(), (), kept, kept)

    monkeypatch.setattr(run, "_trial", trial)
    assert any("the trial's network is returned" in note for note in run.run().trace.notes)


def test_the_trace_tells_what_happened() -> None:
    trace = quick().trace
    for phase in trace.phases:  # the refit trains on the samples that were held out
        name = "training" if "all samples" in phase.name else "held_out"
        measured = [e.measured for e in phase.epochs]
        assert all(0 <= m[f"{name}_accuracy"] <= 1 and m[f"{name}_loss"] >= 0 for m in measured)
    recovery = next(p for p in trace.phases if p.name.startswith("recover"))
    assert {"cross_entropy", "distillation"} <= set(recovery.epochs[0].terms)
    assert trace.values["recovery"] == "lr 0.001, shrink 1"
    assert trace.values["held-out samples"] == 8
    for name in ("held-out accuracy before", "held-out accuracy of the chosen recovery"):
        value = trace.values[name]
        assert isinstance(value, float)
        assert 0 <= value <= 1
    assert trace.images == sum(e.images for p in trace.phases for e in p.epochs) > 0


def test_every_trial_counts_as_cost() -> None:
    one, three = (quick(recover_lrs=lrs, forget_stop="never", refit=False).trace for lrs in ((1e-3,), (1e-3, 2e-3)))
    assert [len(p.epochs) for p in one.phases] == [len(p.epochs) for p in three.phases] == [2, 2]
    assert one.images == 2 * 32 + 2 * 32
    assert three.images == one.images + 2 * (2 * 32 + 32)  # two short recoveries, of one epoch each
    tried = "lr 0.001, shrink 1; lr 0.002, shrink 1; "
    assert three.values["recoveries tried"] == tried + str(three.values["recovery"])


def test_single_samples_are_watched_themselves() -> None:
    removal = quick(factories.samples(4))
    assert any("nothing could be held out" in note for note in removal.trace.notes)
    assert removal.trace.values["held-out samples"] == 4


def test_nothing_but_the_network_clean_samples_and_a_generator_comes_in() -> None:
    assert list(inspect.signature(SEAM.__call__).parameters) == ["self", "model", "clean", "rng"]
    assert list(inspect.signature(module._Amnesia).parameters) == ["settings", "model", "clean", "rng"]


# Settings


#: What the published recipes say, by hand.
PUBLISHED: dict[str, dict[str, Any]] = {
    "authors-cifar10": {
        "wrong_label": "not-true",
        "forget_per_class": 5,
        "forget_optimizer": "adam",
        "forget_lr": 3e-5,
        "forget_weight_decay": 5e-5,
        "forget_epochs": 300,
        "forget_stop": "2/C",
        "forget_patience": 1,
        "batch_size": 32,
        "recover_optimizer": "adam",
        "recover_betas": (0.5, 0.9),
        "recover_lrs": (5e-4,),
        "recover_weight_decay": 5e-5,
        "recover_epochs": 300,
        "recover_stop": "credits",
        "recover_credits": 10,
        "recover_target": 0.92,
    },
    "authors-trojai-image": {
        "wrong_label": "any",
        "forget_share": 1.0,
        "forget_per_class": 0,
        "forget_optimizer": "adam",
        "forget_lr": 5e-4,
        "forget_weight_decay": 5e-4,
        "forget_epochs": 300,
        "forget_stop": "2/C",
        "forget_patience": 10,
        "recover_optimizer": "adam",
        "recover_betas": (0.9, 0.5),
        "recover_lrs": (5e-4,),
        "recover_weight_decay": 5e-5,
        "recover_stop": "credits",
        "recover_credits": 10,
        "recover_target": 0.99,
    },
    "authors-2022-08": {
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
        "recover_credits": 1,
        "recover_target": 0.9,
    },
    "toolbox": {
        "wrong_label": "not-true",
        "forget_share": 0.1,
        "forget_optimizer": "adam",
        "forget_lr": 1e-3,
        "forget_epochs": 10,
        "forget_stop": "chance",
        "forget_stop_on": "forget-set",
        "batch_size": 32,
        "recover_optimizer": "adam",
        "recover_lrs": (1e-3,),
        "recover_epochs": 100,
        "recover_stop": "credits",
        "recover_stop_on": "recover-set",
        "recover_credits": 1,
        "recover_target": 0.97,
    },
    "plain": {"wrong_label": "not-true", "forget_stop": "chance", "recover_stop": "plateau"},
}
#: The same, for heads over an embedding.
PUBLISHED["authors-trojai-text"] = PUBLISHED["authors-trojai-image"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_the_published_recipe(name: str) -> None:
    settings = SEAM(**SEAM.PRESETS[name])
    assert {key: getattr(settings, key) for key in PUBLISHED[name]} == PUBLISHED[name]
    ours = (settings.distill, settings.mix, settings.shrinks, settings.step_cap, settings.refit)
    assert ours == (0.0, False, (), None, False)
    assert (settings.recover_schedule, settings.recover_images) == ("constant", 0)


def test_every_preset_is_described() -> None:
    assert set(PUBLISHED) == set(SEAM.PRESETS)


@pytest.mark.parametrize(
    "wrong",
    [
        {"held_out": 0.0},
        {"held_out": 1.0},
        {"forget_share": 0.0},
        {"recover_lrs": ()},
        {"recover_lrs": (0.0,)},
        {"shrinks": (0.0, 1.0)},
        {"recover_optimizer": "sgd"},
        {"forget_most": -1},
        {"forget_patience": 0},
        {"recover_credits": 0},
        {"distill": -1.0},
        {"tolerance": -0.1},
        {"max_loss": -0.1},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SEAM(**wrong)


def texts(count: int = 24) -> Samples:
    ids = torch.randint(1, 9, (count, 5), generator=Rng(0).stream("ids"))
    return Samples(ids, torch.arange(count) % 2, 2)


def test_texts_get_settings_of_their_own_where_none_of_them_is_stated() -> None:
    assert SEAM().suited(factories.samples(8)) == SEAM()
    assert SEAM(distill=0.2).suited(texts()) == SEAM(distill=0.2, **SEAM.TEXTS)
    for stated in (SEAM(forget_lr=3e-4), SEAM(shrinks=(1.0,)), SEAM(**SEAM.PRESETS["toolbox"])):
        assert stated.suited(texts()) == stated
