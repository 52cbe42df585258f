"""Which networks no defense is judged on: an attack did not take, or it broke the network."""

from __future__ import annotations

from unbackdoor.attacks.victims import read_card
from unbackdoor.bench.jobs import CellJob
from unbackdoor.bench.records import Subject
from unbackdoor.bench.store import Store
from unbackdoor.evaluation.checks import least_accuracy


def reason_to_skip(about: Subject, job: CellJob, store: Store) -> str | None:
    """Why a cell is left out, by what is known of its network from the planting; None where it is to be run.

    Networks without a known attack are always cleaned, and so is everything with ``min_asr`` 0.
    """
    if about.attack is None or job.min_asr == 0:
        return None
    if about.asr is not None and about.asr < job.min_asr:
        return (
            f"the attack did not take: it succeeds on {about.asr:.1%} of the triggered test images, "
            f"below {job.min_asr:.0%}"
        )
    if about.accuracy is None or about.num_classes is None:
        return None
    clean = _clean_accuracy(job, store)
    least = least_accuracy(about.num_classes, clean)
    if about.accuracy >= least:
        return None
    beside = "" if clean is None else f", {clean:.1%} without the attack"
    return (
        f"the attack broke the network: its accuracy is {about.accuracy:.1%}{beside}; from {least:.1%} on, a "
        f"network of {about.num_classes} classes counts as one that works"
    )


def _clean_accuracy(job: CellJob, store: Store) -> float | None:
    """Of the same network, trained alike without the attack, where the store has it."""
    untouched = None if job.victim is None else job.victim.untouched
    return read_card(store.victim(untouched.key)).accuracy if untouched and store.has_victim(untouched.key) else None
