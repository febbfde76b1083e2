"""The entropy code of `subspace`: lossless, of the size that its models promise, and safe against hostile bytes."""

import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.subspace import coded, codes, dither, fields, integers, streams, with_coefficients
from support.trellis import _range, as_paths, decoded_steps, follow, normal_codec, parity, rows_of, tables

from cache.codec import entropy
from cache.codec.subspace import Subspace


@settings(deadline=None, max_examples=150)
@given(st.data(), st.booleans())
def test_packing_is_lossless_whatever_the_rows_and_models(data, left_out):
    """Some rows, or all, may be without labels: zeros."""
    codec = data.draw(codes())
    q = data.draw(tables(codec))
    stream = streams(len(q), seed=data.draw(st.integers(0, 99)))
    rows = rows_of(codec, q, stream)
    np.testing.assert_array_equal(integers(rows, codec.dims, codec.wide), q)
    rows[data.draw(st.lists(st.booleans(), min_size=len(q), max_size=len(q)))] = 0
    packed = codec.pack(rows, stream if left_out else None)
    assert type(packed) is bytes
    found = codec.unpack(packed, stream if left_out else None)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, rows)
    if not left_out:
        np.testing.assert_array_equal(codec.unpack(packed, stream), rows)


@pytest.mark.parametrize("trellis", [0, (7, 4), 24])
@pytest.mark.parametrize("spread", [1, 2, 1 << 20])
@pytest.mark.parametrize("gain", [-32768, 0, 32767])
def test_packing_is_lossless_at_the_limits_of_the_models(spread, gain, trellis):
    """Where one value has all but the last of the probability, or all have the same; means up to 1024 steps off."""
    codec = coded(wide=13, trellis=trellis, spread=np.full((2, 24), spread), gain=np.full(24, gain))
    rng = np.random.default_rng(0)
    low, high = _range(codec)
    q = np.concatenate([rng.integers(low, high + 1, (20, 2, 24)), np.zeros((9, 2, 24), np.int64), [[low, high]]])
    rows, stream = rows_of(codec, as_paths(q, codec), streams(30)), streams(30)
    for keys in (stream, None):
        packed = codec.pack(rows, keys)
        np.testing.assert_array_equal(codec.unpack(packed, keys), rows)
        # No symbol costs more than 16 bits.
        assert len(packed) <= (9 if keys is not None else 249) + 8 + 4 + 2 * q.size


def test_no_rows_take_a_header_and_a_state():
    codec = coded()
    for stream in (streams(0), None):
        packed = codec.pack(np.zeros((0, codec.row_bytes), np.uint8), stream)
        assert len(packed) == 13
        assert codec.unpack(packed, stream).shape == (0, codec.row_bytes)


# Keys, and rows without labels


def test_rows_packed_with_their_keys_need_none_and_take_eight_bytes_a_row_more():
    codec, rows, stream = normal_codec(trellis=12)
    own, left_out = codec.pack(rows), codec.pack(rows, stream)
    assert len(own) == len(left_out) + 8 * len(rows)
    for keys in (None, stream, stream + np.uint64(1)):  # what the rows carry counts
        np.testing.assert_array_equal(codec.unpack(own, keys), rows)


