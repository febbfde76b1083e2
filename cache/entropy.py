"""Dither, rounding and the entropy code of `cache.subspace`: integer arithmetic, the same bits on every machine.

A coefficient x, in steps, is kept as q = floor(x + u + 1/2) with a dither u in (-1/2, 1/2) that the reader draws
again. u is a byte b of the row's Philox stream: u = (2b - 255) / 512; positions below are in units of 1/512 step.

The entropy code knows the dither. x is modelled as a normal variable, so q has the probability of the interval of
x that leads to it, [q - 1/2 - u, q + 1/2 - u]: at a few tenths of a step's spread this is half of what a code of q
alone takes. The augmented view's mean is predicted from the original's decoded coefficient. The code is rANS (Duda,
arXiv:1311.2540) with a 64-bit state, 32-bit words and 16-bit probabilities, each at least 2^-16.

All functions are compiled by numba, release the GIL and live in one file: numba's cache looks at no other.
"""

import math

import numpy as np
from numba import njit

UNIT = 512
"""Positions per step."""
GAIN_UNIT = 4096
"""Denominator of the pair's prediction gains."""
BETA_UNIT = 256
"""Denominator of the dither's share that decoding subtracts."""

_BITS = 16
_TOTAL = 1 << _BITS
_LOW = 1 << 32  # the state stays in [2^32, 2^64)
_SIGMA = 256  # entries of the table per standard deviation, which reaches to ±8
_HALF = 8 * _SIGMA
_NORMAL = np.array(
    [round(_TOTAL * 0.5 * math.erfc(-(i - _HALF) / _SIGMA / math.sqrt(2))) for i in range(2 * _HALF + 1)], np.int64
)
_RATIO_BITS = 24
_NO_DITHER = 128  # u = 1 / 512; there is no byte for 0


@njit(nogil=True, cache=True)
def dither(key, view, out):
    """Fill `out` u8 (d,) with the dither bytes of one view of a row.

    With c = ceil(d / 16) calls of Philox4x32-10, byte j of call k (counter (k, view, 0, 0)) is that of coefficient
    j c + k: a kernel that makes the calls side by side holds 16 runs of consecutive coefficients.
    """
    size = len(out)
    calls = (size + 15) // 16
    low = np.uint64(0xFFFFFFFF)
    for call in range(calls):
        c0, c1, c2, c3 = np.uint64(call), np.uint64(view), np.uint64(0), np.uint64(0)
        k0, k1 = key & low, key >> np.uint64(32)
        for _ in range(10):
            p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
            c0, c1, c2, c3 = (p1 >> np.uint64(32)) ^ c1 ^ k0, p1 & low, (p0 >> np.uint64(32)) ^ c3 ^ k1, p0 & low
            k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
        for word, value in enumerate((c0, c1, c2, c3)):
            for byte in range(4):
                at = (4 * word + byte) * calls + call
                if at < size:
                    out[at] = (value >> np.uint64(8 * byte)) & np.uint64(255)


@njit(nogil=True, cache=True)
def quantise(steps, stream, wide, out):
    """Coefficients in steps f32 (B, 2, d) -> rows u8 (B, 2, segment), clipped to the range of their width."""
    rows, _, size = steps.shape
    bytes_ = np.empty(size, np.uint8)
    q = np.empty(size, np.int32)
    for row in range(rows):
        for view in range(2):
            dither(stream[row], view, bytes_)
            for i in range(size):
                u = np.float32((2 * np.int32(bytes_[i]) - 255) / UNIT)
                low, high = (-128, 127) if i < wide else (-8, 7)
                q[i] = min(max(math.floor(steps[row, view, i] + u + np.float32(0.5)), low), high)
            _store(q, wide, out[row, view])


@njit(nogil=True, cache=True)
def dequantise(rows, stream, wide, beta, out):
    """Rows u8 (B, 2, segment) -> coefficients in steps f32 (B, 2, d): q - beta u, beta i32 (d,) in 1/`BETA_UNIT`."""
    size = out.shape[2]
    bytes_ = np.empty(size, np.uint8)
    q = np.empty(size, np.int32)
    for row in range(len(rows)):
        for view in range(2):
            dither(stream[row], view, bytes_)
            _load(rows[row, view], wide, q)
            for i in range(size):
                u = beta[i] * (2 * np.int32(bytes_[i]) - 255)
                out[row, view, i] = np.float32(q[i]) - np.float32(u / (UNIT * BETA_UNIT))


@njit(nogil=True, cache=True)
def _store(q, wide, out):
    """One view's integers in their bytes: `wide` whole ones, then pairs of nibbles; what is left over is zero."""
    half = (len(q) - wide + 1) // 2
    for i in range(wide):
        out[i] = q[i] & 255
    for i in range(half):
        high = q[wide + half + i] if wide + half + i < len(q) else 0
        out[wide + i] = (q[wide + i] & 15) | (high & 15) << 4
    out[wide + half :] = 0


@njit(nogil=True, cache=True)
def _load(row, wide, q):
    half = (len(q) - wide + 1) // 2
    for i in range(wide):
        q[i] = np.int8(row[i])
    for i in range(half):
        byte = np.int32(row[wide + i])
        q[wide + i] = ((byte & 15) ^ 8) - 8
        if wide + half + i < len(q):
            q[wide + half + i] = (byte >> 4 ^ 8) - 8


