"""Made-up codecs and their integers, followed along the trellis."""

import numpy as np
from hypothesis import strategies as st
from support.subspace import coded, dither, fields, header, integers, streams, with_coefficients

from cache.codec.subspace import Subspace

TAPS = {8: ((0,), (1, 2)), 256: ((0, 1, 6), (0, 1, 2, 5, 6, 7))}
"""States -> bits of a state: those whose sum is the parity of what may come, and those that what enters is added to."""

NOISE = 0.2466
"""Variance of the error on the trellis of 256 states, in steps squared."""


def rows_of(codec: Subspace, q: np.ndarray, stream: np.ndarray) -> np.ndarray:
    """Rows u8 (B, row_bytes) of integers (B, 2, d) and their keys, written from the format."""
    half = -(-(codec.dims - codec.wide) // 2)
    views = np.zeros((len(q), 2, codec.segment), np.uint8)
    views[..., : codec.wide] = q[..., : codec.wide] & 255
    nibbles = np.zeros((len(q), 2, 2 * half), np.int64)
    nibbles[..., : codec.dims - codec.wide] = q[..., codec.wide :] & 15
    views[..., codec.wide : codec.wide + half] = nibbles[..., :half] | nibbles[..., half:] << 4
    return np.hstack([header(stream), views.reshape(len(q), 2 * codec.segment)])


def parity(state: np.ndarray, states: int = 256) -> np.ndarray:
    """Of what a state of the shift register allows."""
    return sum(state >> bit for bit in TAPS[states][0]) & 1


def follow(state: np.ndarray, q: np.ndarray, states: int = 256) -> np.ndarray:
    """The trellis as a shift register, the newest bit lowest. What enters is bit 1 of the integer, plus taps."""
    return (2 * state + ((q >> 1) + sum(state >> bit for bit in TAPS[states][1])) % 2) % states


def as_path(q: np.ndarray, trellis: int, states: int = 256) -> np.ndarray:
    """Integers (..., d) whose leading `trellis` are a path from state 0: those of the wrong parity moved by one."""
    q, state = q.copy(), np.zeros(q.shape[:-1], np.int64)
    for i in range(trellis):
        q[..., i] ^= (q[..., i] ^ parity(state, states)) & 1
        state = follow(state, q[..., i], states)
    return q


def as_paths(q: np.ndarray, codec: Subspace) -> np.ndarray:
    """Integers (B, 2, d) that are paths of the codec's trellis in both segments."""
    states = 8 if codec.version == 1 else 256
    return np.stack([as_path(q[:, segment], codec.trellis[segment], states) for segment in range(2)], axis=1)


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
    return as_paths(q, codec)


def normal_codec(
    gain: int = 2867, spread: float = 1.0, trellis: int | tuple[int, int] = 0, version: int = 4
) -> tuple[Subspace, np.ndarray, np.ndarray]:
    """A code whose models are true, and rows of it: coefficients normal of 0.03 to 10 steps' spread."""
    sizes = np.geomspace(10, 0.03, 24) * spread
    joint = np.arange(24) < np.broadcast_to(trellis, 2)[:, None]
    error = np.where(joint, NOISE if version > 3 else 0, 0)  # which models that look ahead have too
    codec = coded(
        wide=8,
        trellis=trellis,
        scale=np.full(24, 1e-3),
        beta=np.where(joint, 1024, 256),
        spread=np.maximum(np.rint(512 * np.sqrt(np.square([sizes, 0.7 * sizes]) + error)), 1),
        gain=np.full(24, gain),
        version=version,
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
