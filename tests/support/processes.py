"""Child processes that are killed or finish."""

import multiprocessing
import os
import signal
import time

FORK = multiprocessing.get_context("forkserver")


def finished(target, config) -> float:
    """Run in a child of its own to the end; seconds."""
    child = FORK.Process(target=target, args=(config,))
    started = time.monotonic()
    child.start()
    child.join()
    assert child.exitcode == 0
    return time.monotonic() - started


def killed(target, config, delay: float, number: int = signal.SIGKILL) -> bool:
    """Run in a child and send it a signal after `delay` seconds; did it end of that?"""
    child = FORK.Process(target=target, args=(config,))
    child.start()
    child.join(delay)
    if child.is_alive():
        os.kill(child.pid, number)
    child.join()
    return child.exitcode in (-number, 128 + number)
