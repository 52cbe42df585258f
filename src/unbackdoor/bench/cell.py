"""Doing one job in this process: plant a victim, or clean and judge one, and leave it in the store."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from unbackdoor import specs
from unbackdoor.attacks.victims import save_victim
from unbackdoor.attacks.workshop import Workshop
from unbackdoor.bench.jobs import ALL, CellJob, VictimJob, spec_fields
from unbackdoor.bench.machine import Stopwatch, provenance
from unbackdoor.bench.records import CellRecord, Result, Scores
from unbackdoor.bench.records import Subject as Described
from unbackdoor.bench.site import Site, evaluation_set, training_set
from unbackdoor.bench.skipping import reason_to_skip
from unbackdoor.bench.store import Store
from unbackdoor.bench.subjects import Opened, describe, open_subject
from unbackdoor.bench.victims import train_victim
from unbackdoor.evaluation import checks, metrics
from unbackdoor.evaluation.assessment import Assessment, assess
from unbackdoor.inference import predict
from unbackdoor.rng import Rng
from unbackdoor.types import Defense, Removal, Samples

Job: TypeAlias = VictimJob | CellJob

#: ``there``: somebody else had done it; ``busy``: somebody else is at it. The others as a record has them.
State = Literal["done", "failed", "skipped", "there", "busy"]


@dataclass(frozen=True)
class Outcome:
    """What became of a job; the results themselves are in the store.

    Attributes:
        note: a few words to show; of what failed, the reason.
        seconds: that it took here, all included.
    """

    state: State
    note: str = ""
    seconds: float = 0.0


def perform(site: Site, job: Job) -> Outcome:
    """Do a job, unless it is done, or somebody is at it. What goes wrong with it is an outcome, and no exception."""
    store, began = site.open(), time.perf_counter()

    def there() -> bool:
        return store.has(job.key) if isinstance(job, CellJob) else store.has_victim(job.key)

    with store.claims.hold(job.key) as ours, site.threaded():
        # Looked at last: whoever held the claim before us may have done it.
        if there():
            return Outcome("there")
        if not ours:
            return Outcome("busy")
        try:
            state, note = _plant(site, store, job) if isinstance(job, VictimJob) else _run(site, store, job)
        except Exception as error:  # one job of thousands must not end the others
            state, note = "failed", reason_of(error)
            if isinstance(job, CellJob):
                store.save(unfinished(store, job, "failed", note, site.torch_device()))
    return Outcome(state, note, time.perf_counter() - began)


def reason_of(error: BaseException) -> str:
    """``TrainingDiverged: the loss became nan``."""
    return f"{type(error).__name__}: {error}"


def unfinished(
    store: Store,
    job: CellJob,
    status: Literal["failed", "skipped"],
    reason: str,
    device: torch.device,
    **told: Any,
) -> CellRecord:
    """The record of a cell without a result."""
    return _record(job, describe(store, job.subject), device, status=status, reason=reason, **told)


def _record(job: CellJob, about: Described, device: torch.device, **told: Any) -> CellRecord:
    return CellRecord(
        key=job.key,
        subject=about,
        defense=job.defense,
        fields=spec_fields("defense", job.defense),
        per_class=job.per_class,
        share=job.share,
        seed=job.seed,
        provenance=provenance(device),
        **told,
    )


def _plant(site: Site, store: Store, job: VictimJob) -> tuple[State, str]:
    model, card, _, learned = train_victim(
        arch=job.arch,
        attack=None if job.attack is None else specs.build("attack", job.attack),
        dataset=job.dataset,
        train=training_set(site, job.dataset),
        test=evaluation_set(site, job.dataset),
        recipe=job.recipe,
        seed=job.seed,
        workshop=Workshop(store.workshop),
    )
    save_victim(store.victim(job.key), model, card, trigger=learned, force=True)
    shown = "" if card.asr is None else f", ASR {card.asr:.1%}"
    return "done", f"accuracy {card.accuracy:.1%}{shown}"


def _run(site: Site, store: Store, job: CellJob) -> tuple[State, str]:
    device, opened = site.torch_device(), open_subject(site, job.subject)
    reason = reason_to_skip(opened.about, job, store)
    if reason is not None:
        store.save(_record(job, opened.about, device, status="skipped", reason=reason))
        return "skipped", reason
    generator = Rng(job.seed).stream("bench", "clean")
    clean = opened.reserve if job.per_class == ALL else opened.reserve.draw(job.per_class, generator)
    told: dict[str, Any]
    try:
        told = {"status": "done", **_cleaned(job, opened, clean, device)}
    except Exception as error:  # the record still says on what it failed
        told = {"status": "failed", "reason": reason_of(error)}
    record = _record(job, opened.about, device, clean_samples=len(clean), **told)
    store.save(record)
    if record.result is None:
        return "failed", record.reason or ""
    after = record.result.after
    return "done", f"accuracy {after.accuracy:.1%}" + ("" if after.asr is None else f", ASR {after.asr:.1%}")


def _cleaned(job: CellJob, opened: Opened, clean: Samples, device: torch.device) -> dict[str, Any]:
    """Run the defense and measure what it left: a record's ``result`` and ``flags``."""
    defense: Defense = specs.build("defense", job.defense)
    # A copy of its own: even a careless defense cannot change what the other cells get.
    given = copy.deepcopy(opened.model)
    watch = Stopwatch(device)
    removal = defense(given, clean, Rng(job.seed).child("defense"))
    seconds, peak = watch.stop()
    removal.model.eval()
    after = assess(removal.model, opened.judged, triggered=opened.triggered)
    result = Result(
        before=_scores(opened.before),
        after=_scores(after),
        count=after.count,
        triggered=None if after.asr is None else after.asr.count,
        **_ratings(opened.before, after, poisoned=opened.about.poisoned),
        seconds=seconds,
        images=removal.trace.images,
        peak_memory_mib=peak,
        values=dict(removal.trace.values),
        notes=(*opened.notes, *removal.trace.notes),
    )
    return {"result": result, "flags": _flags(opened, removal, clean, after)}


