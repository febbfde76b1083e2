"""Made-up codecs and their integers, followed along the trellis."""

import numpy as np
from hypothesis import strategies as st
from support.subspace import coded, dither, fields, header, integers, streams, with_coefficients

from cache.codec.subspace import Subspace


def rows_of(codec: Subspace, q: np.ndarray, stream: np.ndarray) -> np.ndarray:
    """Rows u8 (B, row_bytes) of integers (B, 2, d) and their keys, written from the format."""
    half = -(-(codec.dims - codec.wide) // 2)
    views = np.zeros((len(q), 2, codec.segment), np.uint8)
    views[..., : codec.wide] = q[..., : codec.wide] & 255
    nibbles = np.zeros((len(q), 2, 2 * half), np.int64)
    nibbles[..., : codec.dims - codec.wide] = q[..., codec.wide :] & 15
    views[..., codec.wide : codec.wide + half] = nibbles[..., :half] | nibbles[..., half:] << 4
    return np.hstack([header(stream), views.reshape(len(q), 2 * codec.segment)])


def follow(state: np.ndarray, q: np.ndarray) -> np.ndarray:
    """The trellis as a shift register of three bits: the lowest is the parity of what may come.

    What enters is bit 1 of the integer, plus the two bits that are about to leave.
    """
    return (2 * state + (((q >> 1) ^ (state >> 1) ^ (state >> 2)) & 1)) % 8


def as_path(q: np.ndarray, trellis: int) -> np.ndarray:
    """Integers (..., d) whose leading `trellis` are a path from state 0: those of the wrong parity moved by one."""
    q, state = q.copy(), np.zeros(q.shape[:-1], np.int64)
    for i in range(trellis):
        q[..., i] ^= (q[..., i] ^ state) & 1
        state = follow(state, q[..., i])
    return q


@st.composite
def tables(draw, codec: Subspace) -> np.ndarray:
    """Integers (B, 2, d): what is likely, anything, zeros, the extremes, or runs of one value."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = draw(st.integers(0, 12)), 2, codec.dims
    low, high = _range(codec)
    kind = draw(st.sampled_from(["likely", "any", "zero", "extreme", "value"]))
    q = np.zeros(shape, np.int64)
    if kind == "likely":
        q = np.rint(rng.normal(size=shape) * fields(codec)["spread"] / 512).clip(low, high).astype(np.int64)
    if kind == "any":
        q = rng.integers(low, high + 1, shape)
    if kind == "extreme":
        q = np.where(rng.random(shape) < 0.5, low, high)
    if kind == "value":
        q = np.full(shape, draw(st.integers(-128, 127))).clip(low, high)
    return as_path(q, codec.trellis)


def normal_codec(gain: int = 2867, spread: float = 1.0, trellis: int = 0) -> tuple[Subspace, np.ndarray, np.ndarray]:
    """A code whose models are true, and rows of it: coefficients normal of 0.03 to 10 steps' spread."""
    sizes = np.geomspace(10, 0.03, 24) * spread
    codec = coded(
        wide=8,
        trellis=trellis,
        scale=np.full(24, 1e-3),
        beta=np.where(np.arange(24) < trellis, 1024, 256),
        spread=np.maximum(np.rint(512 * np.stack([sizes, 0.7 * sizes])), 1),
        gain=np.full(24, gain),
    )
    rng, stream = np.random.default_rng(7), streams(400)
    x = np.repeat(rng.normal(size=(400, 1, 24)) * sizes, 2, axis=1)
    original = decoded_steps(codec, codec.encode(with_coefficients(codec, x), stream), stream)[:, 0]
    x[:, 1] = gain / 4096 * original + 0.7 * sizes * rng.normal(size=original.shape)
    return codec, codec.encode(with_coefficients(codec, x), stream), stream


def decoded_steps(codec: Subspace, rows: np.ndarray, stream: np.ndarray) -> np.ndarray:
    """q - beta u, f64 (B, 2, d)."""
    return integers(rows, codec.dims, codec.wide) - fields(codec)["beta"] * dither(stream, codec.dims)


def _range(codec: Subspace) -> tuple[np.ndarray, np.ndarray]:
    wide = np.arange(codec.dims) < codec.wide
    return np.where(wide, -128, -8), np.where(wide, 127, 7)
