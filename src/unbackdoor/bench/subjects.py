"""A network, opened to be cleaned and judged: what is the same for all of its cells, worked out once in a process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from torch import nn

from unbackdoor import specs
from unbackdoor.attacks.victims import VictimCard, load_attack, load_victim, read_card
from unbackdoor.bench import records
from unbackdoor.bench.jobs import PROTOCOL_VERSION, GivenModel, Subject, VictimJob, spec_fields
from unbackdoor.bench.opening import load_given, name_given
from unbackdoor.bench.site import Site, evaluation_halves
from unbackdoor.bench.store import Store
from unbackdoor.evaluation.assessment import Assessment, assess, stamped_by
from unbackdoor.types import Attack, Samples, Triggered


@dataclass(frozen=True, eq=False)
class Opened:
    """What a cell needs of its subject.

    Attributes:
        model: on the site's device, in eval mode; never changed.
        reserve: where clean samples come from.
        judged: what every figure is measured on.
        triggered: the triggered copies of ``judged``; None where no trigger is known.
        before: the network as it was given, on both.
        about: what a record says of it.
        notes: what was assumed or converted in loading it.
    """

    model: nn.Module
    reserve: Samples
    judged: Samples
    triggered: Triggered | None
    before: Assessment
    about: records.Subject
    notes: tuple[str, ...] = ()


@lru_cache(maxsize=2)
def open_subject(site: Site, subject: Subject) -> Opened:
    """Load a planted victim, or a given model, and how it did before: measured where no process has yet.

    Raises:
        UnbackdoorError: it cannot be loaded, or does not fit the data.
    """
    store, device = site.open(), site.torch_device()
    notes: tuple[str, ...] = ()
    triggered: Triggered | None = None
    if isinstance(subject, VictimJob):
        folder = store.victim(subject.key)
        model, _ = load_victim(folder, arch=subject.arch)
        attack: Attack | None = load_attack(folder)
        reserve, judged = evaluation_halves(site, subject.dataset)
        about = describe(store, subject)
    else:
        given = load_given(site, subject)
        model, attack, about, notes = given.model, given.attack, given.about, given.notes
        reserve, judged = given.reserve.to(device), given.judged.to(device)
        triggered = None if given.triggered is None else given.triggered.to(device)
    model = model.to(device)
    if attack is not None:
        triggered = stamped_by(attack, judged)
    before = _before(store, subject, model, judged, triggered)
    return Opened(model, reserve, judged, triggered, before, about, notes)


def _before(
    store: Store, subject: Subject, model: nn.Module, judged: Samples, triggered: Triggered | None
) -> Assessment:
    key = specs.key({"what": "before", "version": PROTOCOL_VERSION, "subject": subject.identity})
    found = store.before(key)
    if found is None:
        found = assess(model, judged, triggered=triggered)
        store.save_before(key, found)
    return found


def describe(store: Store, subject: Subject) -> records.Subject:
    """What a record says of a network, as far as it is known without opening it."""
    if isinstance(subject, GivenModel):
        return name_given(subject)
    card: VictimCard | None = read_card(store.victim(subject.key)) if store.has_victim(subject.key) else None
    fields = {} if subject.attack is None else spec_fields("attack", subject.attack)
    return records.Subject(
        key=subject.key,
        name=subject.name,
        dataset=subject.dataset,
        arch=subject.arch,
        num_classes=card.num_classes if card else None,
        attack=subject.attack,
        fields=fields,
        rate=fields.get("rate"),
        target=fields.get("target") if fields.get("labels") != "all-to-all" else None,
        seed=subject.seed,
        accuracy=card.accuracy if card else None,
        asr=card.asr if card else None,
        seconds=card.seconds if card else None,
        poisoned=subject.attack is not None,
    )