def _scores(found: Assessment) -> Scores:
    return Scores(
        accuracy=found.accuracy.value,
        asr=None if found.asr is None else found.asr.value,
        ra=None if found.ra is None else found.ra.value,
    )


def _ratings(before: Assessment, after: Assessment, *, poisoned: bool | None) -> dict[str, float | None]:
    kept = before.accuracy.value, after.accuracy.value
    if before.asr is None or after.asr is None:
        # What a clean model keeps is its fidelity; of one that may hold a backdoor nothing was seen.
        return {"nist_fidelity": _known(metrics.nist_fidelity(*kept))} if poisoned is False else {}
    attacked = before.asr.value, after.asr.value
    return {
        "der": metrics.der(kept[0], attacked[0], kept[1], attacked[1]),
        "fidelity": _known(metrics.fidelity(*kept, attacked[1])),
        "fidelity_gap": metrics.fidelity_gap(kept[1], attacked[1]),
        "nist_fidelity": _known(metrics.nist_fidelity(*kept, *attacked)),
    }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _flags(opened: Opened, removal: Removal, clean: Samples, after: Assessment) -> tuple[str, ...]:
    before = opened.before
    broken = checks.destroyed(before, after, removal.model)
    raised = (
        broken,
        checks.non_finite_weights(opened.model),
        checks.accuracy_at_chance(before),
        _unsteady(removal.model, opened.judged),
        checks.attack_did_not_take(before.asr) if before.asr else None,
        checks.held_out_too_small(after.accuracy),
        None if broken else checks.accuracy_fell(before, after),
        checks.clean_set_smaller_than_classes(clean),
        checks.missing_classes(clean),
    )
    return tuple(flag.name for flag in raised if flag is not None)


def _unsteady(model: nn.Module, judged: Samples) -> checks.Flag | None:
    """Two passes over the first few hundred samples."""
    few = judged.select(torch.arange(min(len(judged), 256)))
    return checks.outputs_differ_between_evaluations(predict(model, few), predict(model, few))
