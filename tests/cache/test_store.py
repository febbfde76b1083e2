"""The store: what was committed is read back byte for byte, or the reader is told what is wrong and what to do."""

import shutil
import tempfile
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from obstore.store import LocalStore
from support.stores import (
    BLOCK_ROWS,
    BLOCKED,
    SAMPLES,
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
from zarr.storage import ObjectStore

import cache
from cache import UserError, philox
from cache import codec as codecs
from cache.store import layout


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return Path(fill(make(tmp_path_factory.mktemp("whole") / "s.zarr")).path)


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "s.zarr"))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 45), st.integers(1, 3), st.sampled_from(["fp16", "int8", "zipped"]))
def test_what_is_written_is_read(samples, block_rows, views, name):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        codec = zipped(patch)["codec"] if name == "zipped" else {"name": name, "format": 1, "classes": 5}
        path = Path(folder, "new", "a b#1%20é")
        fill(make(path, samples=samples, block_rows=block_rows, views=views, codec=codec))
        store = cache.open(str(path))
        assert store.manifest == manifest(samples=samples, block_rows=block_rows, views=views, codec=codec)
        assert store.path == path
        np.testing.assert_array_equal(store.status, status(samples))
        np.testing.assert_array_equal(store.key_hash, key_hash(samples))
        for view in range(views):
            assert_exact(store, view)
            for block in range(store.manifest.blocks):
                assert_exact_block(store, view, block)


def test_any_zarr_reader_finds_the_arrays_and_the_commits(whole):
    """2³² + CRC-32C over a block's arrays, its samples, the CRC-32C of what made it, its view and its number."""
    store = cache.open(whole)
    for kind in (whole, ObjectStore(LocalStore(whole), read_only=True)):
        arrays = dict(zarr.open_group(kind, mode="r").arrays())
        assert {name: (a.shape, a.chunks, str(a.dtype)) for name, a in arrays.items()} == {
            "pairs": ((2, 50, 26), (1, 24, 26), "uint8"),
            "weight": ((2, 50), (1, 24), "float32"),
            "digest": ((2, 50), (1, 24), "uint32"),
            "fidelity": ((2, 3, 2), (1, 1, 2), "float32"),
            "status": ((50,), (384,), "uint8"),
            "key_hash": ((50,), (384,), "uint64"),
            "commit": ((2, 3), (1, 1), "uint64"),
        }
        for name, array in arrays.items():
            chain = ["bytes", "blosc", "crc32c"] if name == "weight" else ["bytes", "crc32c"]
            assert [codec.to_dict()["name"] for codec in (array.serializer, *array.compressors)] == chain
        np.testing.assert_array_equal(arrays["status"][:], status())
        np.testing.assert_array_equal(arrays["key_hash"][:], key_hash())
        for view in range(VIEWS):
            for block, start in enumerate(range(0, SAMPLES, BLOCK_ROWS)):
                rows = slice(start, start + BLOCK_ROWS)
                stored = [arrays[name][view, rows] for name in BLOCKED[:3]] + [arrays["fidelity"][view, block]]
                for got, wanted in zip(stored, content(store, view, block), strict=True):
                    np.testing.assert_array_equal(got, wanted)
                whose = np.array([store.origin, view, block], np.uint64)
                covered = (*stored, status()[rows], key_hash()[rows], whose)
                crc = google_crc32c.value(b"".join(array.tobytes() for array in covered))
                assert arrays["commit"][view, block] == 2**32 + crc


def test_a_codec_that_packs_has_its_dither_keys_both_ways(tmp_path, monkeypatch):
    """Chunks are what the codec packs, and a CRC-32C."""
    store = fill(make(tmp_path / "s", **zipped(monkeypatch)))
    for view in range(VIEWS):
        for block in range(3):
            start, stop = store.block_range(block)
            keys = philox.dither_keys(store.manifest.seed, key_hash()[start:stop], view)
            np.testing.assert_array_equal(store.dither_keys(view, np.arange(start, stop)), keys)
            packed = store.codec.pack(content(store, view, block)[0], keys)
            assert chunk(tmp_path / "s", "pairs", view, block).read_bytes() == framed(packed)


def test_bytes_the_codec_cannot_unpack_are_damage(tmp_path, monkeypatch):
    """Their CRC-32C fits; so does that of rows packed with another view's keys, which only the commit refuses."""
    store = fill(make(tmp_path / "s", **zipped(monkeypatch)))
    file = chunk(tmp_path / "s", "pairs", 0, 1)
    rows = content(store, 0, 1)[0]
    start, stop = store.block_range(1)
    for data in (b"", b"nonsense", store.codec.pack(rows[1:], store.dither_keys(0, slice(start + 1, stop)))):
        file.write_bytes(framed(data))
        with pytest.raises(UserError, match=r"damaged: array pairs, view 0, block 1"):
            store.load_plane(0)
    file.write_bytes(framed(store.codec.pack(rows, store.dither_keys(1, slice(start, stop)))))
    with pytest.raises(UserError, match=r"damaged: array pairs, .*, view 0, block 1"):
        store.load_plane(0)
    file.write_bytes(framed(bytes(2 * rows.size + 4097)))
    with pytest.raises(UserError, match=r"found 4581 bytes in .* instead of 4 to 4580"):
        store.load_plane(0)


