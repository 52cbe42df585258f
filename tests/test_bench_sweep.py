"""The sweep: every cell of a graph once, by the protocol, with failures as records, and nothing done again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from bench_runs import QUICK, comparable, graph, site
from unbackdoor import specs
from unbackdoor.attacks.poisoning import Contamination, DirtyLabel
from unbackdoor.attacks.victims import load_attack, load_victim
from unbackdoor.attacks.workshop import Workshop
from unbackdoor.bench import cell as cell_module
from unbackdoor.bench import sweep as sweeping
from unbackdoor.bench.estimate import Estimate, estimate
from unbackdoor.bench.executors import Lost, in_process
from unbackdoor.bench.plan import Graph
from unbackdoor.bench.site import evaluation_halves, halves
from unbackdoor.bench.store import Store
from unbackdoor.bench.sweep import missing, sweep
from unbackdoor.data.named import load_dataset
from unbackdoor.errors import ConfigError, DataError
from unbackdoor.evaluation.assessment import assess
from unbackdoor.evaluation.metrics import der
from unbackdoor.rng import Rng
from unbackdoor.types import Removal, Samples, Trace


@dataclass(frozen=True, kw_only=True)
class Explodes:
    """Fails, until it is mended."""

    mended = False

    def __call__(self, model: nn.Module, clean: Samples, rng: Rng) -> Removal:
        if not Explodes.mended:
            raise RuntimeError("out of luck")
        return Removal(model, Trace())


@dataclass(frozen=True, kw_only=True)
class Vandal:
    """Spoils the network that it was given, and notes the samples."""

    seen: ClassVar[list[Samples]] = []

    def __call__(self, model: nn.Module, clean: Samples, rng: Rng) -> Removal:
        Vandal.seen.append(clean)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        return Removal(model, Trace())


@dataclass(frozen=True, kw_only=True)
class Unplantable(DirtyLabel):
    """Cannot be planted."""

    def trigger(self, x: torch.Tensor, /) -> torch.Tensor:
        return x

    def prepare(self, train: Samples, rng: Rng, workshop: Workshop) -> Contamination:  # type: ignore[override]
        raise RuntimeError("no ground to plant in")


@pytest.fixture
def extras(monkeypatch: pytest.MonkeyPatch) -> None:
    defenses = {name: f"test_bench_sweep:{name.capitalize()}" for name in ("explodes", "vandal")}
    monkeypatch.setitem(specs.REGISTRY, "defense", {**specs.REGISTRY["defense"], **defenses})
    attacks = {"unplantable": "test_bench_sweep:Unplantable"}
    monkeypatch.setitem(specs.REGISTRY, "attack", {**specs.REGISTRY["attack"], **attacks})
    monkeypatch.setattr(Explodes, "mended", False)
    Vandal.seen.clear()


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph, Store]:
    """A graph of two victims and four cells, and the store of its sweep."""
    folder, made = tmp_path_factory.mktemp("swept") / "results", graph()
    summary = sweep(made, site(folder), in_process)
    assert (dict(summary.counts), summary.failures) == ({"done": 4}, [])
    return made, Store(folder)


def test_every_cell_has_its_record(swept: tuple[Graph, Store]) -> None:
    made, store = swept
    assert store.keys() == {cell.key for cell in made.cells}
    assert {p.name for p in store.victims.iterdir()} == {victim.key for victim in made.victims}
    assert list(store.claims.folder.iterdir()) == []
    for cell in made.cells:
        record, victim = store.record(cell.key), cell.victim
        assert victim is not None
        assert (record.subject.key, record.subject.attack, record.subject.seed) == (victim.key, victim.attack, 0)
        assert (record.defense, record.per_class, record.seed, record.clean_samples) == (cell.defense, 5, 0, 50)
        assert record.fields["name"] == "ft"
        assert record.provenance.threads == 1


def test_a_cell_is_what_the_protocol_says(swept: tuple[Graph, Store]) -> None:
    """Worked out once more, step by step, from the victim's folder alone."""
    made, store = swept
    cell = made.cells[0]
    result = store.record(cell.key).result
    assert cell.victim is not None
    assert cell.victim.attack == "badnets(size=2)"
    assert result is not None
    folder = store.victim(cell.victim.key)
    model, card = load_victim(folder)
    attack = load_attack(folder)
    assert attack is not None
    reserve, judged = halves(load_dataset("digits", "test"))
    clean = reserve.draw(5, Rng(0).stream("bench", "clean"))
    cleaned = specs.build("defense", cell.defense)(model, clean, Rng(0).child("defense")).model
    for found, network in ((result.before, model), (result.after, cleaned)):
        wanted = assess(network, judged, attack=attack)
        assert wanted.asr is not None
        assert wanted.ra is not None
        assert (found.accuracy, found.asr, found.ra) == (wanted.accuracy.value, wanted.asr.value, wanted.ra.value)
    foreign = int((judged.labels != 0).sum())
    assert (result.count, result.triggered) == (len(judged), foreign)
    before, after = result.before, result.after
    assert before.asr is not None
    assert after.asr is not None
    assert result.der == der(before.accuracy, before.asr, after.accuracy, after.asr)
    assert result.images == 50
    assert store.record(cell.key).subject.accuracy == card.accuracy


