"""Runs `interpreted_*.py`, a process a file, so that two of them run side by side under pytest -n."""

import pytest
from support import interpreter


@pytest.mark.parametrize("path", sorted(interpreter.TESTS.glob("kernels/interpreted_*.py")), ids=lambda path: path.stem)
def test_the_kernels_meet_float64_in_the_interpreter(path):
    interpreter.passes(path)
