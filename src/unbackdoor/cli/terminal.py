"""What the commands say and how: results on stdout; notes, warnings, errors and progress on stderr.

Progress is shown on a terminal only. What comes from files is untrusted text: control characters in it, which could
steer a terminal, are written out as escapes, and nothing in it is read as markup.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import TaskID as BarId
from rich.table import Table
from rich.text import Text

from unbackdoor import progress

#: Columns of a table that goes to a pipe, where there is no screen to fit.
PIPE_WIDTH = 120


def plain(text: str) -> str:
    """``text`` with its control characters written out, save for line ends: ESC becomes ``\\x1b``."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def percent(value: float) -> str:
    """A share in [0, 1] as 12.3%."""
    return f"{value:.1%}"


class Terminal:
    """The two streams of a command. ``quiet`` leaves notes, results and progress out, not warnings and errors."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.out = _console(stderr=False)
        self.err = _console(stderr=True)
        self._bars_shown = False

    def say(self, text: str = "", style: str = "") -> None:
        """A line of the result."""
        if not self.quiet:
            self._results().print(Text(plain(text), style), soft_wrap=not self.out.is_terminal)

    def show(self, thing: RenderableType) -> None:
        """A table or the like, of the result."""
        if not self.quiet:
            self._results().print(thing)

    def _results(self) -> Console:
        # Both streams on one screen: what is printed beside running bars has to go through the console that draws them.
        return self.err if self._bars_shown and self.out.is_terminal else self.out

    def json(self, content: Any) -> None:
        """The whole result, for programs."""
        self.out.file.write(json.dumps(content, indent=1, ensure_ascii=True, allow_nan=False) + "\n")

    def notes(self, notes: Sequence[str]) -> None:
        """What was assumed or converted on the way."""
        if not self.quiet:
            for note in notes:
                self._tell("note", note, "dim")

    def warn(self, text: str) -> None:
        self._tell("warning", text, "bold yellow")

    def error(self, text: str) -> None:
        self._tell("error", text, "bold red")

    def _tell(self, kind: str, text: str, style: str) -> None:
        line = Text.assemble((f"{kind}: ", style), plain(text))
        self.err.print(line, soft_wrap=not self.err.is_terminal)

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """A spinner with a few words, on a terminal."""
        with self.err.status(plain(what)) if self._animated else nullcontext():
            yield

    @contextmanager
    def progress(self) -> Iterator[None]:
        """Show the progress of what runs within the block, on a terminal."""
        if not self._animated:
            yield
            return
        bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=self.err,
            transient=True,
        )
        self._bars_shown = True
        try:
            with bars, progress.shown_on(_Bars(bars)):
                yield
        finally:
            self._bars_shown = False

    @property
    def _animated(self) -> bool:
        return self.err.is_terminal and not self.quiet


class _Bars:
    """:class:`unbackdoor.progress.Display` by rich."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars

    def task(self, name: str, total: int) -> _Bar:
        return _Bar(self._bars, self._bars.add_task(plain(name), total=total, note=""))

    def finish(self, task: progress.Task) -> None:
        assert isinstance(task, _Bar)
        self._bars.remove_task(task.identity)


class _Bar:
    """:class:`unbackdoor.progress.Task` by rich."""

    def __init__(self, bars: Progress, identity: BarId) -> None:
        self._bars, self.identity = bars, identity

    def advance(self, note: str = "") -> None:
        self._bars.update(self.identity, advance=1, note=plain(note))


def table(*columns: str, title: str = "", right: Sequence[str] = ()) -> Table:
    """An empty table in the one style of all commands; the columns named in ``right`` are right-aligned."""
    made = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def add(rows: Table, *cells: str, style: str = "") -> None:
    """Add a row of untrusted texts."""
    rows.add_row(*(Text(plain(cell)) for cell in cells), style=style or None)


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console
