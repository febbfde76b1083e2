"""Child processes that finish, or stop themselves at a chosen event: a clock in the parent would know no event."""

import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

import pytest
from support.interpreter import TESTS
from torch.multiprocessing.spawn import start_processes
from torch.optim.optimizer import register_optimizer_step_post_hook

from cache.store.objects import Files
from pipeline.training import loop


@functools.cache
def forking() -> ForkServerContext:
    """Of multiprocessing: children of a process that has imported what they need, see `support.preloaded`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.preloaded"])
    with pytest.MonkeyPatch.context() as patch:  # it leaves out, without a word, what it does not find on its own path
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]))
        forkserver.ensure_running()
    return context


def exit_code(target, *arguments) -> int | None:
    """Of a child of its own; of one that a signal ended the signal's number, negative."""
    child = forking().Process(target=target, args=arguments)
    child.start()
    child.join()
    return child.exitcode


def finished(target, config) -> None:
    """Run in a child of its own to the end."""
    assert exit_code(target, config) == 0


def together(target, arguments: tuple, count: int) -> None:
    """Run `target(rank, *arguments)` in so many children at once; one that fails ends all, and raises."""
    start_processes(target, arguments, count, start_method=forking().get_start_method())


def stopped(target, config, event: str, count: int, number: int = signal.SIGKILL) -> bool:
    """Run in a child that sends itself a signal at the `count`-th event; did it end of that?

    Events: "step" after a step of an optimizer, "rename" before a file gets its name, "put" before a store's object is
    written, "evaluate" before a run's evaluation.
    """
    return exit_code(_stopping, target, config, event, count, number) in (-number, 128 + number)


def _stopping(target, config, event: str, count: int, number: int) -> None:
    seen = 0

    def happened() -> None:
        nonlocal seen
        seen += 1
        if seen == count:
            os.kill(os.getpid(), number)

    if event == "step":
        register_optimizer_step_post_hook(lambda *_: happened())
    elif event == "rename":
        sys.addaudithook(lambda name, _: happened() if name == "os.rename" else None)
    elif event == "evaluate":
        loop.evaluate = before(loop.evaluate, happened)
    else:
        Files._put = before(Files._put, happened)
    target(config)


def before(method: Callable, happened: Callable[[], None]) -> Callable:
    """The method, with a call before each of its own."""

    def wrapped(*arguments):
        happened()
        return method(*arguments)

    return wrapped