@njit(nogil=True, cache=True)
def _ratios(spread):
    """i64 (2, d): table entries per unit of position, in 2^-24."""
    ratios = np.empty(spread.shape, np.int64)
    for view in range(2):
        for i in range(spread.shape[1]):
            ratios[view, i] = (_SIGMA << _RATIO_BITS) // spread[view, i]
    return ratios


@njit(nogil=True, cache=True)
def _below(q, low, high, shift, ratio, known):
    """The cumulative frequency of all integers below q; `shift` is the position of the normal's mean plus u.

    Of an unknown dither it is the mean over sixteen.
    """
    if q <= low:
        return 0
    if q > high:
        return _TOTAL
    edge = UNIT * q - UNIT // 2 - shift
    if known:
        normal = _NORMAL[min(max(edge * ratio >> _RATIO_BITS, -_HALF), _HALF) + _HALF]
    else:
        normal = 0
        for u in range(-UNIT // 2 + UNIT // 32, UNIT // 2, UNIT // 16):
            normal += _NORMAL[min(max((edge - u) * ratio >> _RATIO_BITS, -_HALF), _HALF) + _HALF]
        normal >>= 4
    symbols = high - low + 1
    return (normal * (_TOTAL - symbols) >> _BITS) + (q - low)


@njit(nogil=True, cache=True)
def _shift(view, i, bytes_, q, gain, beta):
    """Where the model of coefficient i is centred, plus its dither. bytes_ u8 (2, d), q i32 (2, d)."""
    u = 2 * np.int64(bytes_[view, i]) - 255
    if view == 0:
        return u
    original = np.int64(q[0, i]) * UNIT - (beta[i] * (2 * np.int64(bytes_[0, i]) - 255) >> 8)
    return u + (gain[i] * original >> 12)


@njit(nogil=True, cache=True)
def _dithers(stream, row, known, out):
    if known:
        dither(stream[row], 0, out[0])
        dither(stream[row], 1, out[1])


@njit(nogil=True, cache=True)
def encode(rows, stream, known, wide, spread, gain, beta, out):
    """The entropy code of rows u8 (B, 2, segment), written as u32 words from the end of `out` on: their number.

    `spread` i64 (2, d) the models' standard deviations, `gain` and `beta` i64 (d,). `known`: the dither may be used;
    `stream` is not read otherwise. `out` must hold `2 d B + 2` words.
    """
    size = spread.shape[1]
    ratios = _ratios(spread)
    bytes_ = np.full((2, size), _NO_DITHER, np.uint8)
    q = np.empty((2, size), np.int32)
    state = np.uint64(_LOW)
    at = len(out)
    for row in range(len(rows) - 1, -1, -1):
        _dithers(stream, row, known, bytes_)
        _load(rows[row, 0], wide, q[0])
        _load(rows[row, 1], wide, q[1])
        for view in range(1, -1, -1):
            for i in range(size - 1, -1, -1):
                low, high = (-128, 127) if i < wide else (-8, 7)
                shift = _shift(view, i, bytes_, q, gain, beta)
                start = _below(np.int64(q[view, i]), low, high, shift, ratios[view, i], known)
                frequency = np.uint64(
                    _below(np.int64(q[view, i]) + 1, low, high, shift, ratios[view, i], known) - start
                )
                if state >= frequency << np.uint64(64 - _BITS):
                    at -= 1
                    out[at] = state & np.uint64(0xFFFFFFFF)
                    state >>= np.uint64(32)
                state = (state // frequency << np.uint64(_BITS)) + state % frequency + np.uint64(start)
    out[at - 1], out[at - 2] = state >> np.uint64(32), state & np.uint64(0xFFFFFFFF)
    return len(out) - at + 2


@njit(nogil=True, cache=True)
def decode(words, stream, known, wide, spread, gain, beta, out):
    """Fill rows u8 (B, 2, segment) from u32 words; False if the words cannot be those of so many rows."""
    size = spread.shape[1]
    ratios = _ratios(spread)
    bytes_ = np.full((2, size), _NO_DITHER, np.uint8)
    q = np.empty((2, size), np.int32)
    if len(words) < 2:
        return False
    state = np.uint64(words[0]) | np.uint64(words[1]) << np.uint64(32)
    at = 2
    for row in range(len(out)):
        _dithers(stream, row, known, bytes_)
        for view in range(2):
            for i in range(size):
                low, high = (-128, 127) if i < wide else (-8, 7)
                shift, ratio = _shift(view, i, bytes_, q, gain, beta), ratios[view, i]
                slot = np.int64(state & np.uint64(_TOTAL - 1))
                value = min(max(shift + UNIT // 2 >> 9, low), high)  # the likeliest; others are near
                start = _below(value, low, high, shift, ratio, known)
                stop = _below(value + 1, low, high, shift, ratio, known)
                while slot < start:
                    value, stop = value - 1, start
                    start = _below(value, low, high, shift, ratio, known)
                while slot >= stop:
                    value, start = value + 1, stop
                    stop = _below(value + 1, low, high, shift, ratio, known)
                q[view, i] = value
                state = np.uint64(stop - start) * (state >> np.uint64(_BITS)) + np.uint64(slot - start)
                if state < np.uint64(_LOW):
                    if at == len(words):
                        return False
                    state = state << np.uint64(32) | np.uint64(words[at])
                    at += 1
            _store(q[view], wide, out[row, view])
    return at == len(words) and state == np.uint64(_LOW)
