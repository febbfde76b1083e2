"""The energies of the teacher's logits, which a store keeps beside w if it was made to."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from support.stores import SAMPLES, VIEWS, assert_exact, assert_exact_block, content, fill, key_hash, make, status

import cache
from cache import Manifest, UserError
from cache.store import beside, shared
from cache.store.shared import Share


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return Path(fill(make(tmp_path_factory.mktemp("energy") / "s", energy=True)).path)


def test_energies_come_back_by_block_by_plane_and_shared(whole, tmp_path):
    store = cache.open(whole)
    for view in range(VIEWS):
        assert_exact(store, view)
        for block in range(store.manifest.blocks):
            assert_exact_block(store, view, block)
    plane = shared.load(store, 1, Share("energy", 0, 1, tmp_path))
    for name in ("codes", "weight", "digest", "good", "energy"):
        np.testing.assert_array_equal(getattr(plane, name), getattr(store.load_plane(1), name))


def test_any_zarr_reader_reads_them(whole):
    group = zarr.open_group(whole, mode="r")
    assert group["energy"].shape == (VIEWS, SAMPLES, 2) and group.attrs["energy"] is True
    store = cache.open(whole)
    expected = np.concatenate([content(store, 1, block)[4] for block in range(store.manifest.blocks)])
    np.testing.assert_array_equal(group["energy"][1], expected)


def test_they_are_kept_to_a_half_of_their_step_in_four_bytes_a_pair(tmp_path):
    rows = 4096
    made = make(tmp_path / "s", energy=True, samples=rows, block_rows=rows, views=1)
    energy = (-12 + 3 * np.random.default_rng(0).normal(size=(rows, 2))).astype(np.float32)
    energy[7] = np.nan
    made.write_block(0, 0, *content(made, 0, 0)[:4], energy)
    kept = made.load_plane(0).energy
    np.testing.assert_allclose(kept, energy, rtol=0, atol=beside.ENERGY_STEP / 2)
    assert made.sizes()["energy"] < 4 * rows + 1000


def test_a_store_without_has_no_trace_of_them(tmp_path):
    store = fill(make(tmp_path / "s"))
    assert store.load_plane(0).energy is None and store.block_arrays == ("pairs", "weight", "digest", "fidelity")
    assert not (tmp_path / "s" / "energy").exists()
    assert "energy" not in json.loads((tmp_path / "s" / "zarr.json").read_text())["attributes"]


def test_copies_and_prunings_and_larger_stores_have_them(whole, tmp_path):
    store = cache.copy(cache.open(whole), tmp_path / "copy")
    assert_exact(store, 1)
    more = dataclasses.replace(store.manifest, views=VIEWS + 1, samples=SAMPLES + 9, dataset="d2")
    store = cache.extend(store, more, status(SAMPLES + 9), key_hash(SAMPLES + 9))
    for view in range(VIEWS + 1):
        missing = [block for of, block in store.missing_blocks() if of == view]
        assert missing == (list(range(3)) if view == VIEWS else [2])
    assert_exact(fill(store), VIEWS)
    store = cache.prune(store, 1)
    assert_exact(store, 0)
    assert not list((tmp_path / "copy" / "energy" / "c" / "1").glob("**/*.*"))


@pytest.mark.parametrize("harm", ["flipped", "missing", "another block's"])
def test_harm_to_them_is_noticed(whole, tmp_path, harm):
    store = Path(shutil.copytree(whole, tmp_path / "s"))
    chunk = store / "energy" / "c" / "1" / "0" / "0"
    if harm == "missing":
        chunk.unlink()
    elif harm == "flipped":
        data = bytearray(chunk.read_bytes())
        data[len(data) // 2] ^= 1
        chunk.write_bytes(data)
    else:
        chunk.write_bytes((store / "energy" / "c" / "0" / "0" / "0").read_bytes())
    with pytest.raises(UserError, match=r"damaged: array .*energy.*, view 1, block 0"):
        cache.open(store).load_plane(1)
    assert_exact(cache.open(store), 0)


def test_what_is_no_energy_is_not_written(tmp_path):
    kept, without = make(tmp_path / "with", energy=True), make(tmp_path / "without")
    energy = content(kept, 0, 0)[4]
    for store, wrong in ((kept, None), (kept, energy[:, :1]), (kept, energy.astype(np.float64)), (without, energy)):
        with pytest.raises(ValueError, match="energy: expected float32"):
            store.write_block(0, 0, *content(store, 0, 0)[:4], wrong)
    assert len(kept.missing_blocks()) == VIEWS * kept.manifest.blocks


@pytest.mark.parametrize("changes", [{"energy": False}, {"energy": 1}, {"energy": "yes"}, {"format": 2}])
def test_a_manifest_that_says_it_otherwise_is_refused(whole, changes):
    attributes = cache.open(whole).manifest.to_attributes() | changes
    with pytest.raises(UserError, match="energy; found"):
        Manifest.from_attributes(attributes)


def test_stores_with_and_without_are_not_the_same(whole):
    with pytest.raises(UserError, match="another energy; found True, expected none; fix: run precompute-teacher --ene"):
        cache.check(cache.open(whole).manifest, energy=None)
