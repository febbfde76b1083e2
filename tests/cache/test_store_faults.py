"""Kills and full disks: whatever stops a writer, a store is left whole and can be completed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import obstore
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from obstore.exceptions import GenericError
from support.stores import (
    BLOCKED,
    VIEWS,
    assert_exact,
    assert_exact_block,
    chunk,
    content,
    files,
    fill,
    key_hash,
    make,
    manifest,
    status,
    zipped,
)

import cache
from cache import Store, UserError
from cache.store.objects import Files

WRITER = """
import multiprocessing, os, random, sys
from pathlib import Path
from support.stores import cache, content, make

SIZES = dict(samples=96, block_rows=4, views=2)

def write(path, part, parts, told):
    try:
        store = make(path, **SIZES)
    except cache.UserError:  # the other writer was first; the store is there when its manifest is
        while not cache.exists(path):
            pass
        store = cache.open(path)
    for view, block in store.missing_blocks():
        if block % parts == part:
            os.write(told, b".")
            store.write_block(view, block, *content(store, view, block))

def run(path, parts, blocks):
    pipes = [os.pipe() for _ in range(parts)]
    workers = [FORK.Process(target=write, args=(path, part, parts, pipes[part][1])) for part in range(parts)]
    for worker in workers:
        worker.start()
    for _, end in pipes:
        os.close(end)
    for worker, (told, _), count in zip(workers, pipes, blocks):
        while count and os.read(told, 1):
            count -= 1
            if not count:
                worker.kill()
        worker.join()
        os.close(told)
    return [worker.exitcode for worker in workers]

FORK = multiprocessing.get_context("fork")  # obstore has no threads yet in this process
path, parts, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
print(run(path / "whole", parts, [0] * parts))
dice, killed, number = random.Random(parts), 0, 0
while killed < kills:
    codes = run(path / str(number), parts, [dice.randint(1, 48 // parts) for _ in range(parts)])
    killed, number = killed + codes.count(-9), number + 1
    print(codes)
"""
"""Starts `parts` processes that together make and fill a store, and kills each as it writes a random block; often."""


def python(script: str, *arguments: object) -> str:
    """Output of a script that finds this repository's modules."""
    paths = os.pathsep.join(str(folder) for folder in Path(__file__).parents[1:3])
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}
    ).stdout


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("writers", [1, 2])
def test_sigkill_at_any_moment_leaves_blocks_exact_or_missing(tmp_path, writers, kills):
    """And the store can be completed to the very bytes of one that nobody killed."""
    codes = python(WRITER, tmp_path, writers, kills).splitlines()
    assert codes[0] == str([0] * writers)
    assert sum(code.count("-9") for code in codes) >= kills
    expected, left = files(tmp_path / "whole"), set()
    for number in range(len(codes) - 1):
        path = tmp_path / str(number)
        store = cache.open(path) if cache.exists(path) else make(path, samples=96, block_rows=4, views=2)
        missing = store.missing_blocks()
        left.add(len(missing))
        for view in range(2):
            for block in range(store.manifest.blocks):
                if (view, block) not in missing:
                    assert_exact_block(store, view, block)
        fill(store)
        assert files(path) == expected
    assert len(left) > 2  # the kills fell between all sorts of blocks


class Stop(Exception):
    """Stands in for a kill: nothing more is written."""


@contextmanager
def stopped_after(changes: int) -> Iterator[list[str]]:
    """Let only so many objects be written or deleted; gives the keys of all that were wanted."""
    wanted: list[str] = []

    def limited(method: Callable) -> Callable:
        def change(self, key, *arguments):
            wanted.append(key)
            if len(wanted) > changes:
                raise Stop
            return method(self, key, *arguments)

        return change

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_put", "delete"):
            patch.setattr(Files, name, limited(getattr(Files, name)))
        yield wanted


def test_a_creation_that_was_cut_short_is_completed(tmp_path):
    make(tmp_path / "whole")
    changes = 0
    while True:
        path = tmp_path / str(changes)
        with stopped_after(changes) as wanted:
            try:
                make(path)
                break
            except Stop:
                assert not cache.exists(path)
        with pytest.raises(UserError, match=r"is not a store; found no zarr\.json"):
            cache.open(path)
        make(path)
        assert files(path) == files(tmp_path / "whole")
        changes += 1
    assert changes == 7 + 2 + 1 and wanted[-1] == "zarr.json"


def test_the_beginnings_of_another_store_are_left_alone(tmp_path):
    with stopped_after(3), pytest.raises(Stop):
        make(tmp_path / "s", samples=40)
    before = files(tmp_path / "s")
    with pytest.raises(UserError, match=r"s exists; found the beginnings of another store; fix: .*delete it"):
        make(tmp_path / "s")
    assert files(tmp_path / "s") == before
    make(tmp_path / "s", samples=40)


# Growing


def extend(store: Store, **changes) -> Store:
    made = manifest(**changes)
    return cache.extend(store, made, status(made.samples), key_hash(made.samples))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 50), st.integers(0, 30), st.integers(1, 30), st.integers(0, 2), st.booleans())
