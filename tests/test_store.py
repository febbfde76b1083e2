"""The store: what was committed is read back byte for byte, or the reader is told what is wrong and what to do."""

import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import cache
from cache import Manifest, Store, UserError
from cache import codec as codecs

VIEWS, SAMPLES, BLOCK_ROWS = 2, 50, 24  # two whole blocks and a short one
BLOCKED = ("pairs", "weight", "digest")


def manifest(**changes) -> Manifest:
    fields = dict(
        dataset="d1",
        samples=SAMPLES,
        classes=5,
        teacher="resnet",
        teacher_weights="w1",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        policy={"name": "p", "probability": 0.2, "ops": [["invert", 0.0], ["rotate", 20 / 3]]},
        base={"size": 32, "scale": [0.08, 1.0]},
        seed=2**64 - 1,
        views=VIEWS,
        size=32,
        decoder={"backend": "libjpeg-turbo"},
        codec=codecs.make("int8", classes=5).config,
        block_rows=BLOCK_ROWS,
        versions={"numpy": "2"},
    )
    return Manifest(**(fields | changes))


def status(samples: int = SAMPLES) -> np.ndarray:
    return (np.arange(samples) % 7 == 3).astype(np.uint8) * 2


def content(store: Store, view: int, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random bytes of a block: pairs, weight, digest."""
    rng = np.random.default_rng((view, block))
    start, stop = store.block_range(block)
    pairs = rng.integers(0, 256, (stop - start, store.codec.row_bytes), dtype=np.uint8)
    return pairs, rng.random(stop - start, dtype=np.float32), rng.integers(0, 2**32, (stop - start, 2), dtype=np.uint32)


def fill(store: Store) -> Store:
    for view, block in store.missing_blocks():
        store.write_block(view, block, *content(store, view, block))
    return store


def assert_exact(store: Store, view: int) -> None:
    plane = store.load_plane(view)
    expected = [content(store, view, block) for block in range(store.manifest.blocks)]
    for got, parts in zip((plane.encoded, plane.weight, plane.digest), zip(*expected, strict=True), strict=True):
        np.testing.assert_array_equal(got, np.concatenate(parts))


def files(path: Path) -> dict[str, bytes]:
    """Every file of a store, without what a killed write left beside its target."""
    found = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return {name: data for name, data in found.items() if not name.endswith(".partial")}


def chunk(path: Path, name: str, view: int, block: int) -> Path:
    return path / name / "c" / str(view) / str(block) / ("0" if name in ("pairs", "digest") else "")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return fill(cache.create(tmp_path_factory.mktemp("whole") / "s.zarr", manifest(), status())).path


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "s.zarr"))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 45), st.integers(1, 3), st.sampled_from(["fp16", "int8"]))
def test_what_is_written_is_read(samples, block_rows, views, name):
    with tempfile.TemporaryDirectory() as folder:
        made = manifest(samples=samples, block_rows=block_rows, views=views, codec=codecs.make(name, classes=5).config)
        fill(cache.create(Path(folder) / "new" / "s", made, status(samples)))
        store = cache.open(Path(folder) / "new" / "s")
        assert store.manifest == made
        np.testing.assert_array_equal(store.status, status(samples))
        for view in range(views):
            assert_exact(store, view)


def test_a_plain_zarr_reader_finds_the_arrays_and_the_commits(whole):
    """2³² + CRC-32 over the bytes of pairs, weight and digest, and a CRC-32C on every chunk."""
    group = zarr.open_group(whole, mode="r")
    store = cache.open(whole)
    arrays = dict(group.arrays())
    assert {name: (a.shape, a.chunks, str(a.dtype)) for name, a in arrays.items()} == {
        "pairs": ((2, 50, 26), (1, 24, 26), "uint8"),
        "weight": ((2, 50), (1, 24), "float32"),
        "digest": ((2, 50, 2), (1, 24, 2), "uint32"),
        "status": ((50,), (50,), "uint8"),
        "commit": ((2, 3), (1, 1), "uint64"),
    }
    for array in arrays.values():
        assert [codec.to_dict()["name"] for codec in (array.serializer, *array.compressors)] == ["bytes", "crc32c"]
    np.testing.assert_array_equal(arrays["status"][:], status())
    for view in range(VIEWS):
        for block, start in enumerate(range(0, SAMPLES, BLOCK_ROWS)):
            stored = [arrays[name][view, start : start + BLOCK_ROWS] for name in BLOCKED]
            for got, wanted in zip(stored, content(store, view, block), strict=True):
                np.testing.assert_array_equal(got, wanted)
            assert arrays["commit"][view, block] == 2**32 + zlib.crc32(b"".join(a.tobytes() for a in stored))


def test_bytes_do_not_depend_on_the_order_of_writing(whole, tmp_path):
    store = cache.create(tmp_path / "s", manifest(), status())
    for view, block in reversed(store.missing_blocks()):
        store.write_block(view, block, *content(store, view, block))
    assert files(store.path) == files(whole)


def test_a_block_without_a_commit_is_missing(copy):
    chunk(copy, "commit", 1, 2).unlink()
    store = cache.open(copy)
    assert store.missing_blocks() == store.missing_blocks(1) == [(1, 2)]
    assert store.missing_blocks(0) == []
    message = r"has missing blocks; found 1 of 3 missing for view 1 \(first: 2\).*fix: run precompute-teacher again"
    with pytest.raises(UserError, match=message):
        store.load_plane(1)
    assert_exact(store, 0)
    assert cache.create(copy.with_name("empty"), manifest(), status()).missing_blocks() == [
        (view, block) for view in range(VIEWS) for block in range(3)
    ]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, truncate, empty, Path.unlink])
@pytest.mark.parametrize("name", [*BLOCKED, "commit"])
@pytest.mark.parametrize("block", [1, 2])
def test_a_damaged_chunk_is_named_and_the_fix_works(copy, name, block, damage):
    damage(chunk(copy, name, 1, block))
    store = cache.open(copy)
    if (name, damage) == ("commit", Path.unlink):
        assert store.missing_blocks() == [(1, block)]
    else:
        commit = chunk(copy, "commit", 1, block)
        message = rf"damaged: array .*{name}.*, view 1, block {block}; found .*; fix: delete {commit} and run pre"
        with pytest.raises(UserError, match=message):
            store.load_plane(1)
        commit.unlink()
    assert_exact(store, 0)
    assert fill(store).missing_blocks() == []
    assert_exact(cache.open(copy), 1)


@pytest.mark.parametrize("name", [*BLOCKED, "commit"])
def test_swapped_chunks_are_found(copy, name):
    """Each chunk is sound in itself; only the commit knows whose it is."""
    one, other = chunk(copy, name, 0, 1), chunk(copy, name, 1, 0)
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    for view, block in ((0, 1), (1, 0)):
        with pytest.raises(UserError, match=f"damaged.*view {view}, block {block}"):
            cache.open(copy).load_plane(view)


def test_a_commit_that_is_only_a_checksum_is_no_commit(copy):
    """Without its 2³² even the right CRC-32 is refused."""
    commit = zarr.open_array(copy, path="commit", mode="r+")
    commit[0, 0] -= np.uint64(2**32)
    with pytest.raises(UserError, match=r"damaged.*view 0, block 0"):
        cache.open(copy).load_plane(0)


@pytest.mark.parametrize("damage", [flip, truncate, empty, Path.unlink])
def test_a_damaged_status_is_refused(copy, damage):
    damage(copy / "status/c/0")
    with pytest.raises(UserError, match=r"damaged: array status.*fix: .*delete.*run precompute-teacher again"):
        cache.open(copy)


@pytest.mark.parametrize("name", [".", "pairs", "weight", "digest", "status", "commit"])
def test_no_changed_byte_of_the_metadata_gives_wrong_data(copy, name):
    file = copy / name / "zarr.json"
    sound = file.read_bytes()
    refused = 0
    for at in range(0, len(sound), 9):
        for bit in (1, 16):
            file.write_bytes(sound[:at] + bytes([sound[at] ^ bit]) + sound[at + 1 :])
            try:
                store = cache.open(copy)
                assert store.manifest == manifest()
                np.testing.assert_array_equal(store.status, status())
                for view in range(VIEWS):
                    assert_exact(store, view)
            except UserError as error:
                assert "fix: " in str(error)
                refused += 1
    assert refused > len(sound) // 9


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"zarr_format":3}', '{"zarr_format":3,"node_type":"array"}', "[" * 10**5]
)
def test_metadata_that_is_no_group_is_refused(copy, text):
    (copy / "zarr.json").write_text(text)
    with pytest.raises(UserError, match=r"store .*s\.zarr.*fix: "):
        cache.open(copy)


def test_arrays_that_do_not_fit_the_manifest_are_refused(copy, tmp_path):
    other = cache.create(tmp_path / "other", manifest(block_rows=20), status())
    shutil.copy(other.path / "zarr.json", copy / "zarr.json")
    with pytest.raises(UserError, match=r"array pairs; found .*\(1, 24, 26\).*expected .*\(1, 20, 26\).*fix: "):
        cache.open(copy)


def test_a_path_that_is_no_store_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    zarr.create_group(tmp_path / "group", zarr_format=3)
    facts = {"none": "no store", "file": "no zarr.json", "folder": "no zarr.json", "group": "not that of"}
    for name, fact in facts.items():
        with pytest.raises(UserError, match=f"(?=.*{tmp_path / name}).*{fact}.*fix: check --store"):
            cache.open(tmp_path / name)
    assert not (tmp_path / "none").exists()


def test_an_existing_path_is_not_overwritten(copy, tmp_path):
    before = files(copy)
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("s.zarr", "file", "link"):
        with pytest.raises(UserError, match=f"{name} exists.*fix: "):
            cache.create(tmp_path / name, manifest(), status())
    with pytest.raises(UserError, match="cannot write store"):
        cache.create(tmp_path / "file" / "below", manifest(), status())
    assert files(copy) == before


def test_a_manifest_out_of_range_makes_no_store(tmp_path):
    with pytest.raises(UserError, match="views; found 65537"):
        cache.create(tmp_path / "s", manifest(views=65537), status())
    assert list(tmp_path.iterdir()) == []


WRITER = """
import itertools, os, signal, sys
from pathlib import Path
from test_store import cache, fill, manifest, status

def write(path, last):
    steps = itertools.count()
    def hook(event, args):
        writes = event in ("os.rename", "os.remove", "os.mkdir") or (event == "open" and args[1] in ("wb", "r+b"))
        if writes and str(args[0]).startswith(str(path.parent)) and next(steps) == last:
            os.kill(os.getpid(), signal.SIGKILL)
    path.parent.mkdir()
    sys.addaudithook(hook)
    fill(cache.create(path, manifest(samples=30, views=1), status(30)))

for last in itertools.count():
    child = os.fork()
    if not child:
        write(Path(sys.argv[1], str(last), "s"), last)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != -signal.SIGKILL:
        sys.exit(code)
"""


def test_sigkill_before_any_file_operation_leaves_blocks_exact_or_missing(tmp_path):
    """One process per moment creates and fills a store of two blocks; the last one lives to finish."""
    paths = os.pathsep.join(str(folder) for folder in Path(__file__).parents[:2])
    subprocess.run([sys.executable, "-c", WRITER, str(tmp_path)], check=True, env=os.environ | {"PYTHONPATH": paths})
    runs = sorted(tmp_path.iterdir(), key=lambda folder: int(folder.name))
    expected = files(runs.pop() / "s")
    missing_after = []
    for run in runs:
        path = run / "s"
        if path.exists():
            store = cache.open(path)
            missing = {block for _, block in store.missing_blocks()}
            missing_after.append(len(missing))
            arrays = zarr.open_group(path, mode="r")
            for block in {0, 1} - missing:
                for name, array in zip(BLOCKED, content(store, 0, block), strict=True):
                    np.testing.assert_array_equal(arrays[name][0, slice(*store.block_range(block))], array)
        else:
            missing_after.append(3)
            store = cache.create(path, manifest(samples=30, views=1), status(30))
        fill(store)
        assert_exact(store, 0)
        assert files(path) == expected
    assert missing_after == sorted(missing_after, reverse=True)
    assert set(missing_after) == {3, 2, 1}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel refuses to let any file of this process grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_no_more_leaves_the_block_missing(tmp_path):
    """Room for weight, digest and commit of a block, not for its pairs; and none at all for a new store."""
    store = cache.create(tmp_path / "s", manifest(), status())
    with files_of_at_most(300):
        with pytest.raises(UserError, match=r"cannot write store.*File too large.*fix: free space"):
            store.write_block(0, 1, *content(store, 0, 1))
        with pytest.raises(UserError, match=r"cannot write store.*File too large"):
            cache.create(tmp_path / "new", manifest(), status())
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]
    assert (0, 1) in store.missing_blocks()
    assert_exact(fill(cache.open(store.path)), 0)


@pytest.mark.parametrize("name", [*BLOCKED, "commit"])
@pytest.mark.parametrize("committed", [False, True])
def test_no_space_for_any_array_leaves_the_block_missing(copy, monkeypatch, name, committed):
    """Also where a committed block is written anew: its old commit must not vouch for half of the new bytes."""
    store = cache.open(copy)
    if not committed:
        chunk(copy, "commit", 0, 1).unlink()
    replace = os.replace

    def full(source, target, **options):
        if f"/{name}/" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(UserError, match=r"cannot write store .*; found No space left on device; fix: free space"):
            store.write_block(0, 1, *(array[::-1] for array in content(store, 0, 1)))
    assert store.missing_blocks() == [(0, 1)]
    assert_exact(fill(store), 0)


def test_arrays_that_are_not_the_blocks_are_a_programming_error(whole):
    store = cache.open(whole)
    pairs, weight, digest = content(store, 0, 0)
    for wrong in (
        (pairs[1:], weight[1:], digest[1:]),
        (pairs[:, 1:], weight, digest),
        (pairs, weight.astype(np.float64), digest),
        (pairs, weight, digest.astype(np.int32)),
    ):
        with pytest.raises(ValueError, match="expected"):
            store.write_block(0, 0, *wrong)
    assert_exact(store, 0)


def test_gather_gives_the_rows_and_refuses_quarantined_ones(whole):
    store = cache.open(whole)
    plane = store.load_plane(1)
    pairs, weight, _ = (np.concatenate(parts) for parts in zip(*(content(store, 1, b) for b in range(3)), strict=True))
    rows = np.array([49, 0, 25, 0, 23])
    encoded, w = plane.gather(rows)
    np.testing.assert_array_equal(encoded, pairs[rows])
    np.testing.assert_array_equal(w, weight[rows])
    with pytest.raises(AssertionError, match="quarantined"):
        plane.gather(np.array([0, 3]))
