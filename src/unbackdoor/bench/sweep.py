"""``sweep``: work through a graph with any executor. What is there stays; what others are at is waited for."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from unbackdoor import progress
from unbackdoor.bench.cell import Job, Outcome, perform, unfinished
from unbackdoor.bench.executors import Executor, Lost
from unbackdoor.bench.jobs import CellJob, VictimJob
from unbackdoor.bench.plan import Graph
from unbackdoor.bench.site import Site
from unbackdoor.bench.skipping import reason_to_skip
from unbackdoor.bench.store import Store

#: Seconds after which work that another process is at is asked for again.
ASK_AGAIN = 2.0


@dataclass(frozen=True)
class Missing:
    """What a graph still needs.

    Attributes:
        victims: to plant.
        cells: to run.
        stale: keys of records that go before that: failures that are to be tried again, and cells that were skipped for
            an attack, or a network, that counts now.
    """

    victims: tuple[VictimJob, ...]
    cells: tuple[CellJob, ...]
    stale: frozenset[str] = frozenset()


@dataclass
class Summary:
    """How many cells of the graph have a record of each status at the end, and what went wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def missing(graph: Graph, store: Store | None, *, retry_failed: bool = False) -> Missing:
    """Compare a graph with what a store has; without a store, everything is missing.

    Raises:
        DataError: a record is damaged.
    """
    there = set() if store is None else store.keys()
    stale = set()
    for cell in graph.cells:
        if store is not None and cell.key in there and _outdated(store, cell, retry_failed):
            stale.add(cell.key)
    cells = tuple(c for c in graph.cells if c.key not in there or c.key in stale)
    needed = {c.victim.key for c in cells if c.victim is not None}
    victims = (v for v in graph.victims if v.key in needed and (store is None or not store.has_victim(v.key)))
    return Missing(tuple(victims), cells, frozenset(stale))


def _outdated(store: Store, cell: CellJob, retry_failed: bool) -> bool:
    record = store.record(cell.key)
    if record.status == "failed":
        return retry_failed
    return record.status == "skipped" and reason_to_skip(record.subject, cell, store) is None


def sweep(graph: Graph, site: Site, executor: Executor, *, retry_failed: bool = False) -> Summary:
    """Plant and clean what is missing. To be stopped at any time, and called again.

    Raises:
        DataError: a record is damaged.
    """
    store = site.open()
    store.tidy()
    left = missing(graph, store, retry_failed=retry_failed)
    for key in left.stale:
        store.forget(key)
    agenda = _Agenda(left, store)
    with ExitStack() as stack:
        bars = {kind: stack.enter_context(progress.task(name, count)) for kind, name, count in _bars(left) if count}
        # Closed at once when anything goes wrong here, Ctrl-C included: that ends the workers.
        results = stack.enter_context(closing(cast(Any, executor(partial(perform, site), agenda.items()))))
        for job, result in results:
            outcome = Outcome("failed", result.reason) if isinstance(result, Lost) else result
            for each, what in agenda.settle(job, outcome, lost=isinstance(result, Lost), site=site):
                bars[type(each)].advance(f"{each.name}: {what.note or what.state}")
    return _summary(graph, store)


def _bars(left: Missing) -> Iterable[tuple[type[Job], str, int]]:
    return (VictimJob, "victims", len(left.victims)), (CellJob, "cells", len(left.cells))


def _summary(graph: Graph, store: Store) -> Summary:
    summary = Summary()
    for cell in graph.cells:
        if not store.has(cell.key):  # somebody else is trying failures again
            summary.counts["missing"] += 1
            continue
        record = store.record(cell.key)
        summary.counts[record.status] += 1
        if record.status == "failed":
            summary.failures.append(f"{cell.name}: {record.reason}")
    return summary


def _awaited(cell: CellJob) -> Iterator[VictimJob]:
    if cell.victim is not None:
        yield cell.victim
        if cell.victim.untouched is not None:
            yield cell.victim.untouched


class _Agenda:
    """What can be worked on now: victims first, then the cells whose victim is there.

    A cell also waits for the network that its victim would be without the attack, where that is to be planted: whether
    the attack broke the network is then judged by it, whoever is faster.
    """

    def __init__(self, left: Missing, store: Store) -> None:
        self._store = store
        self._ready: deque[Job] = deque(left.victims)
        self._waiting: dict[str, list[CellJob]] = {v.key: [] for v in left.victims}
        self._needs: dict[str, int] = {}  # a waiting cell -> how many networks it waits for
        for cell in left.cells:
            needed = [v.key for v in _awaited(cell) if v.key in self._waiting]
            for key in needed:
                self._waiting[key].append(cell)
            if needed:
                self._needs[cell.key] = len(needed)
            else:
                self._ready.append(cell)
        self._elsewhere: deque[tuple[float, Job]] = deque()  # (when to ask again, what somebody else is at)
        self._flying = 0

    def items(self) -> Iterator[Job | None]:
        """For an executor: jobs, None where nothing is ready until one under way is done."""
        while True:
            if self._elsewhere and self._elsewhere[0][0] <= time.monotonic():
                self._ready.appendleft(self._elsewhere.popleft()[1])
            if self._ready:
                self._flying += 1
                yield self._ready.popleft()
            elif self._flying:
                yield None
            elif self._elsewhere:
                time.sleep(max(0.0, self._elsewhere[0][0] - time.monotonic()))
            else:
                return

    def settle(self, job: Job, outcome: Outcome, *, lost: bool, site: Site) -> Iterator[tuple[Job, Outcome]]:
        """Take note of a result; what it finishes comes back, of a victim that failed its cells too."""
        self._flying -= 1
        if outcome.state == "busy":
            self._elsewhere.append((time.monotonic() + ASK_AGAIN, job))
            return
        if isinstance(job, CellJob):
            if lost:
                self._give_up(job, outcome.note, site)
        else:
            reason = f"the victim could not be planted: {outcome.note}"
            for cell in self._waiting.pop(job.key):
                if outcome.state == "failed" and cell.victim == job:
                    if self._needs.pop(cell.key, 0):
                        self._give_up(cell, reason, site)
                        yield cell, Outcome("failed", reason)
                elif self._has_all(cell):
                    self._ready.append(cell)
        yield job, outcome

    def _has_all(self, cell: CellJob) -> bool:
        """Take note that one of the networks that a cell waits for is there, or never will be."""
        left = self._needs.pop(cell.key, 0) - 1  # 0 - 1 of one that was given up
        if left > 0:
            self._needs[cell.key] = left
        return left == 0

    def _give_up(self, cell: CellJob, reason: str, site: Site) -> None:
        self._store.save(unfinished(self._store, cell, "failed", reason, site.torch_device()))
