"""Ctrl-C ends every command with 130 and without a traceback, whatever it meets."""

import os
import subprocess
import sys

import pytest

from pipeline.demo import POLICY

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


# The command of the arguments from the third on. SIGINT comes at the event of Python's auditing (an import, a file
# opened, code made) that the second counts to; the first is a file for the count at the end.
AT = """
import os, signal, sys, threading
out, at, *arguments = sys.argv[1:]
from pipeline.__main__ import main
at, seen = int(at), 0

def happened(*_):
    global seen
    seen += 1
    if seen == at:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

sys.argv = ["pipeline", *arguments]
sys.addaudithook(happened)
code = main()
with open(out, "w") as file:
    file.write(str(seen))
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "compiled"),
    [
        ("prepare", True),
        ("precompute-teacher", True),
        ("train-student", True),
        ("inspect", True),
        ("precompute-teacher", False),
    ],
)
def test_a_command_can_be_interrupted_anywhere(which, compiled, digits, teacher, labels, tmp_path):
    """A real one, at four places: 130, and not a word on stderr but progress and where a run stopped."""

    def run(at: int, name: str) -> tuple[int, str]:
        """Of a SIGINT at that event: exit code and stderr. What the command writes and compiles is called `name`."""
        out = tmp_path / name
        options = {
            "prepare": ["digits", "--out", out],
            "precompute-teacher": [*data, "--teacher", teacher, "--store", out, "--views", 1, "--policy", POLICY],
            "train-student": [*data, "--store", labels, "--student", "cifar/resnet8", "--out", out, "--epochs", 2],
            "inspect": [labels, *data, "--out", out],
        }[which]
        command = [sys.executable, "-c", AT, tmp_path / "count", at, which, *options]
        kept = os.environ if compiled else os.environ | {"NUMBA_CACHE_DIR": f"{out}.compiled"}
        done = subprocess.run(list(map(str, command)), env=kept, capture_output=True, text=True)
        return done.returncode, done.stderr

    data = ["--data", digits]
    assert run(0, "whole")[0] == 0
    events = int((tmp_path / "count").read_text())
    for share in (0.1, 0.4, 0.7, 0.95):
        code, err = run(int(share * events), f"at {share}")
        assert code == 130 and "Traceback" not in err and "rror" not in err, err
