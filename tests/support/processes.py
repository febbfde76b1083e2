"""Child processes that finish, or stop themselves at a chosen event: a clock in the parent would know no event."""

import contextlib
import functools
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from support.interpreter import TESTS
from torch.multiprocessing.spawn import start_processes
from torch.optim.optimizer import register_optimizer_step_post_hook

from cache.store.objects import Files
from pipeline import cli
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


def ranked(words: list[str], world: int, said: Path = Path(os.devnull)) -> None:
    """Run a command in so many processes at once, in the environment that torchrun would give them; the first one's
    stdout goes to the file `said`."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    there = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    together(_ranked, (words, there, said), world)


def torchrun(world: int) -> list[str]:
    """What starts `-m pipeline` in so many processes."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]


def _ranked(rank: int, words: list[str], there: dict[str, object], said: Path) -> None:
    os.environ.update({name: str(value) for name, value in (there | {"RANK": rank, "LOCAL_RANK": rank}).items()})
    with open(os.devnull if rank else said, "w") as file, contextlib.redirect_stdout(file):
        command(words)


def command(words: list[str]) -> None:
    """The command line, in a child."""
    sys.exit(cli.main(words))


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