def test_label_bytes_are_those_of_the_pairs_chunks(whole, tmp_path):
    assert cache.open(whole).label_bytes() == 2 * 3 * (24 * 26 + 4)
    assert make(tmp_path / "empty").label_bytes() == 0
    assert fill(make(tmp_path / "few", samples=5)).label_bytes() == 2 * (5 * 26 + 4)  # no more than there are


def test_bytes_do_not_depend_on_the_order_of_writing(whole, tmp_path):
    store = make(tmp_path / "s")
    for view, block in reversed(store.missing_blocks()):
        store.write_block(view, block, *content(store, view, block))
    assert files(tmp_path / "s") == files(whole)


def test_a_block_without_a_commit_is_missing(copy):
    chunk(copy, "commit", 1, 2).unlink()
    store = cache.open(copy)
    assert store.missing_blocks() == store.missing_blocks(1) == [(1, 2)]
    assert store.missing_blocks(0) == []
    message = r"has missing blocks; found 1 of 3 missing for view 1 \(first: 2\).*fix: run precompute-teacher again"
    for read in (lambda: store.load_plane(1), lambda: store.read_block(1, 2)):
        with pytest.raises(UserError, match=message):
            read()
    assert_exact(store, 0)
    assert_exact_block(store, 1, 1)
    assert make(copy.with_name("empty")).missing_blocks() == [(v, block) for v in range(VIEWS) for block in range(3)]


def test_a_plane_can_be_loaded_into_given_memory_and_tells_how_far_it_is(whole):
    store, seen = cache.open(whole), []
    out = np.full((SAMPLES, 26), 7, np.uint8)
    plane = store.load_plane(1, out, lambda *done: seen.append(done))
    assert plane.codes is out
    np.testing.assert_array_equal(out, store.load_plane(1).codes)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for wrong in (out[1:], out.astype(np.int16), np.asfortranarray(out), out[:, :25]):
        with pytest.raises(ValueError, match=r"expected out u8 \(50, 26\)"):
            store.load_plane(1, wrong)


def test_arrays_that_are_not_the_blocks_are_a_programming_error(whole):
    store = cache.open(whole)
    pairs, weight, digest, _ = content(store, 0, 0)
    for wrong in (
        (pairs[1:], weight[1:], digest[1:]),
        (pairs[:, 1:], weight, digest),
        (pairs, weight.astype(np.float64), digest),
        (pairs, weight, digest.astype(np.int32)),
    ):
        with pytest.raises(ValueError, match="expected"):
            store.write_block(0, 0, *wrong)
    assert_exact(store, 0)


def test_rows_need_not_be_contiguous(tmp_path):
    store = make(tmp_path / "s")
    pairs, weight, digest, fidelity = content(store, 0, 0)
    store.write_block(0, 0, np.asfortranarray(pairs), np.repeat(weight, 2)[::2], np.asfortranarray(digest), fidelity)
    assert_exact_block(store, 0, 0)


# Metadata


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["pairs", "weight", "digest", "fidelity", "status", "key_hash", "commit"])
def test_no_flipped_bit_of_an_arrays_metadata_passes(whole, name, packed, monkeypatch):
    """Every bit: also the ones that would make a shape larger, as a killed extension leaves it."""
    made = manifest(**(zipped(monkeypatch) if packed else {}))
    codec = codecs.from_config(made.codec)
    sound = layout.to_json(layout.array_json(layout.arrays(made, codec)[name]))
    if not packed:
        assert sound == (whole / name / "zarr.json").read_bytes()
    assert layout.is_of(sound, name, made, codec)
    for bit in range(8 * len(sound)):
        flipped = bytearray(sound)
        flipped[bit // 8] ^= 1 << bit % 8
        assert not layout.is_of(bytes(flipped), name, made, codec), flipped


def test_no_flipped_bit_of_the_manifest_passes(copy):
    file = copy / "zarr.json"
    sound = file.read_bytes()
    assert b"1e-06" in sound  # which is as good a number with an E
    rng = np.random.default_rng(0)
    for at in range(len(sound)):
        file.write_bytes(sound[:at] + bytes([sound[at] ^ 1 << rng.integers(8)]) + sound[at + 1 :])
        with pytest.raises(UserError, match=r"store .*s\.zarr.*(zarr\.json|manifest).*fix: "):
            cache.open(copy)
    file.write_bytes(sound.replace(b"1e-06", b"1E-06"))
    with pytest.raises(UserError, match=r"zarr\.json; found ValueError: not as it was written"):
        cache.open(copy)
    file.write_bytes(sound.replace(b'"group"', b'"array"'))
    with pytest.raises(UserError, match="not as it was written"):
        cache.open(copy)
    for length in range(len(sound)):
        file.write_bytes(sound[:length])
        with pytest.raises(UserError, match=r"damaged: cannot read zarr\.json.*fix: "):
            cache.open(copy)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "1", "{}", "[" * 10**5),
        *(
            '{"zarr_format":3}',
            '{"zarr_format":3,"node_type":"array"}',
            '{"attributes":{},"node_type":1,"zarr_format":2}',
        ),
        '{"zarr_format":3,"node_type":"group","attributes":null}',
    ],
)
def test_metadata_that_is_no_group_is_refused(copy, text):
    (copy / "zarr.json").write_text(text)
    with pytest.raises(UserError, match=r"store .*s\.zarr.*fix: "):
        cache.open(copy)


