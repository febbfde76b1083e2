"""Flipped bits, moved blocks, forged manifests: whatever became of a store's files, it serves no wrong label."""

import os
import shutil
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numcodecs import Blosc
from support.stores import BLOCKED, assert_exact, assert_exact_block, chunk, files, fill, framed, make, manifest, zipped

import cache
from cache import UserError
from cache.store import layout


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
        for bit in dice.integers(0, 8 * len(sound), 5):
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
    squeezed, data = Blosc("zstd", 5, Blosc.BITSHUFFLE), file.read_bytes()[:-4]
    weight = "weight" in file.parts
    values = np.frombuffer(squeezed.decode(data) if weight else data, "<f4" if weight else dtype).copy()
    change(values)
    file.write_bytes(framed(squeezed.encode(values) if weight else values.tobytes()))


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


HEADER = {"name": "subspace", "format": 2, "classes": 5, "dims": 4, "trellis": 0, "wide": 0, "arrays": "0" * 64}


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
        ({"codec": {"name": "subspace", "format": 2}}, "codec"),
        ({"codec": HEADER | {"dims": 6}}, "dims; found 6"),
        ({"codec": HEADER | {"classes": 2**20, "dims": 4096}}, "codec/mean"),
        ({"codec": HEADER | {"arrays": "x" * 10**6}}, "codec/mean"),
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
