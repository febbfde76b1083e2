"""What lies beside a pair's labels, in few bytes: w in steps of 2^-20, and one checksum of both views' pixels.

Any zarr reader opens both. w is a float32 all the same, whose last bits are zero: bits of like weight are put side by
side (Blosc's bit shuffle) and zstd takes the zeros, which leaves about 20 bits. The cosine of the decoded labels would
predict w to 0.03-0.1 at the default budget, and so save 1 to 2 more of them, but then nobody could read w alone.
"""

import zlib

import numpy as np
from numcodecs import blosc  # pyright: ignore[reportAttributeAccessIssue] - it is compiled

ENERGY_STEP = 2.0**-8
"""Of the stored energy, a number of some 10 that is compared with others of its kind."""
WEIGHT_STEP = 2.0**-20
"""Of the stored w; half of it and float32's rounding, 5.4e-7, is what w is off by at most."""
BESIDE_BYTES = 7
"""Of a pair on disk, in round figures: w 2.6, digest 4, checksums and metadata."""
BLOSC = {"cname": "zstd", "clevel": 5, "shuffle": "bitshuffle", "typesize": 4, "blocksize": 0}
"""The configuration of zarr's codec `blosc`."""
_HEADER = 16


def rounded(values: np.ndarray, step: float) -> np.ndarray:
    """f32 to whole steps; NaN stays."""
    return (np.rint(values.astype(np.float64) / step) * step).astype(np.float32)


def pair_digest(digests: np.ndarray) -> np.ndarray:
    """u32 (n,), the CRC-32 of the eight bytes of two CRC-32s u32 (n, 2), original and augmented."""
    pairs = np.ascontiguousarray(digests, "<u4").view("V8").ravel().tolist()
    return np.fromiter(map(zlib.crc32, pairs), np.uint32, len(pairs))


def most(size: int) -> int:
    """Bytes that a squeezed chunk of `size` bytes does not exceed."""
    return size + _HEADER


def squeezed(data: bytes) -> bytes:
    """A chunk of float32 as zarr's codec `blosc` has it."""
    return blosc.compress(np.frombuffer(data, "<f4"), b"zstd", BLOSC["clevel"], blosc.BITSHUFFLE, BLOSC["blocksize"])


def unsqueezed(data: np.ndarray, size: int) -> np.ndarray:
    """What `squeezed` was given, u8 (size,). Raises ValueError for bytes that are no such chunk."""
    # Before any memory is taken: the header's sizes, of the content (byte 4) and of the whole (byte 12).
    if len(data) < _HEADER or data[4:16].view("<u4")[::2].tolist() != [size, len(data)]:
        raise ValueError(f"not {size} compressed bytes")
    try:
        return np.frombuffer(blosc.decompress(data), np.uint8)
    except RuntimeError as error:
        raise ValueError(str(error)) from None