def test_a_contradiction_shows_no_more_than_the_beginning_of_a_codecs_tables():
    """A basis in base64 can be tens of MB; it may be longer than any other text, too."""
    basis = "A" * 10**7
    made = manifest(codec={"name": "subspace", "basis": basis})
    with pytest.raises(UserError, match=r"another codec\.basis; found A{60}… \(10000000 characters\), expected A{60}…"):
        cache.check(made, codec={"name": "subspace", "basis": basis + "B"})
    with pytest.raises(UserError, match=r"another policy; found 'a.nb', expected x") as caught:
        cache.check(manifest(policy="a\nb"), policy="x")
    assert "\n" not in str(caught.value)


def test_a_store_of_the_first_format_is_refused_as_such(tmp_path):
    """Its metadata was zarr's own."""
    zarr.create_group(tmp_path / "s", zarr_format=3, attributes={**manifest().to_attributes(), "format": 1})
    with pytest.raises(
        UserError, match=r"unknown format; found 1, expected 2 or 3; fix: read the store with the version"
    ):
        cache.open(tmp_path / "s")


def test_arrays_that_do_not_fit_the_manifest_are_refused(copy, tmp_path):
    make(tmp_path / "other", block_rows=20)
    shutil.copy(tmp_path / "other/zarr.json", copy / "zarr.json")
    with pytest.raises(
        UserError, match=r"damaged: array pairs, .*; found .*\[1,24,26\].*expected .*\[1,20,26\].*fix: "
    ):
        cache.open(copy)


def test_an_array_smaller_than_the_manifest_says_is_refused(copy, tmp_path):
    """Larger ones are what a killed extension leaves."""
    make(tmp_path / "larger", views=3, samples=51)
    for name in ("pairs", "weight", "commit", "status"):
        shutil.copy(tmp_path / "larger" / name / "zarr.json", copy / name / "zarr.json")
    assert_exact(cache.open(copy), 1)
    make(tmp_path / "smaller", samples=49)
    shutil.copy(tmp_path / "smaller/weight/zarr.json", copy / "weight/zarr.json")
    with pytest.raises(UserError, match="array weight"):
        cache.open(copy)


# Where there is no store, or something else


def test_a_path_that_is_no_store_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    zarr.create_group(tmp_path / "group", zarr_format=3)
    facts = {"none": "no store", "file": "no zarr.json", "folder": "no zarr.json", "group": "not that of"}
    for name, fact in facts.items():
        with pytest.raises(UserError, match=f"(?=.*{tmp_path / name}).*{fact}.*fix: "):
            cache.open(tmp_path / name)
    assert not (tmp_path / "none").exists()


def test_an_existing_path_is_not_overwritten(copy, tmp_path):
    before = files(copy)
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("precious")
    for name in ("s.zarr", "file", "link", "folder"):
        assert cache.exists(tmp_path / name)
        with pytest.raises(UserError, match=f"{name} exists.*fix: "):
            make(tmp_path / name)
    with pytest.raises(UserError, match="cannot write store"):
        make(tmp_path / "file" / "below")
    assert files(copy) == before
    assert not cache.exists(tmp_path / "none")


def test_labels_without_a_manifest_are_not_taken_for_a_new_store(copy):
    """They may be another teacher's, and their commits are sound."""
    (copy / "zarr.json").unlink()
    with pytest.raises(UserError, match="exists"):
        make(copy)
    for name in (*BLOCKED, "commit"):
        shutil.rmtree(copy / name / "c")
    assert make(copy).missing_blocks()


def test_a_manifest_out_of_range_makes_no_store(tmp_path):
    with pytest.raises(UserError, match="views; found 65537"):
        make(tmp_path / "s", views=65537)
    with pytest.raises(UserError, match=r"fidelity; found .*characters"):
        make(tmp_path / "s", fidelity={"x": "y" * 2**20})
    assert list(tmp_path.iterdir()) == []


def test_samples_that_are_not_the_manifests_are_a_programming_error(tmp_path):
    for wrong in ((status(49), key_hash()), (status(), key_hash(49)), (status(), key_hash().astype(np.int64))):
        with pytest.raises(ValueError, match="expected"):
            cache.create(tmp_path / "s", manifest(), *wrong)


def test_what_a_store_is_asked_for_with_a_strange_url_is_refused():
    for url in ("ftp://host/x", "s3://", "s3:///x", "s3://bucket/x?versionId=1", "s3://bucket/x#y", "http://host/x"):
        for call in (cache.open, cache.exists, make):
            with pytest.raises(UserError, match=r"not the place of a store; found .*fix: "):
                call(url)
