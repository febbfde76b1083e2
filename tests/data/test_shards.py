"""The cache of ranges: bounded, shared, harmless to everything else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cache.errors import UserError
from pipeline.data.shards import RangeCache

ROOT = Path(__file__).parents[2]


def kept(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.range"))


def test_the_cache_stays_under_its_bound_and_drops_what_was_not_used_longest(tmp_path):
    cache = RangeCache(tmp_path, 1000)
    for name in "abcdefghij":
        cache.put(name, name.encode() * 100)
        os.utime(tmp_path / f"{name}.range", ns=(0, ord(name)))
    assert kept(tmp_path) == 1000
    assert cache.get("a") == b"a" * 100  # used: b is now the oldest
    cache.put("k", b"k" * 150)
    assert {path.stem for path in tmp_path.glob("*.range")} == {*"adefghijk"} and kept(tmp_path) == 950
    cache.put("m", bytes(1001))
    assert cache.get("m") is None and cache.get("k") == b"k" * 150
    cache.put("n", bytes(1000))
    assert [path.stem for path in tmp_path.glob("*.range")] == ["n"]


def test_a_cache_whose_count_is_lost_or_wrong_counts_anew(tmp_path):
    for count in (b"", b"junk", b"9" * 20, b"-" * 20):
        cache = RangeCache(tmp_path, 1000)
        for number in range(30):
            (tmp_path / "bytes").write_bytes(count)
            cache.put(f"{number:02d}", bytes(90))
            assert kept(tmp_path) <= 1000
        assert cache.get("29") == bytes(90)


def test_the_cache_touches_no_file_but_its_own(tmp_path):
    (tmp_path / "notes.txt").write_bytes(bytes(5000))
    cache = RangeCache(tmp_path, 100)
    for number in range(9):
        cache.put(str(number), bytes(60))
    assert (tmp_path / "notes.txt").stat().st_size == 5000 and kept(tmp_path) == 60


def test_a_cache_folder_that_cannot_be_is_refused_and_a_full_disk_costs_speed_only(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as error:
        RangeCache(tmp_path / "file", 100)
    assert "cannot keep shards in" in str(error.value) and "fix: choose another folder" in str(error.value)

    def full(path: Path, data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    cache = RangeCache(tmp_path / "cache", 100)
    monkeypatch.setattr(Path, "write_bytes", full)
    cache.put("a", b"aaaa")
    assert cache.get("a") is None


WORKER = """
import os, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pipeline.data.shards import RangeCache
cache, seed = RangeCache(Path(sys.argv[1]), 2_000_000), int(sys.argv[2])
def work(i):
    name, size = f"{i * 7 % 50:02x}", (300 + i * 7 % 50 * 10) * 100
    found = cache.get(name)
    assert found in (None, name.encode() * size), name
    if found is None:
        cache.put(name, name.encode() * size)
    return found is not None
with ThreadPoolExecutor(4) as pool:
    hits = sum(pool.map(work, range(seed, seed + 600)))
print(hits)
"""


def test_processes_and_threads_share_a_cache_within_its_bound(tmp_path):
    """Two processes of four threads, 50 entries of 60 to 158 KB in 2 MB, looked at all the while."""
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, tmp_path, str(seed)], cwd=ROOT, stdout=subprocess.PIPE)
        for seed in (0, 25)
    ]
    looks = 0
    while any(worker.poll() is None for worker in workers):
        sizes = []
        with os.scandir(tmp_path) as entries:
            for entry in entries:
                try:
                    sizes += [entry.stat().st_size] if entry.name.endswith(".range") else []
                except FileNotFoundError:
                    continue
        looks += sum(sizes) > 1_500_000
    hits = [int(worker.communicate()[0]) for worker in workers]
    assert kept(tmp_path) <= 2_000_000 and looks > 5
    assert all(worker.returncode == 0 for worker in workers) and min(hits) > 0
    for path in tmp_path.glob("*.range"):
        assert path.read_bytes() == path.stem.encode() * (len(path.read_bytes()) // 2)
