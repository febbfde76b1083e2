"""Whatever happens to a store, it serves no wrong label: kills, full disks, flipped bits, moved blocks, lies."""

import os
import shutil
import subprocess
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import obstore
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from obstore.exceptions import GenericError
from stores import (
    BLOCKED,
    VIEWS,
    assert_exact,
    assert_exact_block,
    chunk,
    content,
    files,
    fill,
    framed,
    key_hash,
    make,
    manifest,
    status,
    zipped,
)

import cache
from cache import Store, UserError, layout
from cache.files import Files

WRITER = """
import multiprocessing, random, sys, time
from pathlib import Path
from stores import cache, content, make

SIZES = dict(samples=96, block_rows=4, views=2)

def write(path, part, parts):
    try:
        store = make(path, **SIZES)
    except cache.UserError:  # the other writer was first
        store = cache.open(path)
    for view, block in store.missing_blocks():
        if block % parts == part:
            store.write_block(view, block, *content(store, view, block))

def run(path, parts, limits):
    workers = [FORK.Process(target=write, args=(path, part, parts)) for part in range(parts)]
    for worker in workers:
        worker.start()
    for worker, limit in zip(workers, limits):
        worker.join(limit)
        worker.kill()
        worker.join()
    return [worker.exitcode for worker in workers]

FORK = multiprocessing.get_context("fork")  # obstore has no threads yet in this process
path, parts, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
took = -time.monotonic()
print(run(path / "whole", parts, [None] * parts))
took += time.monotonic()
dice, killed, number = random.Random(parts), 0, 0
while killed < kills:
    codes = run(path / str(number), parts, [dice.uniform(0, took / parts) for _ in range(parts)])
    killed, number = killed + codes.count(-9), number + 1
    print(codes)
"""
"""Starts `parts` processes that together make and fill a store, and kills each at a random moment; many times."""


def python(script: str, *arguments: object) -> str:
    """Output of a script that finds this repository's modules."""
    paths = os.pathsep.join(str(folder) for folder in Path(__file__).parents[:2])
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


@pytest.mark.parametrize("differing", ["seed", "samples", "nothing"])
def test_of_many_that_create_at_once_one_wins(tmp_path, differing):
    for attempt in range(10):
        path, start, outcomes = tmp_path / str(attempt), threading.Barrier(4), []

        def create(number: int, path=path, start=start, outcomes=outcomes) -> None:
            changes = {"seed": {"seed": number}, "samples": {"samples": 30 + number}, "nothing": {}}[differing]
            start.wait()
            try:
                outcomes.append(make(path, **changes).manifest)
            except UserError as error:
                outcomes.append(str(error))

        threads = [threading.Thread(target=create, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = (made for made in outcomes if not isinstance(made, str))
        assert all("exists" in made for made in outcomes if isinstance(made, str))
        assert fill(cache.open(path)).manifest == winner
        assert_exact(cache.open(path), 1)


# Growing


def extend(store: Store, **changes) -> Store:
    made = manifest(**changes)
    return cache.extend(store, made, status(made.samples), key_hash(made.samples))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 50), st.integers(0, 30), st.integers(1, 30), st.integers(0, 2), st.booleans())
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


# Damage


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return Path(fill(make(tmp_path_factory.mktemp("whole") / "s.zarr")).path)


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "s.zarr"))


def read_all(path: Path) -> None:
    store = cache.open(path)
    assert not store.missing_blocks()
    for view in range(store.manifest.views):
        store.load_plane(view)


