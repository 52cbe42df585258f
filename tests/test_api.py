"""The Python entry, with a tiny network on scikit-learn's digits and a defense defined here."""

import copy
import dataclasses
import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import nn

from unbackdoor.api import clean, evaluate
from unbackdoor.attacks.image.badnets import BadNets
from unbackdoor.attacks.poisoning import poison
from unbackdoor.errors import ConfigError, DataError, OutputExists
from unbackdoor.models.inputs import Classifier, InputFormat
from unbackdoor.report import Report
from unbackdoor.rng import Rng
from unbackdoor.training import Recipe, fit
from unbackdoor.types import Phase, Removal, Samples, Trace, UnitScores

ATTACK = BadNets(size=2, rate=0.1)


@dataclass(frozen=True, kw_only=True)
class Retrain:
    """Forgets everything and learns the clean samples."""

    epochs: int = 30
    seen = []  # noqa: RUF012

    def __call__(self, model, clean, rng):
        self.seen.append(clean)
        model = copy.deepcopy(model)
        for layer in model:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.1, generator=rng.stream("reset", len(layer.weight)))
        epochs = fit(model, clean, Recipe(epochs=self.epochs, optimizer="adam", batch_size=32), rng.child("fit"))
        return Removal(model, Trace((Phase("relearn", tuple(epochs)),), notes=("forgot everything",)))


@dataclass(frozen=True, kw_only=True)
class Nothing:
    """Returns a copy."""

    def __call__(self, model, clean, rng):
        return Removal(copy.deepcopy(model), Trace())


@dataclass(frozen=True, kw_only=True)
class Wreck:
    """Breaks the very model that it was given, against the rules."""

    def __call__(self, model, clean, rng):
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        return Removal(model, Trace())


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    every = Samples(images, torch.tensor(data.target, dtype=torch.int64), 10, tuple(f"digit {i}" for i in range(10)))
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    return every.select(order[:800]), every.select(order[800:1400]), every.select(order[1400:])


@pytest.fixture(scope="module")
def victim(digits):
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    for p in model.parameters():
        nn.init.normal_(p, std=0.1, generator=generator)
    fit(model, poison(digits[0], ATTACK, Rng(0)), Recipe(epochs=40, optimizer="adam", batch_size=64), Rng(0))
    return model


def test_a_known_trigger_is_measured_before_and_after(victim, digits):
    _, given, test = digits
    state = copy.deepcopy(victim.state_dict())
    cleaned = clean(victim, given, Retrain(), test=test, attack=ATTACK, description={"name": "digits.pt"})
    report = cleaned.report
    assert report.before.asr.value > 0.9
    assert report.after.asr.value < 0.1
    assert report.verdict == "cleaned"
    assert report.measured.source == "test"
    assert report.measured.count == len(test)
    assert report.method.spec == "test_api:Retrain"
    assert report.method.fields["epochs"] == 30
    assert report.model.name == "digits.pt"
    assert report.model.parameters == 64 * 48 + 48 + 48 * 10 + 10
    assert report.cost.images == 30 * len(given)
    assert report.cost.peak_memory_mib > 10
    assert all(c.relative > 0 for c in report.weights if not c.buffer)
    assert report.attack.der == pytest.approx(
        (
            report.before.asr.value
            - report.after.asr.value
            - max(0, report.before.accuracy.value - report.after.accuracy.value)
            + 1
        )
        / 2
    )
    for example in report.attack.examples:
        assert example.label != example.wanted == 0
    assert len({e.label for e in report.attack.examples}) == 6
    assert cleaned.removal.model is cleaned.model
    assert not cleaned.model.training
    for name, tensor in victim.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_a_share_is_set_aside_that_the_defense_never_sees(victim, digits):
    _, given, _ = digits
    Retrain.seen.clear()
    report = clean(victim, given, Retrain(epochs=20)).report
    (seen,) = Retrain.seen
    assert report.measured.source == "held_out"
    assert report.measured.count + len(seen) == len(given) == report.samples.count
    assert report.samples.defense_count == len(seen)
    assert report.measured.count == pytest.approx(0.2 * len(given), rel=0.1)
    assert [a + b for a, b in zip(report.measured.per_class, seen.counts().tolist(), strict=True)] == list(
        report.samples.per_class
    )
    assert report.verdict == "unproven"
    assert report.attack is None


def test_too_few_samples_are_measured_themselves_and_it_says_so(victim, digits):
    few = digits[1].draw(2, torch.Generator().manual_seed(0))
    report = clean(victim, few, Retrain(epochs=5)).report
    assert report.measured.source == "given"
    assert report.measured.count == report.samples.defense_count == 20
    assert "measured_on_given_samples" in {f.name for f in report.flags}


def test_canaries_go_through_the_same_removal_and_change_nothing_else(victim, digits):
    kinds = ("badnets(target=3, size=2, corner=top-left)",)
    with_them = clean(victim, digits[1], "ft(epochs=2)", test=digits[2], canaries=kinds)
    without = clean(victim, digits[1], "ft(epochs=2)", test=digits[2])
    assert without.report.canaries is None
    assert with_them.report.canaries is not None
    (canary,) = with_them.report.canaries.canaries
    assert (canary.spec, canary.took) == (kinds[0], True)
    assert canary.left.value > 0.5  # two epochs of fine-tuning remove nothing
    assert with_them.report.after == without.report.after
    assert with_them.report.trace.images == without.report.trace.images