def test_a_clean_network_has_no_attack_rates(swept: tuple[Graph, Store]) -> None:
    made, store = swept
    record = store.record(made.cells[-1].key)
    assert (record.subject.attack, record.subject.asr, record.subject.rate) == (None, None, None)
    assert record.result is not None
    assert (record.result.after.asr, record.result.der, record.result.triggered) == (None, None, None)
    assert record.result.nist_fidelity == record.result.after.accuracy / record.result.before.accuracy


def test_the_halves_share_no_image_and_are_always_the_same() -> None:
    images = torch.arange(90, dtype=torch.uint8)[:, None, None, None].expand(90, 1, 2, 2).contiguous()
    reserve, judged = halves(Samples(images, torch.arange(90) % 3, 3))
    one, other = (set(part.inputs[:, 0, 0, 0].tolist()) for part in (reserve, judged))
    assert one & other == set()
    assert one | other == set(range(90))
    assert reserve.counts().tolist() == judged.counts().tolist() == [15, 15, 15]
    assert halves(Samples(images, torch.arange(90) % 3, 3))[0].inputs.equal(reserve.inputs)
    with pytest.raises(ConfigError, match="2 samples with one of each class cannot be halved"):
        halves(Samples(images[:2], torch.arange(2), 2))


@pytest.mark.usefixtures("extras")
def test_a_defense_gets_the_reserve_and_a_copy(tmp_path: Path) -> None:
    made = graph(attacks=[None], defenses=["vandal", QUICK], seeds=[0, 1])
    sweep(made, site(tmp_path / "r"), in_process)
    reserve, _ = evaluation_halves(site(tmp_path / "r"), "digits")
    owned = {image.numpy().tobytes() for image in reserve.inputs}
    assert len(Vandal.seen) == 2
    for clean in Vandal.seen:
        assert all(image.numpy().tobytes() in owned for image in clean.inputs)
    results = [Store(tmp_path / "r").record(cell.key).result for cell in made.cells]
    befores = {r.before.accuracy for r in results if r is not None}
    assert len(befores) == 1
    assert [r.after.accuracy < 0.2 for r in results if r is not None] == [True, False] * 2
    assert "destroyed" in Store(tmp_path / "r").record(made.cells[0].key).flags


def test_what_is_there_is_not_done_again(swept: tuple[Graph, Store], monkeypatch: pytest.MonkeyPatch) -> None:
    made, store = swept
    monkeypatch.setattr(sweeping, "perform", lambda *_: pytest.fail("there is nothing to do"))
    assert sweep(made, site(store.folder), in_process).counts == {"done": 4}


