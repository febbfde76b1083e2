"""Labels of every released format stay readable for ever: frozen examples, written once by fixtures/make.py."""

import base64
import json
import shutil
import zlib
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import zarr
from support.stores import framed, manifest
from support.subspace import U, reference_decode

import cache
from cache import codec as codecs
from cache.codec import subspace
from cache.codec.features import Features
from cache.codec.subspace import Subspace
from cache.store import beside

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("*.json"))


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_a_frozen_example_reads_as_it_did(path):
    """Pack and unpack are exact; decoding is, but for the rounding of float32."""
    frozen = json.loads(path.read_text())
    codec = codecs.from_config(frozen["config"])
    assert path.stem == f"{codec.config['name']}-{codec.config['format']}"
    assert codec.config == frozen["config"]
    stream = np.array([int(key) for key in frozen["stream"]], np.uint64)
    rows = np.frombuffer(bytes.fromhex("".join(frozen["rows"])), np.uint8).reshape(len(stream), -1)
    expected = np.array(frozen["decoded"], np.float32)
    for packed, keys in ((frozen["packed"], stream), (frozen["packed_with_keys"], None)):
        np.testing.assert_array_equal(codec.unpack(bytes.fromhex(packed), keys), rows)
        assert codec.pack(rows, keys).hex() == packed
    decoded = codec.decode(rows, stream)
    np.testing.assert_array_equal(codec.encode(np.array(frozen["logits"], np.float32), stream), rows)
    bound = 2 * reference_decode(codec, rows, stream)[1] if isinstance(codec, Subspace) else 0
    if isinstance(codec, Features):
        weight, off = codec.head[0].astype(np.float64), reference_decode(codec.code, rows, stream)
        size = np.abs(off[0]) @ np.abs(weight.T) + np.abs(codec.head[1])
        bound = 2 * (off[1] @ np.abs(weight.T) + (codec.width + 2) * U * size)
    assert (np.abs(decoded.astype(np.float64) - expected) <= bound).all()


def test_every_codec_has_a_frozen_example():
    assert {path.stem.split("-")[0] for path in FIXTURES} == {*codecs.NAMES, "features"}


def test_the_frozen_subspaces_have_bytes_and_nibbles_on_the_trellis_and_some_off_it():
    found = [json.loads(path.read_text())["config"] for path in FIXTURES if path.stem.startswith("subspace")]
    assert [config["format"] for config in found] == list(subspace.CONFIG_FORMATS)
    for config in found:
        assert 0 < config["wide"] < np.max(config["trellis"]) < config["dims"]


# Stores


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent / "fixtures/store").glob("*.json")), ids=lambda p: p.stem
)
def test_a_frozen_store_reads_as_it_did_and_takes_blocks(path, tmp_path):
    """Its labels, w, and the checksums of both views' pixels."""
    frozen = json.loads(path.read_text())
    for name, text in frozen["files"].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(base64.b64decode(text))
    store = cache.open(tmp_path)
    assert store.manifest.format == int(path.stem.partition("-")[2])
    rows = np.frombuffer(bytes.fromhex("".join(frozen["rows"])), np.uint8).reshape(5, -1)
    weight, digest = np.array(frozen["weight"], np.float32), np.array(frozen["digest"], np.uint32)
    pairs = [zlib.crc32(both.tobytes()) for both in digest]
    plane = store.load_plane(0)
    np.testing.assert_array_equal(plane.codes, rows)
    np.testing.assert_allclose(plane.weight, weight, rtol=0, atol=0 if store.manifest.format == 2 else 1e-6)
    np.testing.assert_array_equal(plane.digest, pairs)
    np.testing.assert_array_equal(store.status, frozen["status"])
    store.write_block(0, 0, rows[:3], weight[:3], digest[:3], (0.25, 1.0))
    # What zstd makes of w may differ from version to version.
    same = [name for name in frozen["files"] if store.manifest.format == 2 or not name.startswith("weight")]
    written = {name: base64.b64encode((tmp_path / name).read_bytes()).decode() for name in same}
    assert written == {name: frozen["files"][name] for name in same}


@pytest.fixture(scope="module")
def thousand(tmp_path_factory) -> tuple[cache.Store, np.ndarray]:
    """A store of 1000 classes, filled, and what it was filled with."""
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(96, 2, 20)) @ rng.normal(size=(20, 1000))).astype(np.float32)
    codec = codecs.fit("subspace", logits, kl=0.05)
    made = manifest(classes=1000, samples=96, views=1, block_rows=40, codec=codec.config)
    status = np.zeros(96, np.uint8)
    store = cache.create(tmp_path_factory.mktemp("s") / "labels.zarr", made, status, rng.integers(0, 2**64, 96, "u8"))
    rows = codec.encode(logits, store.dither_keys(0, slice(None)))
    weight, digest = rng.random(96, np.float32) * 2, rng.integers(0, 2**32, (96, 2), np.uint32)
    weight[7] = np.nan
    for block in range(3):
        at = slice(*store.block_range(block))
        store.write_block(0, block, rows[at], weight[at], digest[at])
    return store, weight


def test_the_manifest_of_1000_classes_is_small(thousand):
    """The basis of even 20 directions would be 27 kB of it."""
    store, _ = thousand
    assert (store.path / "zarr.json").stat().st_size < 20_000
    assert cache.open(store.path).manifest == store.manifest and cache.open(store.path).codec == store.codec


