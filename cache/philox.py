"""Philox4x32-10, vectorised: the one source of randomness: views, orders and dither.

Salmon et al., *Parallel Random Numbers: As Easy as 1, 2, 3* (SC 2011); checked against the known-answer vectors of
Random123. A counter-based generator needs no state: every word is a function of what it is for.
"""

import numpy as np

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(counter: tuple[np.ndarray | int, ...], key: int) -> np.ndarray:
    """Four random words per counter: u32, shape (*broadcast shape, 4).

    `counter` is four words (arrays broadcast against each other), `key` a 64-bit integer, low word first.
    """
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in counter))
    k0, k1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def below(words: np.ndarray, bound: np.ndarray | int) -> np.ndarray:
    """Map random words u32 to integers in [0, bound), bound < 2³¹, by the high half of the product: i64."""
    return ((words.astype(np.uint64) * np.asarray(bound, np.uint64)) >> _SHIFT).astype(np.int64)


def dither_keys(seed: int, key_hash: np.ndarray, view: int) -> np.ndarray:
    """The dither keys of stored labels: u64 (B,), a function of (seed, key hash, view)."""
    key_hash = np.asarray(key_hash, np.uint64)
    words = philox((key_hash & np.uint64(0xFFFFFFFF), key_hash >> np.uint64(32), view, 0), seed)
    return words[:, :2].copy().view("<u8")[:, 0]