def test_what_is_missing_alone_is_done(swept: tuple[Graph, Store], monkeypatch: pytest.MonkeyPatch) -> None:
    made, store = swept
    before = comparable(store.records())
    store.forget(made.cells[2].key)
    asked = []

    def spy(site: Any, job: Any) -> Any:
        asked.append(job)
        return cell_module.perform(site, job)

    monkeypatch.setattr(sweeping, "perform", spy)
    sweep(made, site(store.folder), in_process)
    assert asked == [made.cells[2]]
    assert comparable(store.records()) == before


@pytest.mark.usefixtures("extras")
def test_a_failure_is_a_record_and_can_be_tried_again(tmp_path: Path) -> None:
    made = graph(attacks=[None], defenses=["explodes", QUICK])
    summary = sweep(made, site(tmp_path / "r"), in_process)
    assert summary.counts == {"done": 1, "failed": 1}
    assert summary.failures == [f"{made.cells[0].name}: RuntimeError: out of luck"]
    store = Store(tmp_path / "r")
    record = store.record(made.cells[0].key)
    assert (record.status, record.reason, record.result) == ("failed", "RuntimeError: out of luck", None)
    assert record.clean_samples == 50
    Explodes.mended = True
    assert sweep(made, site(tmp_path / "r"), in_process).counts == {"done": 1, "failed": 1}
    other = store.record(made.cells[1].key)
    assert sweep(made, site(tmp_path / "r"), in_process, retry_failed=True).counts == {"done": 2}
    assert store.record(made.cells[1].key) == other


@pytest.mark.usefixtures("extras")
def test_a_victim_that_cannot_be_planted_fails_its_cells_alone(tmp_path: Path) -> None:
    made = graph(attacks=["unplantable", None], defenses=[QUICK])
    summary = sweep(made, site(tmp_path / "r"), in_process)
    assert summary.counts == {"done": 1, "failed": 1}
    record = Store(tmp_path / "r").record(made.cells[0].key)
    assert record.reason == "the victim could not be planted: RuntimeError: no ground to plant in"
    assert record.subject.attack == "unplantable"
    left = missing(made, Store(tmp_path / "r"), retry_failed=True)
    assert (left.victims, left.cells) == (made.victims[:1], made.cells[:1])


def test_an_attack_that_did_not_take_is_skipped_unless_asked_for(swept: tuple[Graph, Store]) -> None:
    _, store = swept
    strict = graph(attacks=["badnets(size=2)"], seeds=[7], min_asr=1.0)  # two epochs are not enough
    assert sweep(strict, site(store.folder), in_process).counts == {"skipped": 2}
    record = store.record(strict.cells[0].key)
    assert record.subject.asr is not None
    assert record.subject.asr < 1
    assert record.reason is not None
    assert record.reason.startswith("the attack did not take: it succeeds on")
    lenient = Graph(strict.victims, tuple(replace(cell, min_asr=0.0) for cell in strict.cells))
    assert sweep(lenient, site(store.folder), in_process).counts == {"done": 2}
    assert missing(strict, store).cells == ()  # a result that is there is kept


def test_a_network_that_its_attack_broke_is_skipped(tmp_path: Path) -> None:
    """Whichever is planted first, it is judged by what the network would be without the attack, where the plan says."""
    made = graph(defenses=[QUICK], min_asr=0.8)  # two epochs: the trigger is learned, and hardly a digit
    broken, sound = made.cells

    def clean_one_last(fn: Any, items: Iterator[Any]) -> Iterator[Any]:
        held: list[Any] = []
        for job in items:
            if job == sound.victim:
                held.append(job)
            elif job is not None:
                yield job, fn(job)
            elif held:
                yield held[0], fn(held.pop())

    work = site(tmp_path / "r")
    assert sweep(made, work, clean_one_last).counts == {"skipped": 1, "done": 1}
    store = Store(tmp_path / "r")
    record, clean = store.record(broken.key), store.record(sound.key).subject.accuracy
    assert clean is not None
    assert record.subject.asr is not None
    assert record.subject.asr > 0.8
    told = f"its accuracy is {record.subject.accuracy:.1%}, {clean:.1%} without the attack; from"
    assert (record.reason or "").startswith(f"the attack broke the network: {told} {0.05 + clean / 2:.1%} on")
    assert missing(made, store).cells == ()
    other = Graph(made.victims, tuple(replace(cell, min_asr=0.0) for cell in made.cells))
    assert sweep(other, work, in_process).counts == {"done": 2}

    alone = graph(attacks=["badnets(size=2)"], defenses=[QUICK], min_asr=0.8)
    assert sweep(alone, site(tmp_path / "alone"), in_process).counts == {"skipped": 1}
    reason = Store(tmp_path / "alone").record(broken.key).reason or ""
    assert "without the attack" not in reason
    assert "from 32.5% on, a network of 10 classes counts as one that works" in reason


