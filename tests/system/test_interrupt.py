"""Ctrl-C ends every command with 130 and without a traceback, whatever it meets."""

import subprocess
import sys

import pytest

# The command of the arguments, with Ctrl-C where a module is first looked for, and a command that meets one badly.
SCRIPT = """
import os, signal, sys, threading

class At:
    def find_spec(self, name, path=None, target=None):
        if name == how:
            sys.meta_path.remove(at)
            os.kill(os.getpid(), signal.SIGINT)

class Command:
    def run(options):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(60)
        except KeyboardInterrupt:
            if how == "turned":
                raise RuntimeError("no compiled object yet")
            if how == "kept":
                threading.Event().wait(60)

how, at = sys.argv[1], At()
from pipeline.__main__ import main
from pipeline.system import interrupt
interrupt._GRACE_S = 0.2
if how in ("turned", "swallowed", "kept"):
    sys.modules["pipeline.training.evaluate"] = Command
else:
    sys.meta_path.insert(0, at)
sys.argv = ["pipeline", "evaluate", "--data", "no", "--model", "cifar/resnet8"]
sys.exit(main())
"""


@pytest.mark.parametrize("how", ["tyro", "torch", "pipeline.networks.cifar", "turned", "swallowed", "kept"])
def test_an_interrupt_ends_the_command_quietly(how):
    """While the command line loads, while a command does, and where it becomes another error or none."""
    ended = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")
