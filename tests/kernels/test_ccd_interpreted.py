"""Runs `interpreted_*.py` in one process, which imports PyTorch once."""

from support import interpreter


def test_the_kernels_meet_float64_in_the_interpreter():
    files = sorted(interpreter.TESTS.glob("kernels/interpreted_*.py"))
    assert len(files) == 3
    interpreter.passes(*files)
