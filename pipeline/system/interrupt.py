"""Ctrl-C at any moment, while modules load or a kernel compiles as well: exit code 130, and no traceback.

A KeyboardInterrupt that meets a library in the middle of something may come out as another error, or not at all. So
the first Ctrl-C raises one and notes it, and whatever the command then ends in is 130. One that does not end soon, or
is interrupted again, is ended: all that is kept on disk is written so that a kill does no harm.
"""

import os
import signal
import sys
import threading
from typing import NoReturn

CODE = 128 + signal.SIGINT
_GRACE_S = 5.0
_pressed = False


def install() -> None:
    """Take Ctrl-C from here on; for the main thread of a process that is a command."""
    signal.signal(signal.SIGINT, _press)


def pressed() -> bool:
    """Whether Ctrl-C has come while nobody else took it."""
    return _pressed


def _press(number: int, _frame) -> None:
    global _pressed
    if _pressed:
        leave()
    _pressed = True
    sys.unraisablehook = threading.excepthook = lambda *_: None  # what breaks on the way out is no news
    signal.signal(signal.SIGALRM, lambda *_: leave())
    signal.setitimer(signal.ITIMER_REAL, _GRACE_S)
    raise KeyboardInterrupt


def leave() -> NoReturn:
    """End the process now: the interpreter's own end would wait for threads, and may be interrupted again."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # closed, full, or interrupted within a write
            continue
    if os.isatty(2):
        os.write(2, b"\x1b[?25h")  # a progress bar hides the cursor
    os._exit(CODE)
