"""Progress: silent unless turned on, local to its context, and finished however the work ends."""

from __future__ import annotations

import contextvars
from dataclasses import dataclass, field

import pytest

from unbackdoor import progress


@dataclass
class Recorder:
    events: list[str] = field(default_factory=list)
    name: str = ""

    def task(self, name: str, total: int) -> Recorder:
        self.events.append(f"start {name} {total}")
        return Recorder(self.events, name)

    def advance(self, note: str = "") -> None:
        self.events.append(f"{self.name} {note}".strip())

    def finish(self, task: progress.Task) -> None:
        assert isinstance(task, Recorder)
        self.events.append(f"end {task.name}")


def test_it_is_silent_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.task("forget", 3) as task:
        task.advance("loss 1")
    assert capsys.readouterr() == ("", "")


def test_a_display_sees_tasks_within_its_block_only() -> None:
    outer, inner = Recorder(), Recorder()
    with progress.shown_on(outer):
        with progress.task("one", 2) as task:
            task.advance("a")
            task.advance()
        with progress.shown_on(inner), progress.task("two", 1):
            pass
        with progress.task("three", 1):
            pass
    with progress.task("four", 1) as task:
        task.advance()
    assert outer.events == ["start one 2", "one a", "one", "end one", "start three 1", "end three"]
    assert inner.events == ["start two 1", "end two"]


def interrupt(recorder: Recorder) -> None:
    with progress.shown_on(recorder), progress.task("one", 2):
        raise KeyboardInterrupt


def test_a_task_is_finished_and_the_display_removed_on_an_interrupt() -> None:
    recorder = Recorder()
    with pytest.raises(KeyboardInterrupt):
        interrupt(recorder)
    with progress.task("after", 1):
        pass
    assert recorder.events == ["start one 2", "end one"]


def test_another_context_does_not_see_the_display() -> None:
    recorder = Recorder()

    def elsewhere() -> None:
        with progress.task("hidden", 1):
            pass

    fresh = contextvars.Context()
    with progress.shown_on(recorder):
        fresh.run(elsewhere)
    assert recorder.events == []