@pytest.mark.parametrize("trellis", [0, 12])
def test_rows_without_labels_cost_one_bit(trellis):
    """With them or without, the words are the same; where there is no label at all, the coder's first state, 2^32."""
    codec, rows, stream = normal_codec(trellis=trellis)
    there = np.random.default_rng(3).random(len(rows)) < 0.7
    some = np.where(there[:, None], rows, 0).astype(np.uint8)
    for keys, fewer in ((stream, stream[there]), (None, None)):
        packed, dense = codec.pack(some, keys), codec.pack(rows[there], fewer)
        np.testing.assert_array_equal(codec.unpack(packed, keys), some)
        assert np.unpackbits(np.frombuffer(packed, np.uint8, 50, 5)).tolist() == there.tolist()
        assert packed[5 + 50 :] == dense[5 + -(-there.sum() // 8) :]
        assert codec.pack(np.zeros_like(some), keys) == packed[:5] + bytes(50) + bytes([0, 0, 0, 0, 1, 0, 0, 0])


def test_rows_of_another_key_than_is_left_out_are_refused():
    """What is unpacked would have that key, and another dither; rows without labels have none."""
    codec, rows, stream = normal_codec(trellis=12)
    for row, bit in ((0, 0), (17, 31), (399, 63)):
        other = stream.copy()
        other[row] ^= np.uint64(1) << np.uint64(bit)
        with pytest.raises(ValueError, match="codes of other dither keys"):
            codec.pack(rows, other)
        without = rows.copy()
        without[row] = 0
        np.testing.assert_array_equal(codec.unpack(codec.pack(without, other), other), without)


@pytest.mark.parametrize(("wide", "used"), [(9, 17), (12, 18)])
def test_bytes_that_a_row_keeps_at_zero_must_be_zero(wide, used):
    """The code does not hold them, so they would be lost: in the header, the padding, and an odd nibble's pair."""
    codec = coded(wide=wide, trellis=5)
    assert codec.segment == 32
    rows = codec.encode(with_coefficients(codec, np.ones((3, 2, 24))), streams(3))
    places = [(at, 1) for at in range(8, 16)]
    for start in (16, 48):
        places += [(start + at, 128) for at in range(used, 32)]
        places += [(start + used - 1, 16)] if wide == 9 else []  # 8 nibbles and 7
    for at, bits in places:
        other = rows.copy()
        other[1, at] ^= bits
        for keys in (streams(3), None):
            with pytest.raises(ValueError, match="codes that no logits make"):
                codec.pack(other, keys)


# Size


def ideal_bytes(codec: Subspace, rows: np.ndarray, stream: np.ndarray) -> float:
    """-sum log2 P in float64 of integers under the fitted models, P of the interval of x that leads to q.

    P is at least 2^-16. The interval reaches half a step to either side of q - u; on the trellis, where there is every
    second integer, a whole one, and u is four times as wide. The last integers have all that is beyond them.

    A code that looks ahead has for P of a path on the trellis its density over that of all paths, see `path_bits`.
    """
    arrays, q = fields(codec), integers(rows, codec.dims, codec.wide).astype(np.float64)
    joint = np.arange(codec.dims) < np.array(codec.trellis)[:, None]
    reach, u = np.where(joint, 1, 0.5), np.where(joint, 4, 1) * dither(stream, codec.dims)
    original = decoded_steps(codec, rows, stream)[:, 0]
    middle = np.stack([np.zeros_like(original), arrays["gain"] / 4096 * original], axis=1)
    low, high = _range(codec)
    edges = np.stack(
        [np.where(q - 2 * reach < low, -np.inf, q - reach), np.where(q + 2 * reach > high, np.inf, q + reach)]
    )
    below, above = torch.special.ndtr(torch.from_numpy((edges - u - middle) / (arrays["spread"] / 512))).numpy()
    bits = -np.log2(np.maximum(above - below, 2.0**-16))
    if codec.version < 4:
        return bits.sum() / 8
    paths = [
        path_bits(q[:, v, :joint], (u + middle)[:, v, :joint], arrays["spread"][v, :joint] / 512)
        for v, joint in enumerate(codec.trellis)
    ]
    return (bits[:, ~joint].sum() + sum(paths)) / 8


def path_bits(q: np.ndarray, centre: np.ndarray, spread: np.ndarray) -> float:
    """-sum log2 of the density of paths q (B, t) over the sum of those of all paths from state 0.

    The density of a path is the product of those of its integers, which are normal around `centre` (B, t) with `spread`
    (t,). It is added up from the first coefficient to the last, over the states that a path can be in.
    """
    states = np.arange(256)
    moves = np.zeros((4, 256, 256))  # of integers mod 4, from one state to another
    for integer in range(4):
        allowed = states[parity(states) == integer % 2]
        moves[integer, allowed, follow(allowed, np.array(integer))] = 1
    reached, bits = np.where(states == 0, 1.0, 0.0) * np.ones((len(q), 1)), 0.0
    for i in range(q.shape[1]):
        integer = np.arange(-400, 401)
        near = np.exp(-(((integer - centre[:, i, None]) / spread[i]) ** 2) / 2)
        masses = [near[:, integer % 4 == kind].sum(axis=1, keepdims=True) for kind in range(4)]
        then = sum(mass * (reached @ move) for mass, move in zip(masses, moves, strict=True))
        own = np.exp(-(((q[:, i] - centre[:, i]) / spread[i]) ** 2) / 2)
        bits -= np.log2(own / then.sum(axis=1)).sum()
        reached = then / then.sum(axis=1, keepdims=True)
    return bits


@pytest.mark.parametrize(
    ("version", "trellis", "spread"),
    [
        *((3, trellis, spread) for trellis in (0, (12, 6), 12) for spread in (0.3, 1.0, 20.0)),
        *((4, trellis, spread) for trellis in ((12, 6), 24) for spread in (0.1, 0.3, 1.0, 3.0)),
    ],
)
def test_the_size_is_the_information_in_the_rows(version, trellis, spread):
    """But for 63 bytes of header and state, up to 4 in the last word, and at most 2 % for tables and least counts."""
    codec, rows, stream = normal_codec(spread=spread, trellis=trellis, version=version)
    ideal = ideal_bytes(codec, rows, stream)
    assert ideal > 400
    assert 0.99 * ideal <= len(codec.pack(rows, stream)) - 63 <= 1.02 * ideal + 4


@pytest.mark.parametrize("trellis", [0, 12])
def test_the_original_saves_what_it_tells_of_the_augmented(trellis):
    codec, rows, stream = normal_codec(trellis=trellis)
    alone = coded(
        **{name: fields(codec)[name] for name in ("mean", "basis", "scale")},
        wide=8,
        trellis=trellis,
        beta=256 * fields(codec)["beta"],
        spread=np.repeat(fields(codec)["spread"][:1], 2, axis=0),
        gain=np.zeros(24),
    )
    assert len(codec.pack(rows, stream)) < 0.9 * len(alone.pack(rows, stream))


# Hostile bytes


@pytest.fixture(scope="module", params=[0, 9], ids=lambda trellis: f"trellis {trellis}")
def packed(request) -> tuple[Subspace, np.ndarray, np.ndarray, bytes, bytes]:
    """Twelve rows, one without labels: four bits of the second byte of the map are of no row."""
    codec, rows, stream = normal_codec(trellis=request.param)
    rows, stream = rows[:12], stream[:12]
    rows[5] = 0
    return codec, rows, stream, codec.pack(rows, stream), codec.pack(rows)


def refused_or_other(codec: Subspace, data: bytes, stream: np.ndarray | None, rows: np.ndarray) -> bool:
    try:
        found = codec.unpack(data, stream)
    except ValueError:
        return True
    assert found.dtype == np.uint8
    assert found.shape[1] == codec.row_bytes
    return found.shape != rows.shape or bool((found != rows).any())


def test_keys_are_needed_where_they_were_left_out_and_must_be_as_many(packed):
    codec, rows, stream, left_out, own = packed
    with pytest.raises(ValueError, match="cannot be unpacked without"):
        codec.unpack(left_out)
    for data in (left_out, own):
        for count in (0, 11, 13):
            with pytest.raises(ValueError, match=f"12 packed codes, expected {count}"):
                codec.unpack(data, streams(count))
    assert refused_or_other(codec, left_out, stream + np.uint64(1), rows)


def test_what_was_cut_or_grew_is_refused(packed):
    codec, _, stream, left_out, own = packed
    for data, keys in ((left_out, stream), (own, stream), (own, None)):
        for length in range(len(data)):
            with pytest.raises(ValueError):
                codec.unpack(data[:length], keys)
        for more in (b"\0", b"\0" * 4, b"\xff" * 4, b"\0" * 400, data):
            with pytest.raises(ValueError):
                codec.unpack(data + more, keys)


def test_no_flipped_bit_goes_unseen(packed):
    codec, rows, stream, left_out, own = packed
    for data, keys in ((left_out, stream), (own, None)):
        for bit in range(8 * len(data)):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            assert refused_or_other(codec, bytes(flipped), keys, rows), bit


@settings(deadline=None, max_examples=150)
@given(codes(), st.binary(max_size=200), st.integers(0, 9), st.sampled_from([0, 1, 2, 255]), st.booleans())
def test_any_bytes_give_rows_or_a_value_error(codec, body, count, left_out, given_keys):
    """All rows with labels, or what the bytes say."""
    for there in (np.packbits(np.ones(count, bool)).tobytes(), b""):
        data = count.to_bytes(4, "little") + bytes([left_out]) + there + body
        try:
            rows = codec.unpack(data, streams(count) if given_keys else None)
        except ValueError:
            continue
        assert rows.shape == (count, codec.row_bytes)
        integers(rows, codec.dims, codec.wide)  # asserts that the padding is zero
        assert codec.unpack(codec.pack(rows)).tobytes() == rows.tobytes()  # and its integers a path


@contextmanager
def little_memory(most: int) -> Iterator[None]:
    """Asserts that the process never holds more than `most` MiB more than before."""

    def status(name: str) -> int:
        return int(re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])

    codec = coded()
    codec.unpack(codec.pack(np.zeros((1, codec.row_bytes), np.uint8)))  # whose machine code takes memory too
    Path("/proc/self/clear_refs").write_text("5")  # the peak is forgotten
    before = status("VmRSS")
    yield
    assert status("VmHWM") - before <= most << 10


def test_a_header_of_many_rows_costs_no_memory():
    """Pages that no row was decoded to are never touched, and 1 KB of words is spent after a few rows.

    A row that is there takes a key, and any row a bit.
    """
    codec = coded(classes=1000, dims=900)
    words = bytes(4) + b"\1" + bytes(3) + b"\xa5" * 1000
    most = (1 << 32) // codec.row_bytes
    for count in (most // 4, most, most + 1, 2**32 - 1):
        with little_memory(8), pytest.raises(ValueError, match=r"cut short|more than"):
            codec.unpack(count.to_bytes(4, "little") + b"\0" + words)
    count = 1 << 18  # 240 MB
    head = count.to_bytes(4, "little") + b"\0"
    there, none = head + b"\xff" * (count // 8) + bytes(8 * count) + words, head + bytes(count // 8) + words[:8]
    with little_memory(8), pytest.raises(ValueError, match=r"do not end"):
        codec.unpack(there)
    with little_memory(8):
        found = codec.unpack(none)
    assert found.shape == (count, codec.row_bytes)


@pytest.mark.parametrize("trellis", [0, 24])
def test_words_that_say_nothing_run_out(trellis):
    """The least that a symbol takes is -log2(1 - 7/65536) bits, so four words end within 1,100,000 symbols.

    These are 23,000 rows, of 48 symbols in 32 bytes: 2 MB with all keys, where 131,072 rows would take 4 themselves.
    """
    codec = coded(wide=0, trellis=trellis, spread=np.ones((2, 24)), gain=np.zeros(24))
    head = (1 << 17).to_bytes(4, "little") + b"\0" + b"\xff" * (1 << 14) + bytes(1 << 20)
    for word in (b"\0", b"\xff", b"\x80"):
        with little_memory(3), pytest.raises(ValueError, match=r"do not end"):
            codec.unpack(head + word * 16)


# The table


def test_the_table_of_the_normal_is_the_one_that_stores_were_written_with():
    """Another libm may round an erfc elsewhere: then stores written here could not be read there."""
    table = entropy._NORMAL
    assert zlib.crc32(table.astype("<i8").tobytes()) == 0x1C6C3B6C
    assert table.shape == (4097,)
    assert (table[0], table[2048], table[-1]) == (0, 32768, 65536)
    assert (np.diff(table) >= 0).all()
    np.testing.assert_array_equal(table + table[::-1], 65536)
    # To 2^-16, so that a libm that rounds the last place of an exp elsewhere changes nothing.
    assert zlib.crc32(entropy._DENSITIES.astype("<f4").tobytes()) == 0xA4B4F72F
    assert entropy._DENSITIES.shape == (65, 128)
    assert entropy._DENSITIES.min() > 2**-11, "products of nine would leave float32's range"


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
