"""What a person sees: progress with rate and ETA, and a summary at the end."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

console_out = Console()
_console_err = Console(stderr=True)
_PLAIN_SECONDS = 10.0  # between lines where there is no terminal


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.1f} {task.fields['unit']}/s")


class _Noted(Progress):
    """A bar with a line below it."""

    note = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.note:
            yield Text(self.note, style="dim")


@contextmanager
def progress(
    description: str, total: int, unit: str, completed: int = 0, *, show: bool = True
) -> Iterator[Callable[..., None]]:
    """A bar on stderr, gone when done; none without `show`. Yields `advance(count, note)`.

    A note stands below the bar until the next. Without a terminal there is no bar, and now and then a note becomes a
    line.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    plain = show and not _console_err.is_terminal
    done, said = completed, time.monotonic()
    with _Noted(*columns, console=_console_err, transient=True, disable=not (show and _console_err.is_terminal)) as bar:
        task = bar.add_task(description, total=total, completed=completed, unit=unit)

        def advance(count: int, note: str = "") -> None:
            nonlocal done, said
            done += count
            bar.note = note or bar.note
            bar.advance(task, count)
            if plain and note and time.monotonic() - said > _PLAIN_SECONDS:
                said = time.monotonic()
                print(f"{description} {done:,}/{total:,} {unit}: {note}", file=sys.stderr, flush=True)

        yield advance


def note(text: str) -> None:
    """A line on stderr, once, from the first process of a job: what was done that nobody asked for."""
    if os.environ.get("RANK", "0") == "0" and text not in _NOTED:
        _NOTED.add(text)
        print(f"note: {text}", file=sys.stderr, flush=True)


_NOTED: set[str] = set()


def summary(title: str, facts: dict) -> None:
    """A two-column table on stdout."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in facts.items():
        table.add_row(name, str(value))
    console_out.print(table)


def decimal(count: float) -> str:
    """A number of bytes for people: 1.3 GB is 1.3 · 10⁹."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """A length of time for people, to three digits: 41.3 s, 12.5 min, 127 h."""
    if seconds < 99.95:
        return f"{seconds:.3g} s"
    minutes = seconds / 60
    return f"{minutes:.3g} min" if minutes < 99.95 else f"{float(f'{minutes / 60:.3g}'):,.9g} h"
