"""The container file without a container engine: its user, a read-only root, no HOME; both commands pass in it.

A mount namespace stands in for the engine: every folder of this machine is mounted again, read-only, below a root of
its own, this checkout at its place in the image. What installs is not repeated, because the environment is there.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE = (ROOT / "Containerfile").read_text().replace("\\\n", " ")
STEPS = [tuple(line.split(maxsplit=1)) for line in FILE.splitlines() if line and not line.startswith("#")]
HOME_OF_IMAGE = "/opt/jda-distill"
MAKE = ("make", "-f", f"{HOME_OF_IMAGE}/Makefile", "-o", f"{HOME_OF_IMAGE}/.venv/installed")

# New root, checkout, Python, volume, user, group and folder; then the whole environment, and the command.
NAMESPACE = f"""set -eu
new=$1 checkout=$2 python=$3 volume=$4 user=$5 group=$6 folder=$7; shift 7
mount --make-rprivate /
mount -t tmpfs tmpfs "$new"
for from in /*; do
  to=$new$from
  case $from in /proc | /sys | /dev | /tmp | /opt | /data) continue ;; esac
  if [ -L "$from" ]; then cp -P "$from" "$to"
  elif [ "$(find "$from" -maxdepth 0 -type d -perm -o+x)" ]; then
    mkdir "$to"; mount --bind "$from" "$to"; mount -o remount,bind,ro "$to"
  fi
done
if [ ! -d "$new$python" ]; then  # below a folder that is not everybody's
  mkdir -p "$new$python"; mount --bind "$python" "$new$python"; mount -o remount,bind,ro "$new$python"
fi
mkdir -p "$new/proc" "$new/dev" "$new/tmp" "$new/data" "$new{HOME_OF_IMAGE}"
mount --rbind /proc "$new/proc"
mount --rbind /dev "$new/dev"
mount -t tmpfs -o size=64m tmpfs "$new/dev/shm"
mount -t tmpfs -o mode=1777 tmpfs "$new/tmp"
mount --bind "$volume" "$new/data"
mount --bind "$checkout" "$new{HOME_OF_IMAGE}"
mount -o remount,bind,ro "$new{HOME_OF_IMAGE}"
mount -o remount,ro "$new"
exec chroot "$new" setpriv --reuid "$user" --regid "$group" --clear-groups --no-new-privs --bounding-set=-all \\
  env -i --chdir="$folder" "$@"
"""


def of(instruction: str) -> list[str]:
    return [rest for name, rest in STEPS if name == instruction]


def environment() -> dict[str, str]:
    return dict(word.split("=", 1) for line in of("ENV") for word in shlex.split(line))


def test_every_step_of_the_file_holds():
    """Instructions are known, what is copied is there, and make has the targets."""
    known = {"FROM", "RUN", "COPY", "ENV", "VOLUME", "WORKDIR", "USER", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in STEPS} <= known and STEPS[0][0] == "FROM"
    (image,) = of("FROM")
    version = tuple(map(int, re.findall(r"python:(\d+)\.(\d+)", image)[0]))
    assert version >= (3, 11)
    assert of("COPY") == [f". {HOME_OF_IMAGE}"] and of("ENTRYPOINT") == ['["pipeline"]']
    for target in re.findall(rf"make -C {HOME_OF_IMAGE} (\w+)", " ".join(of("RUN"))):
        plan = subprocess.run(["make", "-n", "-B", target], cwd=ROOT, capture_output=True, text=True, check=True)
        assert "install --quiet" in plan.stdout and "--constraint constraints.txt" in plan.stdout
    user, _, group = of("USER")[0].partition(":")
    assert int(user) >= 1000 and int(group) >= 1000 and "HOME" not in environment()
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv"} <= set(ignored) and not any((ROOT / name).is_file() for name in ignored if name != ".git")


@pytest.fixture(scope="module")
def inside(tmp_path_factory):
    """What runs a command in the file's user, folder and environment: (arguments) -> finished process."""
    folder = tmp_path_factory.mktemp("container")
    (folder / "root").mkdir()
    (folder / "volume").mkdir(mode=0o777)
    (folder / "volume").chmod(0o1777)
    user, _, group = of("USER")[0].partition(":")
    (workdir,) = of("WORKDIR")
    kept = environment() | {"PYTHONPATH": HOME_OF_IMAGE}  # the environment of this checkout may be another's

    def run(*command: str, **more: str) -> subprocess.CompletedProcess:
        line = ["unshare", "--mount", "bash", "-c", NAMESPACE, "bash"]
        line += [folder / "root", ROOT, sys.base_prefix, folder / "volume"]
        variables = [f"{name}={value}" for name, value in (kept | more).items()]
        words = [*map(str, line), user, group, workdir, *variables, *command]
        return subprocess.run(words, capture_output=True, text=True, cwd="/")

    if os.getuid() or not all(map(shutil.which, ("unshare", "setpriv", "chroot"))):
        pytest.skip("only root can make a mount namespace")
    probe = run("python", "-c", "import torch")
    if probe.returncode:
        pytest.skip(f"no mount namespace, or a Python that others cannot read: {probe.stderr.strip()[-300:]}")
    return run


@pytest.mark.slow
def test_the_root_is_read_only_and_the_user_nobody(inside):
    code = """
import os
for path in ("/a", "/opt/jda-distill/a", "/usr/a", "/etc/a"):
    try:
        open(path, "w")
    except OSError as error:
        print(error.errno in (13, 30), end=" ")
print(os.getuid(), "HOME" in os.environ, os.getcwd(), os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize)
"""
    done = inside("python", "-c", code)
    assert done.stdout.split() == ["True"] * 4 + ["10001", "False", "/data", str(64 << 20)], done.stderr


@pytest.mark.slow
def test_make_demo_passes(inside):
    """The first command of the README, in the image's folder of data; one student per loss where SEEDS says so."""
    done = inside(*MAKE, "demo")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "warning" not in done.stderr.lower(), done.stderr
    assert inside("test", "-s", "/data/demo/report.html").returncode == 0


@pytest.mark.slow
def test_make_test_passes(inside):
    """The second one. CONTAINER_TESTS narrows it, to options of pytest; a whole suite takes minutes."""
    chosen = os.environ.get("CONTAINER_TESTS", "-k 'test_idx or test_store or test_tars or test_cores'")
    options = {"PYTEST_ADDOPTS": f"-p no:cacheprovider {chosen}"}
    done = inside(*MAKE, "test", **options)
    print(done.stdout)  # for -rP: the counts, and the times where CONTAINER_TESTS asks for them
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]
