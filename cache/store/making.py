"""Making a store, and growing it to more views and samples."""

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

from cache import codec as codecs
from cache.errors import UserError
from cache.store import layout
from cache.store.blocks import GROWING, ROOT, Store, padded
from cache.store.manifest import Manifest, check
from cache.store.objects import connect, framed, place_of
from cache.store.opening import open


def create(path: str | Path, manifest: Manifest, status: np.ndarray, key_hash: np.ndarray) -> Store:
    """Make an empty store at a path or URL; `status` u8 (N,) is 0 for good samples, `key_hash` u64 (N,).

    The store exists once its manifest does, which is written last; what an earlier try has left of the same store is
    completed. Raises UserError if there is anything else (of two processes at once one wins), if it cannot be
    written, or if the manifest is out of range.
    """
    _require_samples(manifest, status, key_hash)
    attributes = manifest.to_attributes()
    header, fitted = (manifest.codec, {}) if manifest.format == 2 else codecs.split(manifest.codec)
    codec = codecs.from_config(Manifest.from_attributes(attributes, arrays=fitted).codec)
    place = place_of(path)
    another = "choose another --store, or delete it"
    if exists(place):
        raise UserError(f"{place} exists", fix=another)
    files = connect(place, make=True)
    values = {layout.CODEC + name: array for name, array in fitted.items()} | {"status": status, "key_hash": key_hash}
    for key, data in _initial({**layout.codec_arrays(header), **layout.arrays(manifest, codec)}, values):
        # The first object that differs says who wins.
        if not files.create(key, data) and not files.holds(key, data):
            raise UserError(f"{place} exists", found="the beginnings of another store", fix=another)
    if not files.create(ROOT, layout.group_json(attributes)):
        raise UserError(f"{place} exists", found="a store that another process has just made", fix=another)
    return open(place)


def exists(path: str | Path) -> bool:
    """Is there anything at a path or URL but the beginnings of a store, which `create` completes?"""
    place = place_of(path)
    if isinstance(place, Path) and not place.is_dir():
        return os.path.lexists(place)
    files = connect(place)
    if not files.names() <= {*layout.BLOCK, *layout.SAMPLES, "commit", "codec"}:
        return True
    # Labels without a manifest are the remains of a store, not the beginnings of one.
    return any(files.sizes(f"{name}/c") for name in (*layout.BLOCK, "commit"))


def extend(store: Store, manifest: Manifest, status: np.ndarray, key_hash: np.ndarray) -> Store:
    """Grow a store to the views and samples of `manifest`; new samples follow the old ones.

    All else of the manifest must agree, but for the data set's fingerprint if samples are added, and block_rows,
    which stays the store's. A last block that was not full is labelled anew. Killed at any moment it leaves the
    store as it was, or that last block missing, or the new one. Not for use while another process writes.
    """
    _require_samples(manifest, status, key_hash)
    store = open(store.path)  # it may have grown meanwhile
    old = store.manifest
    for name in ("views", "samples"):
        if getattr(manifest, name) < getattr(old, name):
            expected = f"at least {getattr(old, name)}"
            fix = f"give --{name}" if name == "views" else "point --data at the data set or at a larger one"
            raise UserError(
                "a store cannot shrink", found=f"{getattr(manifest, name)} {name}", expected=expected, fix=fix
            )
    same = {name: value for name, value in manifest.identity().items() if name not in GROWING}
    check(old, **same if manifest.samples > old.samples else {**same, "dataset": manifest.dataset})
    _require_same_samples(store, status, key_hash)
    new = replace(old, dataset=manifest.dataset, samples=manifest.samples, views=manifest.views)
    attributes = new.to_attributes()
    Manifest.from_attributes(attributes, arrays={} if new.format == 2 else codecs.split(new.codec)[1])
    if new == old:
        return store
    files = store.files
    if new.samples > old.samples and old.samples % old.block_rows:
        for name, view in product(("commit", *store.block_arrays), range(old.views)):
            files.delete(store.key(name, view, old.blocks - 1))
    for key, data in _initial(layout.arrays(new, store.codec), {"status": status, "key_hash": key_hash}, old.samples):
        files.put(key, data)
    files.put(ROOT, layout.group_json(attributes))
    return open(store.path)


def _require_samples(manifest: Manifest, status: np.ndarray, key_hash: np.ndarray) -> None:
    for name, array, dtype in (("status", status, np.uint8), ("key_hash", key_hash, np.uint64)):
        if array.shape != (manifest.samples,) or array.dtype != dtype:
            raise ValueError(
                f"expected {name} {np.dtype(dtype)} ({manifest.samples},), got {array.dtype} {array.shape}"
            )


def _require_same_samples(store: Store, status: np.ndarray, key_hash: np.ndarray) -> None:
    """Raise UserError unless the first samples are the store's."""
    differ = (store.status != status[: len(store.status)]) | (store.key_hash != key_hash[: len(store.status)])
    if differ.any():
        row = int(differ.argmax())
        raise UserError(
            f"the data set is not that of store {store.path} with samples added",
            found=f"{differ.sum()} of {len(differ)} samples differ in key or status, the first at row {row}",
            expected="the store's samples first, in their order",
            fix="add samples at the end of the data set, or run precompute-teacher into another store",
        )


def _initial(
    arrays: dict[str, layout.Array], content: dict[str, np.ndarray], first: int = 0
) -> Iterator[tuple[str, bytes]]:
    """Key and content of all that a store without blocks has, but the manifest; chunks from row `first` on."""
    if any(name.startswith(layout.CODEC) for name in arrays):
        yield f"{layout.CODEC}{ROOT}", layout.group_json({})
    for name, array in arrays.items():
        yield f"{name}/{ROOT}", layout.to_json(layout.array_json(array))
    for name, values in content.items():
        rows = arrays[name].chunk[0]
        for chunk in range(first // rows, -(-len(values) // rows)):
            part = values[chunk * rows : (chunk + 1) * rows]
            yield layout.key(name, arrays[name], chunk), framed(padded(part, arrays[name]))
