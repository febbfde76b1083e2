"""One plane per machine: processes unpack a view together, hold one copy of it, and need none of them alive."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import numpy as np
import pytest
from support.stores import chunk, fill, make, zipped

import cache
from cache import Share, UserError
from cache.store import shared

WORLD = 4

_WORKER = """
import sys, os, re, zlib
from pathlib import Path
import cache
from cache.store import shared
from cache.store.blocks import Store

path, folder, rank, world, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
share, filled, fill = cache.Share("job", rank, world, Path(folder)), [], Store.fill

def counted(self, view, block, plane):
    if len(filled) == kill_at:
        plane.codes[slice(*self.block_range(block))] = 255  # half unpacked
        os.kill(os.getpid(), 9)
    filled.append(block)
    fill(self, view, block, plane)

Store.fill = counted
input()
plane = shared.load(cache.open(path), 1, share)
inodes = {line.split()[4] for line in open("/proc/self/maps") if "jda-plane" in line}
print(zlib.crc32(plane.codes), zlib.crc32(plane.weight), zlib.crc32(plane.digest), inodes.pop(), filled, flush=True)
input()
text = open("/proc/self/smaps").read().partition("jda-plane")[2]
print(re.search(r"^Pss:\\s+([0-9]+) kB", text, re.MULTILINE)[1], flush=True)
input()
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> cache.Store:
    return fill(make(tmp_path_factory.mktemp("shared") / "s", samples=500, block_rows=7))


def started(store: cache.Store, folder: Path, rank: int, kill_at: int = -1) -> subprocess.Popen:
    root = str(Path(cache.__file__).parents[1])
    arguments = [str(store.path), str(folder), str(rank), str(WORLD), str(kill_at)]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_WORKER), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )


def go(process: subprocess.Popen) -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def end(processes: list[subprocess.Popen]) -> int:
    """kB of planes that are in memory while all processes live: a page that many map counts once."""
    held = 0
    for process in processes:
        go(process)
        assert process.stdout
        held += int(process.stdout.readline())
    for process in processes:
        process.communicate("\n", timeout=60)
        assert process.returncode == 0
    return held


def answer(process: subprocess.Popen) -> tuple[list[str], list[int]]:
    assert process.stdout
    *said, blocks = process.stdout.readline().split(" ", 4)
    return said, json.loads(blocks)


def checksums(store: cache.Store) -> list[str]:
    plane = store.load_plane(1)
    return [str(zlib.crc32(array)) for array in (plane.codes, plane.weight, plane.digest)]


def test_processes_unpack_each_block_once_into_one_copy_and_leave_no_name(store, tmp_path):
    processes = [started(store, tmp_path, rank) for rank in range(WORLD)]
    for process in processes:
        go(process)
    answers = [answer(process) for process in processes]
    assert all(said[:3] == checksums(store) for said, _ in answers)
    assert len({said[3] for said, _ in answers}) == 1, "one file in memory"
    assert sorted(block for _, blocks in answers for block in blocks) == list(range(store.manifest.blocks))
    assert os.listdir(tmp_path) == []  # while all of them still hold it
    plane = store.manifest.samples * (store.codec.row_bytes + 8)
    assert end(processes) * 1024 < 1.1 * plane + 8192  # of which a page of locks, and one that a plane ends in


def test_a_process_that_is_killed_leaves_its_block_to_the_others(store, tmp_path):
    """In the middle of its second block; the others give the same labels."""
    killed, *others = [started(store, tmp_path, rank, kill_at=1 if rank == 0 else -1) for rank in range(WORLD)]
    killed.communicate("\n", timeout=60)
    assert killed.returncode == -signal.SIGKILL
    for process in others:
        go(process)
    answers = [answer(process) for process in others]
    assert all(said[:3] == checksums(store) for said, _ in answers)
    assert len({said[3] for said, _ in answers}) == 1 and os.listdir(tmp_path) == []
    end(others)


def test_what_a_killed_job_left_is_removed_and_what_a_living_one_holds_is_not(store, tmp_path):
    """Of a job of two, of which one has not come yet."""
    plane = shared.load(store, 0, Share("a", 0, 2, tmp_path))
    shared.load(store, 0, Share("b", 0, 1, tmp_path))
    assert len(os.listdir(tmp_path)) == 1
    np.testing.assert_array_equal(plane.codes, store.load_plane(0).codes)
    del plane
    shared.load(store, 0, Share("b", 0, 1, tmp_path))
    assert os.listdir(tmp_path) == []


def test_planes_of_a_job_are_shared_and_damage_is_named(tmp_path, monkeypatch):
    store = fill(make(tmp_path / "s", **zipped(monkeypatch)))
    share, seen = Share("job", 0, 1, tmp_path / "memory"), []
    share.folder.mkdir()
    for plane in cache.planes(store, [1, 0], share=share, progress=lambda *done: seen.append(done)):
        expected = store.load_plane(plane.view)
        for name in ("codes", "weight", "digest", "good"):
            np.testing.assert_array_equal(getattr(plane, name), getattr(expected, name))
    assert seen == [(1, 3), (2, 3), (3, 3)] * 2
    chunk(tmp_path / "s", "pairs", 1, 2).unlink()
    with pytest.raises(UserError, match="damaged: array pairs, view 1, block 2"):
        shared.load(store, 1, share)
    chunk(tmp_path / "s", "commit", 1, 2).unlink()
    with pytest.raises(UserError, match="1 of 3 missing for view 1"):
        shared.load(store, 1, share)


def test_without_room_in_memory_the_plane_is_in_the_folder(store, tmp_path, monkeypatch):
    full = os.statvfs_result([4096, 4096, 1, 1, 1, 1, 1, 1, 0, 255])
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    share = Share("job", 0, 2, tmp_path / "memory")
    (plane,) = cache.planes(store, [0], share=share, folder=tmp_path)
    assert [name.startswith("jda-plane-") for name in os.listdir(tmp_path)] == [True]
    np.testing.assert_array_equal(plane.codes, store.load_plane(0).codes)


def test_a_folder_that_cannot_hold_it_is_refused(store, tmp_path):
    with pytest.raises(UserError, match=r"cannot map a plane in .*none; found No such file .*bytes wanted.*fix: "):
        shared.load(store, 0, Share("job", 0, 1, tmp_path / "none"))
