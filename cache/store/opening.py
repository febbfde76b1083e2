"""Opening a store: its manifest and all metadata, compared whole with what they have to be."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np

from cache import codec as codecs
from cache.errors import UserError
from cache.store import layout
from cache.store.blocks import GROWING, ROOT, Store, remake, unreadable
from cache.store.manifest import FORMAT, Manifest
from cache.store.objects import Damaged, Files, connect, each, place_of

_MAX_ROOT_BYTES = 1 << 28  # a codec's basis can be tens of MB
_MAX_JSON_BYTES = 1 << 14


def open(path: str | Path) -> Store:
    """Open a store to read it or to write its missing blocks. Raises UserError if it is none, damaged or too new."""
    place = place_of(path)
    if isinstance(place, Path) and not os.path.exists(place):
        raise _no_store(place)
    if isinstance(place, Path) and not os.path.isfile(place / ROOT):
        raise _not_a_store(place)
    files = connect(place)
    if not isinstance(place, Path) and not files.has(ROOT):
        raise _not_a_store(place) if files.names() else _no_store(place)
    manifest = _read_manifest(files)
    codec = codecs.from_config(manifest.codec)
    arrays = layout.arrays(manifest, codec)
    for name, array in arrays.items():
        _check_metadata(files, name, array, lambda data, name=name: layout.is_of(data, name, manifest, codec))
    status, key_hash = (_read_array(files, name, arrays[name]) for name in layout.SAMPLES)
    return Store(place, manifest, codec, status, key_hash, files, arrays, _origin_of(manifest))


def _read_manifest(files: Files) -> Manifest:
    try:
        data = files.get(ROOT, 0, _MAX_ROOT_BYTES).tobytes()
        document = layout.from_json(data)
    except (Damaged, ValueError) as error:
        raise unreadable(files.place, ROOT, error) from error
    attributes = document.get("attributes") if isinstance(document, dict) else None
    where, arrays = f"store {files.place}: manifest", {}
    if isinstance(attributes, dict) and attributes.get("format") == FORMAT:
        for name, array in layout.codec_arrays(attributes.get("codec"), f"{where}: codec").items():
            _check_metadata(files, name, array)
            arrays[name.removeprefix(layout.CODEC)] = _read_array(files, name, array)
    # Before the exact comparison, which a store of another format would fail.
    manifest = Manifest.from_attributes(attributes, where, arrays)
    try:
        if layout.group_json(attributes) != data:
            raise ValueError("not as it was written")
    except ValueError as error:
        raise unreadable(files.place, ROOT, error) from error
    return manifest


def _check_metadata(
    files: Files, name: str, array: layout.Array, good: Callable[[bytes], bool] = lambda data: False
) -> None:
    """Raise UserError unless an array's zarr.json is what it should be, or `good` as well."""
    key, expected = f"{name}/{ROOT}", layout.to_json(layout.array_json(array))
    try:
        data = files.get(key, 0, _MAX_JSON_BYTES).tobytes()
    except Damaged as error:
        raise unreadable(files.place, key, error) from error
    if data != expected and not good(data):
        at = next((i for i, pair in enumerate(zip(data, expected, strict=False)) if pair[0] != pair[1]), 0)
        raise UserError(
            f"store {files.place} is damaged: array {name}, {key} is not that of its manifest",
            found=ascii(data[max(0, at - 20) :][:40].decode("latin1")),
            expected=ascii(expected[max(0, at - 20) :][:40].decode()),
            fix=remake(files.place),
        )


def _read_array(files: Files, name: str, array: layout.Array) -> np.ndarray:
    """All of an array in chunks along its first axis; memory is taken for what is there, whatever the manifest says."""
    size = array.chunk_bytes
    keys = (layout.key(name, array, chunk) for chunk in range(-(-array.shape[0] // array.chunk[0])))
    try:
        parts = list(each(lambda key: files.get_chunk(key, size, size)[0], keys, files.workers))
    except Damaged as error:
        fix = remake(files.place)
        raise UserError(f"store {files.place} is damaged: array {name}", found=error, fix=fix) from error
    return np.concatenate(parts).view(array.dtype).reshape(-1, *array.shape[1:])[: array.shape[0]]


def _origin_of(manifest: Manifest) -> int:
    fields = {**manifest.identity(), "codec": manifest.header()}
    made_of = {name: value for name, value in fields.items() if name not in GROWING and value is not None}
    return google_crc32c.value(json.dumps(made_of, sort_keys=True).encode())


def _no_store(place: Path | str) -> UserError:
    return UserError(f"no store at {place}", fix="check --store, or make it with precompute-teacher")


def _not_a_store(place: Path | str) -> UserError:
    return UserError(f"{place} is not a store", found="no zarr.json", fix="check --store")