@example(10, 0, 4, 1, False)
@example(10, 3, 4, 0, False)
@example(12, 3, 4, 0, False)
def test_a_grown_store_is_the_one_that_would_have_been_made_at_once(
    tmp_path_factory, samples, more, rows, views, packs
):
    """Byte for byte; only the last block, if its rows have become more, is computed anew."""
    path = tmp_path_factory.mktemp("grown")
    with pytest.MonkeyPatch.context() as patch:
        sizes = dict(block_rows=rows, **(zipped(patch) if packs else {}))
        fill(make(path / "s", samples=samples, views=2, **sizes))
        grown = dict(samples=samples + more, views=2 + views, dataset="larger" if more else "d1", **sizes)
        store = extend(cache.open(path / "s"), **{**grown, "block_rows": 7, "versions": {}, "fidelity": {}})
        kept = {(v, b) for v in range(2) for b in range(samples // rows + (not more and samples % rows > 0))}
        expected = [(v, b) for v in range(2 + views) for b in range(store.manifest.blocks) if (v, b) not in kept]
        assert store.missing_blocks() == expected
        fill(store)
        fill(make(path / "at once", **grown))
        assert files(path / "s") == files(path / "at once")


def test_an_extension_that_was_cut_short_leaves_the_old_store_or_the_new_one(tmp_path):
    """Whatever was asked for: it can be asked for again, and something smaller too."""
    new = dict(samples=60, views=3, dataset="larger")
    fill(make(tmp_path / "old"))
    fill(make(tmp_path / "new", **new))
    changes = 0
    while True:
        path = Path(shutil.copytree(tmp_path / "old", tmp_path / str(changes)))
        with stopped_after(changes) as wanted:
            try:
                extend(cache.open(path), **new)
                break
            except Stop:
                pass
        store = cache.open(path)
        assert store.manifest == manifest()
        missing = store.missing_blocks()
        assert set(missing) <= {(0, 2), (1, 2)}
        for view in range(VIEWS):
            for block in range(3):
                if (view, block) not in missing:
                    assert_exact_block(store, view, block)
        again = Path(shutil.copytree(path, tmp_path / f"{changes} again"))
        fill(extend(cache.open(again), **new))
        assert files(again) == files(tmp_path / "new")
        fill(extend(store, samples=52, dataset="smaller"))
        assert_exact(cache.open(path), 1)
        changes += 1
    assert changes == 2 * 5 + 7 + 2 + 1 and wanted[-1] == "zarr.json"


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"views": 1}, "cannot shrink; found 1 views, expected at least 2"),
        ({"samples": 49}, "cannot shrink; found 49 samples"),
        ({"views": 3, "dataset": "d2"}, "another dataset"),
        ({"views": 3, "teacher_weights": "w2"}, "another teacher_weights"),
        ({"samples": 60, "seed": 1}, "another seed"),
    ],
)
def test_what_is_no_extension_is_refused(tmp_path, changes, fact):
    store = fill(make(tmp_path / "s"))
    before = files(tmp_path / "s")
    with pytest.raises(UserError, match=rf"{fact}.*fix: "):
        extend(store, **changes)
    for array in ("status", "key_hash"):
        given = {"status": status(60), "key_hash": key_hash(60)}
        given[array][17] += 1
        with pytest.raises(UserError, match=r"not that of store .* found 1 of 50 samples differ .* at row 17"):
            cache.extend(store, manifest(samples=60, dataset="d2"), **given)
    assert files(tmp_path / "s") == before