def test_the_same_seed_gives_the_same_model_and_another_gives_another(victim, digits):
    few = digits[1].select(torch.arange(100))
    first, again, other = (clean(victim, few, Retrain(epochs=2), seed=s) for s in (3, 3, 4))
    assert torch.equal(first.model[1].weight, again.model[1].weight)
    assert not torch.equal(first.model[1].weight, other.model[1].weight)
    assert first.report.after == again.report.after


def test_doing_nothing_is_called_unchanged(victim, digits):
    report = clean(victim, digits[1], Nothing(), attack=ATTACK, test=digits[2]).report
    assert report.verdict == "unchanged"
    assert report.attack.der == 0.5
    assert all(c.relative == 0 for c in report.weights)


def test_a_destroyed_model_is_not_saved_and_the_given_one_is_whole(victim, digits, tmp_path):
    state = copy.deepcopy(victim.state_dict())
    clean(victim, digits[1], Nothing()).save(tmp_path)
    wrecked = clean(victim, digits[1], Wreck(), test=digits[2])
    assert wrecked.destroyed
    assert "destroyed" in {f.name for f in wrecked.report.flags}
    for name, tensor in victim.state_dict().items():
        assert torch.equal(tensor, state[name])
    wrecked.save(tmp_path, force=True)
    # Not even the weights of the earlier run stay beside this report.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert "destroyed" in (tmp_path / "report.html").read_text()


def test_save_writes_three_files_that_read_back(victim, digits, tmp_path):
    cleaned = clean(victim, digits[1], Retrain(epochs=3))
    written = cleaned.save(tmp_path / "out")
    assert sorted(p.name for p in written) == ["model.safetensors", "report.html", "report.json"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in written)
    assert Report.load(tmp_path / "out" / "report.json") == cleaned.report
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, cleaned.model.state_dict()[name])


def test_save_refuses_to_overwrite_and_then_writes_nothing(victim, digits, tmp_path):
    (tmp_path / "report.html").write_text("mine")
    cleaned = clean(victim, digits[1], Nothing())
    with pytest.raises(OutputExists, match=r"report\.html"):
        cleaned.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    cleaned.save(tmp_path, force=True)
    assert json.loads((tmp_path / "report.json").read_text())["verdict"] == "unchanged"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "no_such"}, ConfigError, "no_such"),
        ({"method": Retrain}, ConfigError, "method must be"),
        ({"held_out": 1.5}, ConfigError, r"1\.5"),
        ({"seed": -1}, ConfigError, "-1"),
        ({"description": {"nam": "x"}}, ConfigError, "did you mean 'name'"),
        ({"attack": BadNets(target=12)}, ConfigError, "target 12"),
        ({"test": Samples(torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64), 3)}, DataError, "3 classes"),
    ],
)
def test_wrong_options_are_named_before_anything_runs(victim, digits, options, error, message):
    Retrain.seen.clear()
    with pytest.raises(error, match=message):
        clean(victim, digits[1], **{"method": Retrain(), **options})
    assert Retrain.seen == []


@dataclass(frozen=True, kw_only=True)
class Nudge:
    """Changes one weight of a wrapped network and says which layer it scored."""

    def __call__(self, model, clean, rng):
        model = copy.deepcopy(model)
        with torch.no_grad():
            model.network[1].weight[0, 0] += 1
        scores = UnitScores("network.1", (0.0,), 0.0, 1.0, (0.0,), ())
        return Removal(model, Trace(scores=(scores,), heads=(scores,)))


def test_a_wrapped_network_is_spoken_of_and_saved_in_its_owners_names(victim, digits, tmp_path):
    wrapped = Classifier(victim, InputFormat())
    cleaned = clean(wrapped, digits[1], Nudge(), test=digits[2], notes=["images were turned", "and squeezed"])
    assert cleaned.report.model.architecture == "Sequential"
    assert {c.name for c in cleaned.report.weights} == set(victim.state_dict())
    assert [s.layer for s in cleaned.report.trace.scores] == ["1"]
    assert [s.layer for s in cleaned.report.trace.heads] == ["1"]
    assert cleaned.removal.trace.scores[0].layer == "network.1"
    cleaned.save(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == victim.state_dict().keys()
    assert saved["1.weight"][0, 0] == victim[1].weight[0, 0] + 1
    assert Report.load(tmp_path / "report.json").notes == ("images were turned", "and squeezed")
    assert "<li>Images were turned.</li><li>And squeezed.</li>" in (tmp_path / "report.html").read_text()


def test_evaluating_measures_and_flags_and_changes_nothing(victim, digits):
    state = copy.deepcopy(victim.state_dict())
    good = evaluate(victim, digits[2], attack=ATTACK)
    assert good.found.accuracy.value > 0.9
    assert good.found.asr.value > 0.9
    assert good.flags == ()
    assert all(torch.equal(value, state[name]) for name, value in victim.state_dict().items())
    shifted = dataclasses.replace(digits[2], labels=(digits[2].labels + 1) % 10)
    assert [f.name for f in evaluate(victim, shifted).flags] == ["accuracy_at_chance"]
    few = digits[2].select(digits[2].labels > 7)
    assert {f.name for f in evaluate(victim, few).flags} >= {"missing_classes"}
