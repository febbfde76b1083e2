"""Child processes that finish, or stop themselves at a chosen event: a clock in the parent would know no event."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable

from torch.optim.optimizer import register_optimizer_step_post_hook

from cache.store.objects import Files
from pipeline.training import loop

FORK = multiprocessing.get_context("forkserver")
# Children start at once. An optimizer imports torch._dynamo, which takes as long as torch itself, and what makes images
# of photographs or digits imports scikit-learn.
FORK.set_forkserver_preload(
    [
        "pipeline.labels.precompute",
        "pipeline.training.train_student",
        "torch._dynamo",
        "sklearn.datasets",
        "support.undrawn",
    ]
)


def exit_code(target, *arguments) -> int | None:
    """Of a child of its own; of one that a signal ended the signal's number, negative."""
    child = FORK.Process(target=target, args=arguments)
    child.start()
    child.join()
    return child.exitcode


def finished(target, config) -> None:
    """Run in a child of its own to the end."""
    assert exit_code(target, config) == 0


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
