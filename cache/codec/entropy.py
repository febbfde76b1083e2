"""Dither, rounding and the entropy code of `cache.codec.subspace`: the same bits on every machine.

A coefficient x, in steps, is kept as q = floor(x + u + 1/2) with a dither u in (-1/2, 1/2) that the reader draws
again. u is a byte b of the pair's Philox stream: u = (2b - 255) / 512; positions below are in units of 1/512 step.

The entropy code knows the dither. x is modelled as a normal variable, so q has the probability of the interval of
x that leads to it, [q - 1/2 - u, q + 1/2 - u]: at a few tenths of a step's spread this is half of what a code of q
alone takes. The second segment's mean is predicted from the first's decoded coefficient. The code is rANS (Duda,
arXiv:1311.2540) with a 64-bit state, 32-bit words and 16-bit probabilities, each at least 2^-16.

Of coefficients that move by more than a tenth of a step or so the leading ones are rounded together, on a trellis
(Marcellin & Fischer, *Trellis coded quantization*, 1990): a state allows every second integer of a grid 0.57 times as
wide, and leads to the next state. Noise of the same variance, whatever x, costs a fifth of a bit less. Their dither is
four times as wide; decoding takes no notice of states. A state is the last bits that entered a shift register, the
newest lowest: `labels` says of each state which integers, mod 4, a bit 0 stands for, and a bit 1 for those two off.

Which bit enters depends on the dither of the coefficients that follow, which the reader knows too. So the code looks
ahead: a path has the probability of its density, normal in what is decoded (x and its error), over that of all paths.
The sums over all paths from a state on are made from the last coefficient to the first, as in the backward half of the
algorithm of Bahl, Cocke, Jelinek & Raviv (1974). First comes the bit by these, then the integer by intervals of 4. A
coefficient that never moves so costs 0.04 bits instead of 0.17. Codes that do not look ahead (formats 1 and 3) have
intervals of 2 on the trellis. The sums are float32, in an order that is given, without fused operations or numbers
that some processors take for zero; so they too are the same everywhere.

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

TRELLIS_DITHER = 4
"""Width of the dither of coefficients on the trellis, in steps."""
TRELLIS_NOISE = {8: 0.26, 256: 0.2466}
"""States -> variance of their error, in steps squared; 1/12 otherwise."""

# States -> taps of the shift register, the entering bit lowest, for bit 0 and bit 1 of the integers. Eight states are
# those of JPEG 2000 part 2; of 4,000 taps drawn at random for 256 these made the least noise,
# 0.2 % less than Ungerboeck's.
_TAPS = {8: (0b10, 0b1101), 256: (0o206, 0o717)}
_BEYOND = 256  # the ends of all ranges are nearest; the squares of more would drown the others' in float32

_BITS = 16
_TOTAL = 1 << _BITS
_LOW = 1 << 32  # the state stays in [2^32, 2^64)
_SIGMA = 256  # entries of the table per standard deviation, which reaches to ±8
_HALF = 8 * _SIGMA
_NORMAL = np.array(
    [round(_TOTAL * 0.5 * math.erfc(-(i - _HALF) / _SIGMA / math.sqrt(2))) for i in range(2 * _HALF + 1)], np.int64
)
_RATIO_BITS = 24

# Of the code that looks ahead: densities of normals with spreads of whole 1/32 steps, from the least on the trellis to
# one that integers mod 4 do not tell from any other, at 128 places of 4 steps. Finer tables would save 0.001 bits.
_SPREADS, _PLACES = (16, 80), 128
_PLACE = 4 * UNIT // _PLACES  # positions
_REST = 8  # coefficients, after which the largest of what lies ahead is 1 again
# So no float32 is below 2^-126, where processors may disagree. In 8 steps a state leads to every other, and the least
# density is 2^-11; of a state's two integers one is at most a step away, where the density is above 0.1. After 7 steps
# all is above 2^-112, and a product with one density more above 2^-123.


def _densities() -> np.ndarray:
    """f32 (spread, place): of all integers that are 0 mod 4, for a normal variable centred there; in 2^-16."""
    first, last = _SPREADS
    spread = np.arange(first, last + 1)[:, None, None] * _PLACE / UNIT
    away = np.arange(_PLACES)[None, :, None] * _PLACE / UNIT + 4.0 * np.arange(-4, 4)
    density = np.exp(-np.square(away / spread) / 2).sum(axis=2) / (spread[..., 0] * math.sqrt(2 * math.pi))
    return (np.rint(density * _TOTAL) / _TOTAL).astype(np.float32)


_DENSITIES = _densities()


def labels(states: int) -> np.ndarray:
    """i32 (states,), for a trellis of that many states, a key of `TRELLIS_NOISE`."""
    low, high = _TAPS[states]
    odd = [((2 * state & low).bit_count() & 1) + 2 * ((2 * state & high).bit_count() & 1) for state in range(states)]
    return np.array(odd, np.int32)


def jit(function):
    """numba.njit without the GIL, compiled once per machine, or once per process where numba can keep nothing."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither NUMBA_CACHE_DIR nor this folder nor the user's can be written
        return njit(nogil=True)(function)


