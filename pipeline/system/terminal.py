"""What a person sees: progress with rate and ETA, and a summary at the end."""

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext

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
_PLAIN_SECONDS = 20.0  # between lines where there is no terminal
_RATE_SECONDS = 300.0  # that a rate is of: a student or a network is a step too, and takes a minute


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
    """A bar on stderr, gone when done; none without `show`. Yields `advance(count, note, found=False)`.

    What was `found` done before says nothing of the rate. A note stands below the bar until the next. Without a
    terminal a line says every 20 s how far it is, whether there was any step or not.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    seen = _console_err.is_terminal
    bar = _Noted(
        *columns,
        console=_console_err,
        transient=True,
        disable=not (show and seen),
        speed_estimate_period=_RATE_SECONDS,
    )
    task = bar.add_task(description, total=total, completed=completed, unit=unit)
    lines = _lines(lambda: _line(description, bar.tasks[0], bar.note)) if show and not seen else nullcontext()
    with bar, lines:

        def advance(count: int, note: str = "", found: bool = False) -> None:
            bar.note = note or bar.note
            if found:
                bar.reset(task, completed=int(bar.tasks[0].completed) + count)
            else:
                bar.advance(task, count)

        yield advance


@contextmanager
def _lines(line: Callable[[], str]) -> Iterator[None]:
    """Write one every so many seconds to what is stderr now: a part of the work may silence its own."""
    stream, done = sys.stderr, threading.Event()

    def write() -> None:
        while not done.wait(_PLAIN_SECONDS):
            try:
                print(line(), file=stream, flush=True)
            except (OSError, ValueError):  # the reader left, or the stream is closed
                return

    thread = threading.Thread(target=write, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _line(description: str, task: Task, note: str) -> str:
    done, total, unit, elapsed = int(task.completed), int(task.total or 0), task.fields["unit"], task.elapsed or 0.0
    parts = [f"{description} {done:,}/{total:,} {unit} after {duration(elapsed)}"]
    if task.time_remaining is not None and done < total:
        parts.append(f"{duration(task.time_remaining)} to go")
    return ", ".join(parts) + (f": {note}" if note else "")


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


def counted(count: int, noun: str) -> str:
    """1 block, 1,024 blocks."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def duration(seconds: float) -> str:
    """A length of time for people, to three digits: 41.3 s, 12.5 min, 127 h."""
    if seconds < 99.95:
        return f"{seconds:.3g} s"
    minutes = seconds / 60
    return f"{minutes:.3g} min" if minutes < 99.95 else f"{float(f'{minutes / 60:.3g}'):,.9g} h"
