"""How the tests are run: on which threads, in which order, and with which fixtures."""

import gc
import os

# Processes of pytest-xdist share the cores, which PyTorch in each of them would take for its own.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(len(os.sched_getaffinity(0)) // workers, 1)))

import pipeline  # noqa: F401, before torch and NumPy are imported here and in child processes  # isort: skip

from support import interpreter

LONG = (
    "test_jda",  # compiles the pixel kernels, which the others then find compiled
    "test_ccd_interpreted",  # needs none of them
    "test_jda_gpu",
    "test_distributed",
    "test_train",
    "test_verify",
    "test_docs",
    "test_precompute",
)
"""Files that take longest, in the order in which they are begun: at the end one process would work on alone."""


if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.hasten()


def pytest_configure(config):
    """The process that hands the tests out runs none, so it starts without their fixtures, which import everything."""
    gc.disable()  # until all is imported: it would be looked through again and again
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("support.datasets")


def pytest_collection_finish():
    """What was imported stays: a collection that looked through it would take a third of a second."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure():
    gc.unfreeze()  # extensions report what is not collected at the end


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