@jit
def dither(key, view, out):
    """Fill `out` u8 (d,) with the dither bytes of one view of a pair.

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


@jit
def quantise(steps, dither_keys, trellis, labels, wide, out):
    """Coefficients in steps f32 (B, 2, d) -> segments u8 (B, 2, segment), kept to the range of their width.

    The first `trellis` i64 (2,) coefficients of either segment are rounded together.
    """
    pairs, _, size = steps.shape
    bytes_ = np.empty(size, np.uint8)
    q = np.empty(size, np.int32)
    x = np.empty(size, np.float32)
    near, older = np.empty((size, 4), np.int32), np.empty((size, len(labels)), np.bool_)
    for pair in range(pairs):
        for view in range(2):
            dither(dither_keys[pair], view, bytes_)
            joint = trellis[view]
            for i in range(joint):
                u = np.float32(TRELLIS_DITHER * (2 * np.int32(bytes_[i]) - 255) / UNIT)
                x[i] = min(max(steps[pair, view, i] + u, np.float32(-_BEYOND)), np.float32(_BEYOND))
            nearest(x[:joint], labels, wide, near, older, q)
            for i in range(joint, size):
                u = np.float32((2 * np.int32(bytes_[i]) - 255) / UNIT)
                low, high = (-128, 127) if i < wide else (-8, 7)
                q[i] = min(max(math.floor(steps[pair, view, i] + u + np.float32(0.5)), low), high)
            _store(q, wide, out[pair, view])


@jit
def nearest(x, labels, wide, near, older, q):
    """The integers q on a path from state 0 that are nearest to x f32 (t,), by Viterbi's algorithm.

    `near` i32 (t, 4) and `older` bool (t, states) are memory to work in.
    """
    states, half = len(labels), len(labels) >> 1
    cost, other = np.full(states, np.float32(1e30), np.float32), np.empty(states, np.float32)
    cost[0] = 0
    square = np.empty(4, np.float32)
    for i in range(len(x)):
        low, high = (-128, 127) if i < wide else (-8, 7)
        for kind in range(4):
            k = 4 * math.floor((x[i] - kind) * np.float32(0.25) + np.float32(0.5)) + kind
            k = min(max(k, low + kind), high - 3 + kind)  # low is a multiple of 4
            near[i, kind], square[kind] = k, (x[i] - k) ** 2
        _forward(cost, other, labels, square, older[i])
        cost, other = other, cost
    state = np.argmin(cost)
    for i in range(len(x) - 1, -1, -1):
        before = state >> 1 | (half if older[i, state] else 0)
        q[i] = near[i, labels[before] ^ (2 * (state & 1))]
        state = before


@jit
def _forward(cost, other, labels, square, older):
    """One step of all states: `other` f32 (states,) from `cost`; `older` whether the bit that leaves is 1.

    States p and p + half lead to the same two, and what one takes for a bit 0 the other takes for a bit 1. Written so
    that LLVM makes vectors of it: no table of squares, and indices that cannot be negative.
    """
    s0, s1, s2, s3 = square[0], square[1], square[2], square[3]
    half, one = len(cost) >> 1, np.uint64(1)
    lower, upper = cost[:half], cost[half:]
    for p in range(half):
        low, high = (s1, s3) if labels[p] & 1 else (s0, s2)
        zero, set_ = (high, low) if labels[p] & 2 else (low, high)
        a0, a1, b0, b1 = lower[p] + zero, lower[p] + set_, upper[p] + set_, upper[p] + zero
        then = np.uint64(p) << one
        other[then], older[then] = min(a0, b0), b0 < a0
        other[then | one], older[then | one] = min(a1, b1), b1 < a1


@jit
def dequantise(segments, dither_keys, wide, beta, out):
    """Segments u8 (B, 2, segment) -> coefficients f32 (B, 2, d), in steps: q - beta u; beta i32 (2, d) in 1/256."""
    size = out.shape[2]
    bytes_ = np.empty(size, np.uint8)
    q = np.empty(size, np.int32)
    for pair in range(len(segments)):
        for view in range(2):
            dither(dither_keys[pair], view, bytes_)
            _load(segments[pair, view], wide, q)
            for i in range(size):
                u = beta[view, i] * (2 * np.int32(bytes_[i]) - 255)
                out[pair, view, i] = np.float32(q[i]) - np.float32(u / (UNIT * BETA_UNIT))


@jit
def _store(q, wide, out):
    """One view's integers in their bytes: `wide` whole ones, then pairs of nibbles; what is left over is zero."""
    half = (len(q) - wide + 1) // 2
    for i in range(wide):
        out[i] = q[i] & 255
    for i in range(half):
        high = q[wide + half + i] if wide + half + i < len(q) else 0
        out[wide + i] = (q[wide + i] & 15) | (high & 15) << 4
    out[wide + half :] = 0


