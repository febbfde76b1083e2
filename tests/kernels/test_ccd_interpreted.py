"""Runs `interpreted_*.py`: Triton chooses its interpreter when a kernel is decorated, so in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import interpreter

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("path", sorted(TESTS.glob("kernels/interpreted_*.py")), ids=lambda path: path.stem)
def test_the_kernels_meet_float64_in_the_interpreter(path):
    """A process a file, so that two of them run side by side under pytest -n."""
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *interpreter.WARNS, path],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout[-5000:] + child.stderr[-2000:]