def test_a_store_that_is_large_enough_is_left_alone(tmp_path):
    before = files(Path(fill(make(tmp_path / "s")).path))
    assert extend(cache.open(tmp_path / "s")).missing_blocks() == []
    assert files(tmp_path / "s") == before


def test_a_store_that_has_grown_meanwhile_is_not_cut_back(tmp_path):
    store = fill(make(tmp_path / "s"))
    grown = extend(cache.open(tmp_path / "s"), samples=60, views=3, dataset="larger")
    with pytest.raises(UserError, match="cannot shrink"):
        extend(store, views=3)
    assert cache.open(tmp_path / "s").manifest == grown.manifest


# A disk that takes no more


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A file system of `size` at `path`; gives a function that mounts it again with other options."""
    path.mkdir()

    def mount(*options: str) -> None:
        done = subprocess.run(["mount", *options, str(path)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no right to mount: {done.stderr.strip()}")

    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    try:
        yield lambda options: mount("-o", f"remount,{options}")
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_leaves_blocks_exact_or_missing(tmp_path):
    sizes = dict(samples=2000, block_rows=200)  # 8 kB a block
    expected = files(Path(fill(make(tmp_path / "whole", **sizes)).path))
    with small_disk(tmp_path / "disk", "200k") as mount:
        store = make(tmp_path / "disk" / "s", **sizes)
        with pytest.raises(UserError, match=r"cannot write store .*; found No space left on device; fix: free space"):
            fill(store)
        missing = store.missing_blocks()
        assert 0 < len(missing) < 20
        for view, block in {(v, b) for v in range(VIEWS) for b in range(10)} - set(missing):
            assert_exact_block(store, view, block)
        with pytest.raises(UserError, match=r"cannot write store .*; found No space left on device"):
            make(tmp_path / "disk" / "other", **sizes)
        mount("size=20m")
        fill(cache.open(tmp_path / "disk" / "s"))
        assert files(tmp_path / "disk" / "s") == expected
        make(tmp_path / "disk" / "other", **sizes)


def test_a_read_only_disk_can_be_read(tmp_path):
    with small_disk(tmp_path / "disk", "2m") as mount:
        path = tmp_path / "disk" / "s"
        store = fill(make(path))
        mount("ro")
        assert_exact(cache.open(path), 1)
        for write in (
            lambda: store.write_block(0, 1, *content(store, 0, 1)),
            lambda: extend(store, views=3),
            lambda: make(tmp_path / "disk" / "new"),
        ):
            with pytest.raises(UserError, match=r"cannot write store .*; found Read-only file system; fix: "):
                write()
        assert_exact(cache.open(path), 1)


def test_a_disk_that_keeps_other_bytes_is_one_line(tmp_path, monkeypatch):
    store, put = make(tmp_path / "s"), Files._put

    def spoilt(self, key, data, mode) -> None:
        put(self, key, bytes(len(data)) if key.startswith("weight") else data, mode)

    monkeypatch.setattr(Files, "_put", spoilt)
    with pytest.raises(UserError, match=r"^cannot write store \S+; found other bytes [^;]*; fix: check the disk"):
        store.write_block(0, 1, *content(store, 0, 1))


@pytest.mark.parametrize("name", [*BLOCKED, "commit"])
@pytest.mark.parametrize("committed", [False, True])
def test_no_space_for_any_array_leaves_the_block_missing(tmp_path, monkeypatch, name, committed):
    """Also where a committed block is written anew: its old commit must not vouch for half of the new bytes."""
    store = fill(make(tmp_path / "s"))
    if not committed:
        chunk(tmp_path / "s", "commit", 0, 1).unlink()
    put = obstore.put

    def full(objects, key, *arguments, **options):
        if key.startswith(f"{name}/"):
            raise GenericError("Unable to copy data to file: No space left on device (os error 28)\n\nDebug source: …")
        return put(objects, key, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(obstore, "put", full)
        pairs, weight, digest, fidelity = content(store, 0, 1)
        with pytest.raises(UserError, match=r"cannot write store .*; found No space left on device; fix: free space"):
            store.write_block(0, 1, pairs[::-1], weight[::-1], digest[::-1], fidelity)
    assert store.missing_blocks() == [(0, 1)]
    assert_exact(fill(store), 0)
