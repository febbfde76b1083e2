"""glibc keeps what is freed, up to a bound, unless it is not the allocator or the user has chosen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.system import memory

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="the C library is not glibc")

FAULTS = """
import ctypes, resource, pipeline
from pipeline.system import memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def round(blocks):
    held = [libc.malloc(1 << 24) for _ in range(blocks)]
    for block in held:
        ctypes.memset(block, 1, 1 << 24)
    for block in held:
        libc.free(block)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

round(4)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    round(4)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
empty = resident()
round(80)
print(faults * resource.getpagesize() / (8 * 4 << 24), (resident() - empty) / memory._KEPT)
"""


def measured(**environment: str) -> tuple[float, float]:
    """Share of the pages used that were faulted in again; what stays after 1.25 GiB are freed, of the bound."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", FAULTS]
    env = kept | {"PYTHONPATH": str(ROOT)} | environment
    first, second = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.split()
    return float(first), float(second)


def test_freed_blocks_are_used_again_and_memory_stays_bounded():
    again, kept = measured()
    assert again < 0.01 and kept < 1.1


def test_the_users_choice_stands():
    again, _ = measured(MALLOC_TRIM_THRESHOLD_="131072")
    assert again > 0.5


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_any_choice_of_the_users_is_one(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert not memory.keep_freed()


def test_another_allocator_is_left_alone(monkeypatch):
    """One that was loaded before libc has another malloc, and libc's mallopt would say yes to no use."""

    class Library:
        def __init__(self, name):
            self.malloc = memory.ctypes.c_void_p(1 if name is None else 2)

        def mallopt(self, *_):
            raise AssertionError("called")

    for variable in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setattr(memory.ctypes, "CDLL", Library)
    assert not memory.keep_freed()
