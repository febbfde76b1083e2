"""Where compiled kernels are kept, and that nobody needs a place to keep them."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BOTH = """
import numpy as np
from cache.codec import entropy
from kernels.jda import enhance
out = np.zeros(16, np.uint8)
entropy.dither(np.uint64(7), 0, out)
assert out.any() and enhance.is_identity(enhance.identity())
print(enhance._CACHE)
"""
NOBODY = 65534
ANOTHER = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
READING = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")  # a checkout or a Python below /root


def run(script: str, *, prefix: tuple[str, ...] = (), **environment: str) -> str:
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    done = subprocess.run(
        [*prefix, sys.executable, "-c", script],
        env=kept | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | environment,
        cwd="/",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_users_choice_is_kept(tmp_path):
    assert run(BOTH, NUMBA_CACHE_DIR=str(tmp_path / "chosen"), HOME=str(tmp_path / "home")).startswith(
        str(tmp_path / "chosen")
    )
    assert list((tmp_path / "chosen").rglob("enhance.*.nbc")) and list((tmp_path / "chosen").rglob("entropy.*.nbc"))
    assert not (tmp_path / "home").exists()


@pytest.fixture(scope="module")
def another() -> tuple[str, ...]:
    """What runs a command as a user to whom nothing belongs."""
    if os.getuid() or not shutil.which("setpriv"):
        pytest.skip("only root can run a child as another user")
    for prefix in (ANOTHER, (*ANOTHER, *READING)):
        command = [*prefix, sys.executable, "-c", f"open({__file__!r})"]
        if not subprocess.run(command, cwd="/", capture_output=True).returncode:
            return prefix
    pytest.skip("another user cannot read this checkout or run this Python")


@pytest.mark.parametrize("temporary", [True, False])
def test_a_user_who_can_write_nothing_can_run_all(tmp_path, another, temporary):
    """As in a read-only container: neither the checkout nor HOME; with or without a temporary folder."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    os.chown(folder, NOBODY if temporary else 0, 0)
    for path in (tmp_path, *tmp_path.parents):  # one more of them is pytest's own where processes share the suite
        if Path(tempfile.gettempdir()) in path.parents:
            path.chmod(0o755)
    # TMPDIR only goes before /tmp and the current folder, which are anybody's on most machines.
    alone = f"import tempfile; tempfile._candidate_tempdir_list = lambda: [{str(folder)!r}]\n"
    found = run(alone + BOTH, prefix=another, HOME="/nonexistent")
    assert found.startswith(str(folder)) if temporary else found == "None"


def test_help_needs_no_compiler_and_no_network_library():
    """Whoever wants to know the options waits for none of them, and need not have a place for compiled code."""
    heavy = ("numba", "torch", "triton", "zarr", "obstore")
    script = f"import sys; sys.modules.update(dict.fromkeys({heavy})); from pipeline.cli import main; main(['--help'])"
    assert "train-student" in run(script)