def test_zarr_alone_reads_labels_w_digests_status_and_the_codes_arrays(thousand):
    """In this process, whose import of the package has registered the plug-ins; their entry points are declared too."""
    store, _ = thousand
    group, plane = zarr.open_group(store.path, mode="r"), store.load_plane(0)
    np.testing.assert_array_equal(group["weight"][0], plane.weight)
    np.testing.assert_array_equal(group["digest"][0], plane.digest)
    np.testing.assert_array_equal(group["status"][:], store.status)
    for name in ("mean", "basis", "scale", "beta", "spread", "gain"):
        np.testing.assert_array_equal(group[f"codec/{name}"][:], store.codec.array(name))
    np.testing.assert_array_equal(group["pairs"][0], plane.codes)
    np.testing.assert_array_equal(group["pairs"][0, 39:82:3], plane.codes[39:82:3])
    rows = group["pairs"][0, 41:43]
    np.testing.assert_array_equal(store.codec.decode(rows), store.codec.decode(plane.codes[41:43]))
    declared = {point.name: point for point in entry_points(group="zarr.codecs")}
    for name in ("jda_distill.pairs", "jda_distill.packed"):
        if name in declared:  # the package may have been installed before it had them
            assert declared[name].load().name == name


def test_zarr_finds_damage_in_packed_pairs(thousand, tmp_path):
    path = Path(shutil.copytree(thousand[0].path, tmp_path / "s"))
    file = path / "pairs/c/0/1/0"
    data = bytearray(file.read_bytes())
    data[50] ^= 1
    file.write_bytes(data)
    pairs = zarr.open_group(path, mode="r")["pairs"]
    with pytest.raises(ValueError, match=r"pairs/c/0/1/0 is damaged"):
        pairs[0, 50]
    assert pairs[0, 0].any()
    file.unlink()
    assert not pairs[0, 50].any()  # as zarr has it


def test_w_is_kept_to_a_millionth_in_fewer_than_three_bytes(thousand):
    store, weight = thousand
    kept = store.load_plane(0).weight
    np.testing.assert_allclose(kept, weight, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(np.isnan(kept), np.isnan(weight))
    spread = np.clip(1.6 + 0.2 * np.random.default_rng(1).normal(size=8192), 0, 2).astype(np.float32)
    assert len(beside.squeezed(beside.rounded(spread, beside.WEIGHT_STEP).tobytes())) < 2.7 * 8192


def test_a_pair_costs_its_label_w_a_digest_of_four_bytes_and_little_else(tmp_path):
    """Weighed by the files of a store; what does not grow with the views is the code and one number a sample."""
    rng = np.random.default_rng(0)
    samples, views = 4096, 2
    signal = rng.normal(size=(samples, 2, 12)) + 2 * rng.normal(size=(samples, 1, 12))
    logits = (signal @ rng.normal(size=(12, 100))).astype(np.float32)
    codec = codecs.fit("subspace", logits[:1024], kl=0.05)
    made = manifest(classes=100, samples=samples, views=views, block_rows=2048, codec=codec.config)
    store = cache.create(tmp_path / "s", made, np.zeros(samples, np.uint8), rng.integers(0, 2**64, samples, "u8"))
    weight = (1 + np.prod(signal, axis=1).sum(-1) / np.sqrt(np.prod((signal**2).sum(-1), axis=1))).astype(np.float32)
    packed = 0
    for view, block in store.missing_blocks():
        at = slice(*store.block_range(block))
        rows = codec.encode(logits[at], store.dither_keys(view, np.arange(samples)[at]))
        packed += len(codec.pack(rows, store.dither_keys(view, np.arange(samples)[at])))
        store.write_block(view, block, rows, weight[at], rng.integers(0, 2**32, (2048, 2), np.uint32))

    files = {path.relative_to(store.path): path.stat().st_size for path in store.path.rglob("*") if path.is_file()}
    grows = sum(size for path, size in files.items() if path.parts[0] in ("pairs", "weight", "digest", "commit"))
    pairs = views * samples
    assert packed / pairs < grows / pairs < packed / pairs + cache.BESIDE_BYTES
    padded = 16 * 2048  # samples of a chunk of key hashes (8 bytes each) and status (1)
    assert sum(files.values()) - grows < 9 * padded + 12 * 140 + 12_000
    assert sum(store.sizes().values()) == sum(files.values()), "what `pipeline store info` reports"


@pytest.mark.parametrize("name", ["mean", "basis", "scale", "beta", "spread", "gain"])
def test_a_flipped_bit_in_a_codes_array_is_found(thousand, tmp_path, name):
    """By its own CRC-32C; and where that fits, by the digest in the manifest."""
    path = Path(shutil.copytree(thousand[0].path, tmp_path / "s"))
    file = next(file for file in (path / "codec" / name / "c").rglob("*") if file.is_file())
    sound = file.read_bytes()
    flipped = bytes([sound[0] ^ 1]) + sound[1:]
    file.write_bytes(flipped)
    with pytest.raises(cache.UserError, match=rf"damaged: array codec/{name}; found CRC-32C .*fix: "):
        cache.open(path)
    file.write_bytes(framed(flipped[:-4]))
    with pytest.raises(cache.UserError, match=r"manifest: codec: arrays; found .*fix: "):
        cache.open(path)
    file.unlink()
    with pytest.raises(cache.UserError, match=rf"damaged: array codec/{name}; found no "):
        cache.open(path)
    (path / "codec" / name / "zarr.json").write_text("{}")
    with pytest.raises(cache.UserError, match=rf"damaged: array codec/{name}"):
        cache.open(path)
