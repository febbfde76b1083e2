"""The arrays of a store, and their metadata as the zarr v3 specification has it, written by hand and compared whole.

Metadata is a function of the manifest, so that a reader knows every bit of it beforehand. Only a killed
`cache.extend` leaves more: arrays that are larger than the manifest says. To tell those from damage each metadata
document has a CRC-32C of itself, the attribute ``crc32c``.
"""

import json
from dataclasses import dataclass, replace
from typing import Any

import google_crc32c
import numpy as np

from cache import codec as codecs
from cache.codec import Codec
from cache.outside import parsed
from cache.store import beside
from cache.store.manifest import Manifest
from cache.store.zarr_codecs import PACKED, PAIRS

BLOCK = ("pairs", "weight", "digest", "fidelity", "energy")
"""What makes a block, besides its commit, in the order in which it is written; not every store has all of it."""
SAMPLES = ("status", "key_hash")
"""What is there from the beginning."""
CODEC = "codec/"
"""Before the names of a code's own arrays."""
_SAMPLES_ROWS = 1 << 14  # of a chunk; less in a store of small blocks
_CODEC_CHUNK_BYTES = 1 << 26


@dataclass(frozen=True)
class Array:
    dtype: str
    """Little-endian, as the chunks have it."""
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    coded: str = "plain"
    """plain; pairs or packed: by a codec that packs, with its checksum or (format 2) without; blosc."""

    @property
    def chunk_bytes(self) -> int:
        """Of a whole chunk, unpacked and without its CRC."""
        return int(np.prod(self.chunk, dtype=object)) * np.dtype(self.dtype).itemsize


def arrays(manifest: Manifest, codec: Codec) -> dict[str, Array]:
    """The arrays by name; a chunk that is there does not change as views and samples are added, but for the last."""
    views, samples, width = manifest.views, manifest.samples, codec.row_bytes
    rows, some = min(manifest.block_rows, samples), (min(16 * manifest.block_rows, _SAMPLES_ROWS),)
    by_view = ("view", "sample")
    packed = "plain" if not codec.packed else "packed" if manifest.format == 2 else "pairs"
    if manifest.format == 2:
        weight = Array("<f4", by_view, (views, samples), (1, rows))
        digest = Array("<u4", (*by_view, "image"), (views, samples, 2), (1, rows, 2))
    else:
        weight = Array("<f4", by_view, (views, samples), (1, rows), "blosc")
        digest = Array("<u4", by_view, (views, samples), (1, rows))
    energy = {"energy": Array("<f4", (*by_view, "image"), (views, samples, 2), (1, rows, 2), "blosc")}
    return {
        "pairs": Array("<u1", (*by_view, "byte"), (views, samples, width), (1, rows, width), packed),
        "weight": weight,
        "digest": digest,
        "fidelity": Array("<f4", ("view", "block", "measure"), (views, manifest.blocks, 2), (1, 1, 2)),
        **(energy if manifest.energy else {}),
        "status": Array("<u1", ("sample",), (samples,), some),
        "key_hash": Array("<u8", ("sample",), (samples,), some),
        "commit": Array("<u8", ("view", "block"), (views, manifest.blocks), (1, 1)),
    }


def codec_arrays(header: object, where: str = "codec") -> dict[str, Array]:
    """The arrays ``codec/NAME`` of a codec's header from outside, in chunks along the first axis. Raises UserError."""
    found = {}
    for name, (dtype, axes, shape) in codecs.array_shapes(header, where).items():
        along = max(_CODEC_CHUNK_BYTES // int(np.prod(shape[1:], dtype=object)) // np.dtype(dtype).itemsize, 1)
        found[CODEC + name] = Array(dtype, axes, shape, (min(along, shape[0]), *shape[1:]))
    return found


def key(name: str, array: Array, *chunk: int) -> str:
    """The key of a chunk; the axes that are not given are not cut."""
    return "/".join(map(str, (name, "c", *chunk, *[0] * (len(array.shape) - len(chunk)))))


def group_json(attributes: object) -> bytes:
    """A group's zarr.json."""
    return to_json({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def array_json(array: Array) -> dict[str, Any]:
    """An array's zarr.json."""
    dtype = np.dtype(array.dtype)
    little = {"name": "bytes"} if dtype.itemsize == 1 else {"name": "bytes", "configuration": {"endian": "little"}}
    crc: dict[str, Any] = {"name": "crc32c"}
    chain = {
        "plain": [little, crc],
        "blosc": [little, {"name": "blosc", "configuration": beside.BLOSC}, crc],
        "packed": [{"name": PACKED, "configuration": {}}, crc],
        "pairs": [{"name": PAIRS, "configuration": {}}],
    }
    document: dict[str, Any] = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(array.shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(array.chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": dtype.type(0).item(),
        "codecs": chain[array.coded],
        "dimension_names": list(array.axes),
    }
    return {**document, "attributes": {"crc32c": google_crc32c.value(to_json(document))}}


def is_of(data: bytes, name: str, manifest: Manifest, codec: Codec) -> bool:
    """Is it the zarr.json of this array, or of one that a killed extension has grown in views or samples?"""
    expected = arrays(manifest, codec)[name]
    if data == to_json(array_json(expected)):
        return True
    try:
        document = from_json(data)
    except ValueError:
        return False
    shape = document.get("shape") if isinstance(document, dict) else None
    if not isinstance(shape, list) or len(shape) != len(expected.axes):
        return False
    if not all(type(length) is int and length >= least for length, least in zip(shape, expected.shape, strict=True)):
        return False
    sizes = dict(zip(expected.axes, shape, strict=True))
    samples = sizes.get("sample", sizes.get("block", 0) * manifest.block_rows)
    larger = replace(manifest, views=sizes.get("view", manifest.views), samples=samples)
    return data == to_json(array_json(arrays(larger, codec)[name]))


def to_json(document: object) -> bytes:
    """The one form of metadata. Raises ValueError for numbers that JSON has not."""
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode()


def from_json(data: bytes) -> Any:
    """A document from outside, in memory of the order of its text. Raises ValueError."""
    # A list costs twenty times its two brackets; no store's metadata has a hundredth part of this many values.
    if sum(data.count(mark) for mark in (b"[", b"{", b",")) > 1 << 20:
        raise ValueError("more values than any store has")
    return parsed(data)