@jit
def _load(segment, wide, q):
    half = (len(q) - wide + 1) // 2
    for i in range(wide):
        q[i] = np.int8(segment[i])
    for i in range(half):
        byte = np.int32(segment[wide + i])
        q[wide + i] = ((byte & 15) ^ 8) - 8
        if wide + half + i < len(q):
            q[wide + half + i] = (byte >> 4 ^ 8) - 8


@jit
def _ratios(spread, trellis, looks):
    """i64 (2, d): table entries per unit of position, in 2^-24, and rows of `_DENSITIES`."""
    ratios, rows = np.empty(spread.shape, np.int64), np.empty(spread.shape, np.int64)
    first, last = _SPREADS
    for view in range(2):
        for i in range(spread.shape[1]):
            own = spread[view, i]
            rows[view, i] = min(max((own + _PLACE // 2) // _PLACE, first), last) - first
            if looks and i < trellis[view]:
                # Of integers known mod 4 the model is of intervals of 4 steps, wider than what they stand for. With
                # this spread it takes 0.003 bits more than the densities at most.
                variance = (own / UNIT) ** 2
                own = max(np.int64(UNIT * variance / math.sqrt(math.sqrt((variance + 1) ** 2 + 16))), 1)
            ratios[view, i] = (_SIGMA << _RATIO_BITS) // own
    return ratios, rows


@jit
def _below(k, low, high, bits, shift, ratio, total):
    """The cumulative frequency of all numbers below k, of all of them `total`; they are 2^bits steps apart, the
    normal's mean plus u at `shift`."""
    if k <= low:
        return 0
    if k > high:
        return total
    entry = (((2 * k - 1) * UNIT << bits >> 1) - shift) * ratio >> _RATIO_BITS
    normal = _NORMAL[min(max(entry, -_HALF), _HALF) + _HALF]
    symbols = high - low + 1
    return (normal * (total - symbols) >> _BITS) + (k - low)


@jit
def _shift(view, i, joint, bytes_, q, gain, beta):
    """Where the model of coefficient i is centred, plus its dither. bytes_ u8 (2, d), q i32 (2, d)."""
    u = (2 * np.int64(bytes_[view, i]) - 255) * (TRELLIS_DITHER if joint else 1)
    if view == 0:
        return u
    first = np.int64(q[0, i]) * UNIT - (beta[i] * (2 * np.int64(bytes_[0, i]) - 255) >> 8)
    return u + (gain[i] * first >> 12)


@jit
def _nodes(q, trellis, labels, out):
    """The states along the path q. False if q is no path."""
    state = 0
    for i in range(trellis):
        out[i] = state
        if (q[i] ^ labels[state]) & 1:
            return False
        state = _follow(state, q[i], labels)
    return True


@jit
def _follow(state, q, labels):
    return (2 * state | ((q ^ labels[state]) >> 1 & 1)) & (len(labels) - 1)


@jit
def _grid(bits, first, i, wide):
    """(lowest, highest number, position of number 0) of the integers first + 2^bits k."""
    low, high = (-128, 127) if i < wide else (-8, 7)
    return low >> bits, (high - first) >> bits, first * UNIT


@jit
def _density(row, shift, kind):
    """Of the integers that are `kind` mod 4."""
    return _DENSITIES[row, ((shift + _PLACE // 2) // _PLACE - kind * (_PLACES // 4)) & (_PLACES - 1)]


@jit
def _back(row, shift, i, labels, then, now):
    """`now` f32 (states,), likelihoods of the dither from coefficient i on, up to a factor, from `then`, those from
    i + 1 on: sums over all paths that leave a state. Written as `_forward` is."""
    d0, d1 = _density(row, shift, 0), _density(row, shift, 1)
    d2, d3 = _density(row, shift, 2), _density(row, shift, 3)
    half, one = len(now) >> 1, np.uint64(1)
    for p in range(half):
        low, high = (d1, d3) if labels[p] & 1 else (d0, d2)
        zero, set_ = (high, low) if labels[p] & 2 else (low, high)
        after = np.uint64(p) << one
        now[p] = zero * then[after] + set_ * then[after | one]
        now[p + half] = set_ * then[after] + zero * then[after | one]
    if i % _REST == 0:
        most, bits = 0, now.view(np.int32)  # which are in the order of positive numbers, and LLVM has vectors for
        for p in range(len(bits)):
            most = max(most, bits[p])
        now *= np.float32(1) / np.array([most], np.int32).view(np.float32)[0]


@jit
def _zeros(row, shift, node, labels, then, wide):
    """How many of 2^16 go to the bit 0 of a state, for likelihoods `then` of what follows; each integer has one."""
    label, after = labels[node], 2 * node & (len(labels) - 1)
    zero, one = _density(row, shift, label) * then[after], _density(row, shift, label ^ 2) * then[after | 1]
    least = 64 if wide else 4
    return min(max(np.int64(np.float32(_TOTAL) * (zero / (zero + one))), least), _TOTAL - least)


@jit
def encode(segments, dither_keys, trellis, labels, looks, wide, spread, gain, beta, out):
    """The entropy code of segments u8 (B, 2, segment), written as u32 words from the end of `out` on: their number.

    `looks`: whether the code of those on the trellis looks ahead. `spread` i64 (2, d) the models' standard deviations,
    `gain` i64 (d,), `beta` i64 (d,) the first segment's. `out` must hold `2 d B + 2` words.
    0 for segments that `quantise` does not make.
    """
    size = spread.shape[1]
    ratios, rows = _ratios(spread, trellis, looks)
    bytes_ = np.empty((2, size), np.uint8)
    q = np.empty((2, size), np.int32)
    nodes = np.empty((2, size), np.int64)
    then, now = np.empty(len(labels), np.float32), np.empty(len(labels), np.float32)
    stored = np.empty(segments.shape[2], np.uint8)
    state = np.uint64(_LOW)
    at = len(out)
    for pair in range(len(segments) - 1, -1, -1):
        dither(dither_keys[pair], 0, bytes_[0])
        dither(dither_keys[pair], 1, bytes_[1])
        for view in range(2):
            _load(segments[pair, view], wide, q[view])
            _store(q[view], wide, stored)
            if not _nodes(q[view], trellis[view], labels, nodes[view]) or not np.array_equal(
                stored, segments[pair, view]
            ):
                return 0
        for view in range(1, -1, -1):
            then[:] = 1
            for i in range(size - 1, -1, -1):
                joint = i < trellis[view]
                shift = _shift(view, i, joint, bytes_, q, gain, beta)
                bits, first, base, total = 0, 0, 0, _TOTAL
                if joint and looks:
                    node = nodes[view, i]
                    bits, first = 2, q[view, i] & 3
                    total = _zeros(rows[view, i], shift, node, labels, then, i < wide)
                    if first != labels[node]:
                        base, total = total, _TOTAL - total
                    _back(rows[view, i], shift, i, labels, then, now)
                    then, now = now, then
                elif joint:
                    bits, first = 1, labels[nodes[view, i]] & 1
                low, high, zero = _grid(bits, first, i, wide)
                value, ratio = (np.int64(q[view, i]) - first) >> bits, ratios[view, i]
                start = _below(value, low, high, bits, shift - zero, ratio, total)
                frequency = np.uint64(_below(value + 1, low, high, bits, shift - zero, ratio, total) - start)
                if state >= frequency << np.uint64(64 - _BITS):
                    at -= 1
                    out[at] = state & np.uint64(0xFFFFFFFF)
                    state >>= np.uint64(32)
                state = (state // frequency << np.uint64(_BITS)) + state % frequency + np.uint64(base + start)
    out[at - 1], out[at - 2] = state >> np.uint64(32), state & np.uint64(0xFFFFFFFF)
    return len(out) - at + 2


@jit
def decode(words, dither_keys, trellis, labels, looks, wide, spread, gain, beta, out):
    """Fill segments u8 (B, 2, segment) from u32 words; False if the words cannot be those of so many pairs."""
    size = spread.shape[1]
    ratios, rows = _ratios(spread, trellis, looks)
    bytes_ = np.empty((2, size), np.uint8)
    q = np.empty((2, size), np.int32)
    beyond = np.ones((max(trellis[0], trellis[1]) + 1 if looks else 1, len(labels)), np.float32)
    if len(words) < 2:
        return False
    state = np.uint64(words[0]) | np.uint64(words[1]) << np.uint64(32)
    at = 2
    for pair in range(len(out)):
        dither(dither_keys[pair], 0, bytes_[0])
        dither(dither_keys[pair], 1, bytes_[1])
        for view in range(2):
            if looks:
                beyond[trellis[view]] = 1
                for i in range(trellis[view] - 1, -1, -1):
                    shift = _shift(view, i, True, bytes_, q, gain, beta)
                    _back(rows[view, i], shift, i, labels, beyond[i + 1], beyond[i])
            node = 0  # of the trellis
            for i in range(size):
                joint = i < trellis[view]
                shift = _shift(view, i, joint, bytes_, q, gain, beta)
                slot = np.int64(state & np.uint64(_TOTAL - 1))
                bits, first, base, total = 0, 0, 0, _TOTAL
                if joint and looks:
                    total = _zeros(rows[view, i], shift, node, labels, beyond[i + 1], i < wide)
                    bits, first = 2, labels[node]
                    if slot >= total:
                        first, base, total = first ^ 2, total, _TOTAL - total
                elif joint:
                    bits, first = 1, labels[node] & 1
                low, high, zero = _grid(bits, first, i, wide)
                shift, ratio, within = shift - zero, ratios[view, i], slot - base
                value = min(max(((shift >> bits) + UNIT // 2) // UNIT, low), high)  # the likeliest; others are near
                start = _below(value, low, high, bits, shift, ratio, total)
                stop = _below(value + 1, low, high, bits, shift, ratio, total)
                while within < start:
                    value, stop = value - 1, start
                    start = _below(value, low, high, bits, shift, ratio, total)
                while within >= stop:
                    value, start = value + 1, stop
                    stop = _below(value + 1, low, high, bits, shift, ratio, total)
                q[view, i] = (value << bits) + first
                if joint:
                    node = _follow(node, q[view, i], labels)
                state = np.uint64(stop - start) * (state >> np.uint64(_BITS)) + np.uint64(within - start)
                if state < np.uint64(_LOW):
                    if at == len(words):
                        return False
                    state = state << np.uint64(32) | np.uint64(words[at])
                    at += 1
            _store(q[view], wide, out[pair, view])
    return at == len(words) and state == np.uint64(_LOW)
