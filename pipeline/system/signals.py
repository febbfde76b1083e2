"""Ctrl-C and SIGTERM end a run after the step under way, all processes of a job after the same one."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from pipeline.system import ranks

_EVERY = 16  # steps between the processes' agreements


def leave(number: int, where: str) -> NoReturn:
    """End the process as a signal would have, now that its state is saved."""
    name = signal.Signals(number).name
    if ranks.rank() == 0:
        print(f"stopped by {name} {where}; continue with the same command and --resume", file=sys.stderr)
    raise SystemExit(128 + number)


class Requests:
    """Signals that came; a second one of a kind does what it always did."""

    def __init__(self):
        self.number = 0
        self.before: dict[int, Any] = {}
        self._steps = 0

    def take(self, number: int, _frame) -> None:
        self.number = number
        signal.signal(number, self.before[number])

    def now(self, *, agree: bool = False) -> int:
        """After a step: the signal to end for, or 0. A collective call every so many steps, or with `agree`."""
        self._steps += 1
        if ranks.world() == 1:
            return self.number
        if self._steps % _EVERY and not agree:
            return 0
        wanted = torch.tensor([self.number])
        dist.all_reduce(wanted, op=dist.ReduceOp.MAX)
        return int(wanted)


@contextmanager
def requests() -> Iterator[Requests]:
    """Catch signals while the context is open; in threads other than the main one, none."""
    found = Requests()
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            found.before[number] = signal.signal(number, found.take)
    except ValueError:
        yield found
        return
    try:
        yield found
    finally:
        for number, handler in found.before.items():
            signal.signal(number, handler)