def test_a_cell_does_not_fail_for_want_of_the_clean_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_clean(site: Any, job: Any) -> Any:
        is_clean = job in made.victims and job.attack is None
        return cell_module.Outcome("failed", "no") if is_clean else cell_module.perform(site, job)

    made = graph(defenses=[QUICK])
    monkeypatch.setattr(sweeping, "perform", without_clean)
    assert sweep(made, site(tmp_path / "r"), in_process).counts == {"done": 1, "failed": 1}


def test_a_lost_worker_is_a_failure(swept: tuple[Graph, Store]) -> None:
    _, store = swept
    made = graph(attacks=[None], seeds=[8])

    def careless(fn: Any, items: Iterator[Any]) -> Iterator[Any]:
        for job in items:
            yield job, Lost("it went away") if job is made.cells[0] else fn(job)

    assert sweep(made, site(store.folder), careless).counts == {"failed": 1, "done": 1}
    assert store.record(made.cells[0].key).reason == "it went away"


def test_what_somebody_else_works_on_is_waited_for(swept: tuple[Graph, Store], monkeypatch: pytest.MonkeyPatch) -> None:
    made, store = swept
    monkeypatch.setattr(sweeping, "ASK_AGAIN", 0.05)
    cell = made.cells[1]
    record = store.record(cell.key)
    store.forget(cell.key)
    states = []

    def meanwhile(fn: Any, items: Iterator[Any]) -> Iterator[Any]:
        with store.claims.hold(cell.key):
            for job in items:
                outcome = fn(job)
                states.append(outcome.state)
                if len(states) == 3:
                    store.save(record)  # the other one is done
                yield job, outcome

    assert sweep(made, site(store.folder), meanwhile).counts == {"done": 4}
    assert states == ["busy"] * 3 + ["there"]
    assert store.record(cell.key) == record


def test_a_damaged_record_is_named(swept: tuple[Graph, Store]) -> None:
    made, store = swept
    path = store.cells / f"{made.cells[0].key}.json"
    content = path.read_text()
    path.write_text(content[:100])
    with pytest.raises(DataError, match=f"{path.name} cannot be read as a record"):
        missing(made, store)
    path.write_text(content)


def test_how_long_it_takes_is_told_by_its_like(swept: tuple[Graph, Store]) -> None:
    made, store = swept
    records = [r for r in store.records() if r.key in {c.key for c in made.cells}]
    wanted = graph(attacks=["badnets(size=2, target=1)", "blended"], seeds=[3], defenses=[QUICK, "seam"])
    left = missing(wanted, store)
    times = {r.subject.attack: r.subject.seconds for r in records}
    quick = [r.result.seconds for r in records if r.result is not None and r.defense == made.cells[0].defense]
    mean = sum(quick) / len(quick)
    planting = (times["badnets(size=2)"] or 0) + sum(s or 0 for s in times.values()) / 2
    found = estimate(left, records)
    assert found.unknown == 2  # no SEAM so far
    assert found.seconds == pytest.approx(planting + 2 * mean)
    assert estimate(left, ()) == Estimate(0, 6)


def test_records_are_plain_json(swept: tuple[Graph, Store]) -> None:
    _, store = swept
    for path in store.cells.iterdir():
        json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