@pytest.mark.parametrize("packs", [False, True])
def test_a_flipped_bit_in_any_file_is_found_and_its_file_or_chunk_named(tmp_path, monkeypatch, packs):
    path = Path(fill(make(tmp_path / "s", **(zipped(monkeypatch) if packs else {}))).path)
    read_all(path)
    dice = np.random.default_rng(0)
    for name, sound in files(path).items():
        if name.endswith("zarr.json"):
            named = "manifest|zarr.json" if name == "zarr.json" else name
        else:
            array, _, *numbers = name.split("/")
            named = (
                f"array {array}.*{name}"
                if len(numbers) == 1
                else rf"array {array}, view {numbers[0]}, block {numbers[1]};"
            )
        for bit in dice.integers(0, 8 * len(sound), 12):
            flipped = bytearray(sound)
            flipped[bit // 8] ^= 1 << bit % 8
            (path / name).write_bytes(flipped)
            with pytest.raises(UserError, match=rf"(?=.*{named}).*fix: "):
                read_all(path)
        (path / name).write_bytes(sound)
    read_all(path)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


@pytest.mark.parametrize("damage", [flip, truncate, lengthen, empty, Path.unlink])
@pytest.mark.parametrize("name", [*BLOCKED, "commit"])
@pytest.mark.parametrize("block", [1, 2])
def test_a_damaged_chunk_is_named_and_the_fix_works(copy, name, block, damage):
    damage(chunk(copy, name, 1, block))
    store = cache.open(copy)
    if (name, damage) == ("commit", Path.unlink):
        assert store.missing_blocks() == [(1, block)]
    else:
        commit = chunk(copy, "commit", 1, block)
        message = rf"damaged: array {name}, view 1, block {block}; found .*; fix: delete {commit} and run pre"
        for read in (store.load_plane, lambda view: store.read_block(view, block)):
            with pytest.raises(UserError, match=message):
                read(1)
        commit.unlink()
    assert_exact(store, 0)
    assert fill(store).missing_blocks() == []
    assert_exact(cache.open(copy), 1)


@pytest.mark.parametrize("damage", [flip, truncate, lengthen, empty, Path.unlink])
@pytest.mark.parametrize("name", ["status", "key_hash"])
def test_damaged_samples_are_refused(copy, name, damage):
    damage(copy / name / "c/0")
    with pytest.raises(UserError, match=rf"damaged: array {name}; found .*fix: .*delete.*run precompute-teacher again"):
        cache.open(copy)


# Sound chunks in the wrong place


def swap(one: Path, other: Path) -> None:
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


@pytest.mark.parametrize("name", [*BLOCKED, "commit"])
@pytest.mark.parametrize("other", [(1, 1), (0, 0)])
def test_swapped_chunks_are_found(copy, name, other):
    """Each chunk is sound in itself; only the commit knows whose it is."""
    swap(chunk(copy, name, 0, 1), chunk(copy, name, *other))
    for view, block in ((0, 1), other):
        with pytest.raises(UserError, match=f"damaged: array .*{name if name != 'commit' else ''}.*view {view}, block"):
            cache.open(copy).read_block(view, block)


@pytest.mark.parametrize("other", [(1, 1), (0, 0)])
def test_a_whole_block_in_anothers_place_is_found(copy, other):
    """With its commit, which is that of the same samples where only the view differs."""
    for name in (*BLOCKED, "commit"):
        swap(chunk(copy, name, 0, 1), chunk(copy, name, *other))
    for view, block in ((0, 1), other):
        with pytest.raises(UserError, match=rf"damaged.*view {view}, block {block}"):
            cache.open(copy).read_block(view, block)


@pytest.mark.parametrize("changes", [{"teacher_weights": "w2"}, {"seed": 0}, {"policy": {}}, {"size": 64}])
def test_a_whole_block_of_another_store_is_found(copy, tmp_path, changes):
    fill(make(tmp_path / "other", **changes))
    for name in (*BLOCKED, "commit"):
        shutil.copy(chunk(tmp_path / "other", name, 0, 1), chunk(copy, name, 0, 1))
    with pytest.raises(UserError, match=r"damaged.*view 0, block 1"):
        cache.open(copy).load_plane(0)


def rewrite(file: Path, change: Callable[[np.ndarray], object], dtype: str = "u1") -> None:
    """Change a chunk, and let its checksum fit."""
    values = np.frombuffer(file.read_bytes()[:-4], dtype).copy()
    change(values)
    file.write_bytes(framed(values.tobytes()))


def test_swapped_rows_within_a_chunk_are_found(copy):
    def exchange(values: np.ndarray) -> None:
        rows = values.reshape(24, -1)
        rows[[3, 4]] = rows[[4, 3]]

    for name in BLOCKED[:3]:
        rewrite(chunk(copy, name, 0, 1), exchange)
        with pytest.raises(UserError, match=f"damaged: array .*{name}.*view 0, block 1"):
            cache.open(copy).load_plane(0)
        rewrite(chunk(copy, name, 0, 1), exchange)
    assert_exact(cache.open(copy), 0)


@pytest.mark.parametrize(("name", "dtype"), [("key_hash", "<u8"), ("status", "u1")])
def test_labels_of_other_samples_are_found(copy, name, dtype):
    """The sample's key has changed under its label, or a quarantined one is said to be good."""

    def change(values: np.ndarray) -> None:
        values[30] += 1

    rewrite(copy / name / "c/0", change, dtype)
    store = cache.open(copy)
    assert_exact_block(store, 0, 0)
    with pytest.raises(UserError, match=rf"damaged: array .*{name}.*, view 0, block 1"):
        store.load_plane(0)


def test_a_commit_that_is_only_a_checksum_is_no_commit(copy):
    """Without its 2³² even the right CRC is refused."""

    def change(values: np.ndarray) -> None:
        values -= np.uint64(2**32)

    rewrite(chunk(copy, "commit", 0, 0), change, "<u8")
    with pytest.raises(UserError, match=r"damaged.*view 0, block 0"):
        cache.open(copy).load_plane(0)


# Hostile manifests, checksums and all


def forge(path: Path, **changes) -> None:
    """A root whose checksum fits whatever it says."""
    attributes = {**manifest().to_attributes(), **changes}
    del attributes["crc32"]
    attributes["crc32"] = zlib.crc32(layout.json.dumps(attributes, sort_keys=True).encode())
    (path / "zarr.json").write_bytes(layout.group_json(attributes))


def assert_refused(path: Path, fact: str) -> None:
    """On one line, and without taking memory for what is not there."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=fact) as caught:
            read_all(path)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"samples": 2**40}, "block_rows; found .*blocks"),
        ({"samples": 2**40, "block_rows": 2**20}, "pairs"),
        ({"views": 2**16}, "pairs"),
        ({"classes": 2**20}, "codec.classes"),
        ({"classes": 2**20, "codec": {"name": "fp16", "format": 1, "classes": 2**20}}, "pairs"),
        (
            {
                "samples": 2**30,
                "classes": 2**20,
                "codec": {"name": "fp16", "format": 1, "classes": 2**20},
                "block_rows": 1024,
            },
            "block_rows; found 'blocks of",
        ),
        ({"codec": {"name": "x" * 10**6, "format": 1, "classes": 5}}, "codec"),
        ({"codec": {"x" * 10**6: 1}}, "codec"),
        ({"policy": {"x": [[]] * 10**6}}, "policy; found .*characters|more values"),
        ({"policy": {"x": list(range(2**20))}}, "more values"),
        ({"x" * 10**6: 1}, "fields"),
        ({"format": "x" * 10**6}, "unknown format"),
        ({"teacher": "x" * 10**6}, "teacher"),
        ({"mean": [0.5] * 10**5}, "mean"),
    ],
)
def test_a_hostile_manifest_is_refused(copy, changes, fact):
    forge(copy, **changes)
    assert_refused(copy, fact)


def test_arrays_of_a_hostile_manifest_are_read_only_as_far_as_they_are_there(copy):
    """Metadata that fits a manifest of 2⁴⁰ samples, and chunks that do not."""
    forge(copy, samples=2**40, block_rows=2**20)
    made = manifest(samples=2**40, block_rows=2**20)
    for name, array in layout.arrays(made, cache.codec.from_config(made.codec)).items():
        (copy / name / "zarr.json").write_bytes(layout.to_json(layout.array_json(array)))
    assert_refused(copy, "damaged: array status; found 388 bytes")
    (copy / "status/c/0").write_bytes(framed(bytes(2**14)))
    assert_refused(copy, "damaged: array status; found no .*status/c/1")


def test_a_root_of_absurd_size_is_not_read(copy):
    with open(copy / "zarr.json", "r+b") as file:
        file.truncate((1 << 28) + 1)  # a hole
    assert_refused(copy, r"zarr\.json.*found .*268435457 bytes")
    os.truncate(copy / "pairs/zarr.json", 1 << 30)
    forge(copy)
    assert_refused(copy, r"pairs/zarr\.json.*found .*1073741824 bytes")


def test_paths_in_a_manifest_lead_nowhere(copy, tmp_path):
    """Its texts are shown, never opened; a store's files have names made of numbers."""
    secret = tmp_path / "secret"
    secret.write_text("x")
    forge(
        copy, dataset=f"../{secret}", teacher=str(secret), teacher_weights="file:///etc/passwd", versions={"../": "x"}
    )
    shutil.rmtree(copy / "commit/c")
    store = cache.open(copy)
    fill(store)
    assert_exact(store, 1)
    assert {entry.name for entry in tmp_path.iterdir()} == {"s.zarr", "secret"}
    assert secret.read_text() == "x"
