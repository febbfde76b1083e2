"""Triton's interpreter, for tests that run in processes of their own: it is chosen when a kernel is decorated."""

import functools
import inspect
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
_WARNS = "-W", "ignore:Conversion of an array:DeprecationWarning"
"""For pytest: that of triton 3.6 takes numbers out of arrays in a way that NumPy has deprecated."""
ENVIRONMENT = {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"}


def passes(path: Path, **environment: str) -> None:
    """Run the tests of a file. Plugins are left out: pytest compiles every file of theirs, of Hypothesis 200."""
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *_WARNS, path],
        env=os.environ | ENVIRONMENT | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | environment,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout[-5000:] + child.stderr[-2000:]


def hasten() -> None:
    """Look once for what is built in, not at each call of a function in a kernel, which took half of the time."""
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @functools.cache
    def names(package) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch(package, builder, scope) -> None:
        for name in names(package):
            if is_builtin(member := getattr(package, name)):  # which it is not where it was replaced already
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch
