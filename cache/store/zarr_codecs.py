"""Codecs by which zarr reads packed pairs: installed as plug-ins (entry points `zarr.codecs` of pyproject.toml).

    codes = zarr.open_group("labels.zarr", mode="r")["pairs"][0, 100:200]   # u8 (100, row_bytes)

A packed chunk can be read only with its pairs' dither keys, which are functions of the manifest's seed, the samples'
key hashes and the view. zarr tells a codec none of these, but hands one that decodes parts of chunks the key of the
chunk, beside which all of them lie. So this codec is the only one of its array, and checks the chunk's CRC-32C itself.
"""

import asyncio
from typing import TYPE_CHECKING, Any, Self, cast

import google_crc32c
import numpy as np
from zarr.abc.codec import ArrayBytesCodec, ArrayBytesCodecPartialDecodeMixin
from zarr.api.asynchronous import open_group
from zarr.core.array import AsyncArray
from zarr.registry import register_codec
from zarr.storage import StorePath

from cache import codec as codecs
from cache import philox

if TYPE_CHECKING:
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer, NDBuffer

PACKED, PAIRS = "jda_distill.packed", "jda_distill.pairs"
_BY_US = "through cache.open(...)"


class Packed(ArrayBytesCodec):
    """Of stores of format 2, whose arrays zarr can open but not read."""

    is_fixed_size = False
    name = PACKED

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Any configuration is taken; there is nothing to configure."""
        return cls()

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {"name": self.name, "configuration": {}}

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: "ArraySpec") -> int:
        """Not known beforehand."""
        raise NotImplementedError

    async def _decode_single(self, chunk_data: "Buffer", chunk_spec: "ArraySpec") -> "NDBuffer":
        raise ValueError(f"packed codes need their dither keys: read them {_BY_US}.load_plane")

    async def _encode_single(self, chunk_data: "NDBuffer", chunk_spec: "ArraySpec") -> "Buffer | None":
        raise ValueError(f"packed codes need their dither keys: write them {_BY_US}.write_block")


class Pairs(Packed, ArrayBytesCodecPartialDecodeMixin):
    """Reads codes u8 (row_bytes,) of a codec that packs; a chunk that is not there is zeros, as zarr has it.

    Chunks are checked against their own CRC-32C, not against their commits, which `cache.open` does.
    """

    name = PAIRS

    def __init__(self):
        self._opened: dict[str, tuple[codecs.Codec, int, AsyncArray]] = {}

    async def _decode_partial_single(self, byte_getter: Any, selection: Any, chunk_spec: "ArraySpec") -> Any:
        if not isinstance(byte_getter, StorePath):
            raise ValueError(f"packed codes within a shard: read them {_BY_US}.load_plane")
        chunk = await byte_getter.get(prototype=chunk_spec.prototype)
        if chunk is None:
            return None
        # .../pairs/c/VIEW/BLOCK/0
        *root, _, _, view, block, _ = byte_getter.path.split("/")
        codec, seed, key_hash = await self._open(byte_getter, "/".join(root))
        rows = chunk_spec.shape[1]
        first = int(block) * rows
        hashes = cast(np.ndarray, await key_hash.getitem(slice(first, first + rows)))
        out: Any = np.zeros(chunk_spec.shape, np.uint8)
        dither_keys = philox.dither_keys(seed, hashes, int(view))
        out[0, : len(hashes)] = await asyncio.to_thread(
            _unpacked, chunk.to_bytes(), codec, dither_keys, byte_getter.path
        )
        return chunk_spec.prototype.nd_buffer.from_ndarray_like(out)[selection]

    async def _open(self, chunk: StorePath, root: str) -> tuple[codecs.Codec, int, AsyncArray]:
        """The codec, the seed and the key hashes of the store of a chunk, read once."""
        if root not in self._opened:
            group = await open_group(store=StorePath(chunk.store, root), mode="r")
            header = cast(dict, group.attrs["codec"])
            arrays = {}
            for name in codecs.array_shapes(header):
                array = cast(AsyncArray, await group.getitem(f"codec/{name}"))
                arrays[name] = np.asarray(await array.getitem(...))
            codec = codecs.from_config(codecs.join(header, arrays))
            key_hash = cast(AsyncArray, await group.getitem("key_hash"))
            self._opened[root] = codec, int(cast(str, group.attrs["seed"])), key_hash
        return self._opened[root]


def _unpacked(chunk: bytes, codec: codecs.Codec, dither_keys: np.ndarray, key: str) -> np.ndarray:
    data, crc = chunk[:-4], int.from_bytes(chunk[-4:], "little")
    if google_crc32c.value(data) != crc:
        raise ValueError(f"{key} is damaged: another CRC-32C")
    return codec.unpack(data, dither_keys)


register_codec(PACKED, Packed)
register_codec(PAIRS, Pairs)
