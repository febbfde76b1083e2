"""The entropy code of `subspace`: lossless, of the size that its models promise, and safe against hostile bytes."""

import math
import resource
import zlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_subspace import coded, codes, dither, fields, integers, streams, with_coefficients

from cache import entropy
from cache.subspace import Subspace


def rows_of(codec: Subspace, q: np.ndarray) -> np.ndarray:
    """Rows u8 (B, row_bytes) of integers (B, 2, d), written from the format."""
    half = -(-(codec.dims - codec.wide) // 2)
    rows = np.zeros((len(q), 2, codec.segment), np.uint8)
    rows[..., : codec.wide] = q[..., : codec.wide] & 255
    nibbles = np.zeros((len(q), 2, 2 * half), np.int64)
    nibbles[..., : codec.dims - codec.wide] = q[..., codec.wide :] & 15
    rows[..., codec.wide : codec.wide + half] = nibbles[..., :half] | nibbles[..., half:] << 4
    return rows.reshape(len(q), codec.row_bytes)


@st.composite
def tables(draw, codec: Subspace) -> np.ndarray:
    """Integers (B, 2, d): what is likely, anything, zeros, the extremes, or runs of one value."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = draw(st.integers(0, 12)), 2, codec.dims
    wide = np.arange(codec.dims) < codec.wide
    low, high = np.where(wide, -128, -8), np.where(wide, 127, 7)
    kind = draw(st.sampled_from(["likely", "any", "zero", "extreme", "value"]))
    if kind == "likely":
        spread = fields(codec)["spread"] / 512
        return np.rint(rng.normal(size=shape) * spread).clip(low, high).astype(np.int64)
    if kind == "any":
        return rng.integers(low, high + 1, shape)
    if kind == "zero":
        return np.zeros(shape, np.int64)
    if kind == "extreme":
        return np.where(rng.random(shape) < 0.5, low, high)
    return np.full(shape, draw(st.integers(-128, 127))).clip(low, high)


@settings(deadline=None, max_examples=150)
@given(st.data(), st.booleans())
def test_packing_is_lossless_whatever_the_rows_and_models(data, known):
    codec = data.draw(codes())
    q = data.draw(tables(codec))
    rows, stream = rows_of(codec, q), streams(len(q), seed=data.draw(st.integers(0, 99)))
    np.testing.assert_array_equal(integers(rows, codec.dims, codec.wide), q)
    packed = codec.pack(rows, stream if known else None)
    assert type(packed) is bytes
    found = codec.unpack(packed, stream if known else None)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, rows)
    if not known:
        np.testing.assert_array_equal(codec.unpack(packed, stream), rows)


@pytest.mark.parametrize("spread", [1, 2, 1 << 20])
@pytest.mark.parametrize("gain", [-32768, 0, 32767])
def test_packing_is_lossless_at_the_limits_of_the_models(spread, gain):
    """Where one value has all but the last of the probability, or all have the same; means up to 1024 steps off."""
    codec = coded(wide=13, spread=np.full((2, 24), spread), gain=np.full(24, gain))
    rng = np.random.default_rng(0)
    low, high = np.where(np.arange(24) < 13, [[-128], [127]], [[-8], [7]])
    q = np.concatenate([rng.integers(low, high + 1, (20, 2, 24)), np.zeros((9, 2, 24), np.int64), [[low, high]]])
    rows = rows_of(codec, q)
    for stream in (streams(30), None):
        packed = codec.pack(rows, stream)
        np.testing.assert_array_equal(codec.unpack(packed, stream), rows)
        # No symbol costs more than 16 bits.
        assert len(packed) <= 5 + 8 + 4 + 2 * q.size


def test_no_rows_take_a_header_and_a_state():
    codec = coded()
    for stream in (streams(0), None):
        packed = codec.pack(np.zeros((0, codec.row_bytes), np.uint8), stream)
        assert len(packed) == 13
        assert codec.unpack(packed, stream).shape == (0, codec.row_bytes)


# Size


def normal_codec(gain: int = 2867, spread: float = 1.0) -> tuple[Subspace, np.ndarray, np.ndarray]:
    """A code whose models are true, and rows of it: coefficients normal of 0.03 to 10 steps' spread."""
    sizes = np.geomspace(10, 0.03, 24) * spread
    codec = coded(
        wide=8,
        scale=np.full(24, 1e-3),
        beta=np.full(24, 256),
        spread=np.maximum(np.rint(512 * np.stack([sizes, 0.7 * sizes])), 1),
        gain=np.full(24, gain),
    )
    rng, stream = np.random.default_rng(7), streams(400)
    x = rng.normal(size=(400, 24)) * sizes
    original = np.clip(np.floor(x + (u := dither(stream, 24))[:, 0] + 0.5), *_range(codec)) - u[:, 0]
    x = np.stack([x, gain / 4096 * original + 0.7 * sizes * rng.normal(size=x.shape)], axis=1)
    return codec, codec.encode(with_coefficients(codec, x), stream), stream


def _range(codec: Subspace) -> tuple[np.ndarray, np.ndarray]:
    wide = np.arange(codec.dims) < codec.wide
    return np.where(wide, -128, -8), np.where(wide, 127, 7)


def ideal_bytes(codec: Subspace, rows: np.ndarray, stream: np.ndarray | None) -> float:
    """-sum log2 P in float64 of integers under the fitted models, P of the interval of x that leads to q.

    Without the keys P is the mean over sixteen dithers, and the original is predicted from as if it had none. A
    probability is at least 2^-16.
    """
    arrays, q = fields(codec), integers(rows, codec.dims, codec.wide).astype(np.float64)
    dithers = [dither(stream, codec.dims)] if stream is not None else (np.arange(16) - 7.5) / 16
    low, high = _range(codec)
    total = 0.0
    for u in dithers:
        u = np.broadcast_to(u, q.shape)
        original = q[:, 0] - (arrays["beta"] * u[:, 0] if stream is not None else 0)
        middle = np.stack([np.zeros_like(original), arrays["gain"] / 4096 * original], axis=1)
        edges = np.stack([np.where(q == low, -np.inf, q - 0.5), np.where(q == high, np.inf, q + 0.5)])
        below, above = torch.special.ndtr(torch.from_numpy((edges - u - middle) / (arrays["spread"] / 512))).numpy()
        total = total + (above - below)
    return -np.log2(np.maximum(total / len(dithers), 2.0**-16)).sum() / 8


@pytest.mark.parametrize("spread", [0.3, 1.0])
@pytest.mark.parametrize("known", [True, False])
def test_the_size_is_the_information_in_the_rows(known, spread):
    """But for 13 bytes of header and state, up to 4 in the last word, and at most 2 % for tables and least counts."""
    codec, rows, stream = normal_codec(spread=spread)
    keys = stream if known else None
    ideal = ideal_bytes(codec, rows, keys)
    assert ideal > 1000
    assert 0.99 * ideal - 16 <= len(codec.pack(rows, keys)) <= 1.02 * ideal + 16


def test_the_dither_and_the_original_save_what_they_tell():
    """With the keys there is less to say of coefficients below a step, and of a view that is like the original."""
    codec, rows, stream = normal_codec(spread=0.1)
    assert len(codec.pack(rows, stream)) < 0.6 * len(codec.pack(rows))
    codec, rows, stream = normal_codec()
    alone = coded(
        **{name: fields(codec)[name] for name in ("mean", "basis", "scale")},
        wide=8,
        beta=np.full(24, 256),
        spread=np.repeat(fields(codec)["spread"][:1], 2, axis=0),
        gain=np.zeros(24),
    )
    assert len(codec.pack(rows, stream)) < 0.9 * len(alone.pack(rows, stream))


# Hostile bytes


@pytest.fixture(scope="module")
def packed() -> tuple[Subspace, np.ndarray, np.ndarray, bytes, bytes]:
    codec, rows, stream = normal_codec()
    rows, stream = rows[:12], stream[:12]
    return codec, rows, stream, codec.pack(rows, stream), codec.pack(rows)


def refused_or_other(codec: Subspace, data: bytes, stream: np.ndarray | None, rows: np.ndarray) -> bool:
    try:
        found = codec.unpack(data, stream)
    except ValueError:
        return True
    assert found.dtype == np.uint8
    assert found.shape[1] == codec.row_bytes
    return found.shape != rows.shape or bool((found != rows).any())


def test_keys_are_needed_where_they_were_used_and_must_be_as_many(packed):
    codec, _, stream, known, unknown = packed
    with pytest.raises(ValueError, match="cannot be unpacked without"):
        codec.unpack(known)
    for data in (known, unknown):
        for count in (0, 11, 13):
            with pytest.raises(ValueError, match=f"12 packed rows, expected {count}"):
                codec.unpack(data, streams(count))
    assert refused_or_other(codec, known, stream + np.uint64(1), packed[1])


def test_what_was_cut_or_grew_is_refused(packed):
    codec, _, stream, known, unknown = packed
    for data, keys in ((known, stream), (unknown, stream), (unknown, None)):
        for length in range(len(data)):
            with pytest.raises(ValueError):
                codec.unpack(data[:length], keys)
        for more in (b"\0", b"\0" * 4, b"\xff" * 4, b"\0" * 400, data):
            with pytest.raises(ValueError):
                codec.unpack(data + more, keys)


def test_no_flipped_bit_goes_unseen(packed):
    codec, rows, stream, known, unknown = packed
    for data, keys in ((known, stream), (unknown, None)):
        for bit in range(8 * len(data)):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            if bit < 32 and keys is None and int.from_bytes(flipped[:4], "little") * codec.row_bytes > 1 << 26:
                continue  # see the test of memory
            assert refused_or_other(codec, bytes(flipped), keys, rows), bit


@settings(deadline=None, max_examples=150)
@given(codes(), st.binary(max_size=200), st.integers(0, 9), st.sampled_from([0, 1, 2, 255]), st.booleans())
def test_any_bytes_give_rows_or_a_value_error(codec, body, count, known, given_keys):
    data = count.to_bytes(4, "little") + bytes([known]) + body
    try:
        rows = codec.unpack(data, streams(count) if given_keys else None)
    except ValueError:
        return
    assert rows.shape == (count, codec.row_bytes)
    integers(rows, codec.dims, codec.wide)  # asserts that the padding is zero


def test_a_header_of_many_rows_costs_no_memory(packed):
    """Pages that no row was decoded to are never touched, and 1 KB of words is spent after a few rows."""
    codec, words = packed[0], packed[4][5:]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for count in ((1 << 30) // codec.row_bytes, (1 << 32) // codec.row_bytes + 1, 2**32 - 1):
        with pytest.raises(ValueError, match=r"do not end|more than"):
            codec.unpack(count.to_bytes(4, "little") + b"\0" + words)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10  # in KiB


def test_words_that_say_nothing_run_out():
    """The least that a symbol takes is -log2(1 - 15/65536) bits, so four zero words end within 600,000 symbols."""
    codec = coded(wide=0, spread=np.ones((2, 24)), gain=np.zeros(24))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for word in (b"\0", b"\xff", b"\x80"):
        with pytest.raises(ValueError, match=r"do not end"):
            codec.unpack((1 << 24).to_bytes(4, "little") + b"\0" + word * 16)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10


# The table


def test_the_table_of_the_normal_is_the_one_that_stores_were_written_with():
    """Another libm may round an erfc elsewhere: then stores written here could not be read there."""
    table = entropy._NORMAL
    assert zlib.crc32(table.astype("<i8").tobytes()) == 0x1C6C3B6C
    assert table.shape == (4097,)
    assert (table[0], table[2048], table[-1]) == (0, 32768, 65536)
    assert (np.diff(table) >= 0).all()
    np.testing.assert_array_equal(table + table[::-1], 65536)


def test_the_table_is_the_normal_distribution_to_the_nearest_count():
    """Against a series of exact fractions: phi(z) (z + z^3/3 + z^5/15 + ...), for z up to 2."""
    for index in range(2048, 2048 + 2 * 256 + 1, 32):
        z = Fraction(index - 2048, 256)
        term = total = z
        for odd in range(3, 81, 2):
            term = term * z * z / odd
            total += term
        exact = 0.5 + float(total) * math.exp(-float(z * z) / 2) / math.sqrt(2 * math.pi)
        assert abs(entropy._NORMAL[index] - 65536 * exact) <= 0.5 + 1e-6
