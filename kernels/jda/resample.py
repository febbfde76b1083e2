"""Crop, resize and flip, as `PIL.Image.crop(...).resize((S, S), BILINEAR)` of Pillow 13 computes it.

Pillow resizes in two 8-bit passes. Up to version 12 the horizontal pass always came first; version 13 takes the
cheaper order, which changes bytes because the intermediate is rounded. Pillow 13 is what a new installation gets, so
its order is the one followed: vertical first iff h > S and h − S > 2 (w − S), with w ≠ S.
"""

import numpy as np

from kernels.jda.enhance import copy, identity, is_identity, jit, through_row
from kernels.jda.simd import weigh_rows

SLACK = 3  # rows of scratch behind an image: taps are read in groups of up to four, the surplus ones being zero
_BITS = 22  # fractional bits of a coefficient, libImaging/Resample.c PRECISION_BITS
_HALF = np.int32(1 << (_BITS - 1))


@jit
def crop(source, lut, box, flip, pad, scratch, out):
    """Write one view `out`, u8 (size, size, 3), of `source` u8 (H, W, 3) read through `lut` u8 (3, 256).

    `box` is (top, left, height, width). With `pad` >= 0 it lies in the image padded black by `pad` and has the
    output's size; with `pad` < 0 it lies in the image and is resized. `scratch` u8 (≥ `scratch_bytes`,).
    """
    size = out.shape[1]
    top, left, height, width = box[0], box[1], box[2], box[3]
    if pad >= 0:
        _shift(source, lut, top - pad, left - pad, flip, out)
        return
    if height > size and height - size > 2 * (width - size) and width != size:
        pixels = (height + SLACK) * width * 3
        region = scratch[:pixels].reshape(height + SLACK, width, 3)
        for y in range(height):
            row = source[top + y].reshape(3 * source.shape[1])[3 * left : 3 * (left + width)]
            through_row(row, lut, 0, width, region[y].reshape(3 * width))
        between = scratch[pixels : pixels + size * width * 3].reshape(size, width, 3)
        _vertical(region, height, between)
        _horizontal(between, identity(), 0, 0, width, flip, out)
    else:
        between = scratch[: (height + SLACK) * size * 3].reshape(height + SLACK, size, 3)
        _horizontal(source, lut, top, left, width, flip, between[:height])
        _vertical(between, height, out)


def scratch_bytes(height: int, width: int, size: int) -> int:
    """What `crop` needs for an image of this height and width."""
    return 3 * (max(height, width) + SLACK) * (min(height, width) + size)


@jit
def _shift(source, lut, top, left, flip, out):
    height, width, _ = source.shape
    size = out.shape[1]
    for y in range(out.shape[0]):
        for x in range(size):
            j, i = y + top, left + (size - 1 - x if flip else x)
            inside = 0 <= j < height and 0 <= i < width
            for c in range(3):
                out[y, x, c] = lut[c, source[j, i, c]] if inside else 0


@jit
def _coefficients(length, size):
    """libImaging/Resample.c precompute_coeffs and normalize_coeffs_8bpc for the triangle filter.

    Returns the first source index i32 (size,), the number of taps i32 (size,) and the taps i32 (size, taps), followed
    by zeros to a whole group of four.
    """
    scale = length / size
    support = max(scale, 1.0)
    inverse = 1.0 / support
    start = np.empty(size, np.int32)
    count = np.empty(size, np.int32)
    taps = np.zeros((size, int(np.ceil(support)) * 2 + 1 + SLACK), np.int32)
    weights = np.empty(taps.shape[1])
    for x in range(size):
        centre = (x + 0.5) * scale
        low = max(int(centre - support + 0.5), 0)
        high = min(int(centre + support + 0.5), length)
        total = 0.0
        for k in range(high - low):
            weights[k] = max(1.0 - abs((k + low - centre + 0.5) * inverse), 0.0)
            total += weights[k]
        for k in range(high - low):
            w = weights[k] / total if total != 0.0 else weights[k]
            taps[x, k] = int(0.5 + w * (1 << _BITS))
        start[x] = low
        count[x] = high - low
    return start, count, taps


@jit
def _horizontal(source, lut, top, left, length, flip, out):
    """Resize rows of `source` from `top` on, columns [left, left + length), to the width of `out`; then flip.

    Four rows at a time, read where they are or, if there is a table to read them through, from a copy.
    """
    height, size, _ = out.shape
    width = source.shape[1]
    lines = np.empty((4, 3 * length + 1), np.uint8)  # one more: of the last pixel, the byte behind it is read too
    start, count, taps = _even(length, size)
    plain = is_identity(lut)
    result = out.reshape(out.size)
    for first in range(0, height, 4):
        rows = min(4, height - first)
        to = _offsets(rows, 3 * size)
        # Nothing lies behind the last row of an image.
        if plain and top + first + rows < len(source):
            pixels, origin, of_rows = source.reshape(source.size), 3 * ((top + first) * width + left), 3 * width
        else:
            for r in range(rows):
                through_row(source[top + first + r].reshape(3 * width)[3 * left :], lut, 0, length, lines[r])
            pixels, origin, of_rows = lines.reshape(lines.size), 0, 3 * length + 1
        at = _offsets(rows, of_rows)
        for x in range(size):
            place = 3 * (first * size + (size - 1 - x if flip else x))
            weigh_rows(pixels, origin + 3 * start[x], at, taps, count * x, count, result, place, to)


@jit
def _offsets(rows, stride):
    """Of four rows; where there are fewer the last one is done again."""
    return 0, min(1, rows - 1) * stride, min(2, rows - 1) * stride, min(3, rows - 1) * stride


@jit
def _even(length, size):
    """`_coefficients` with the same count for all pixels: start i64 (size,), count, taps i32 (size · count,).

    A pixel with fewer taps gets zeros, in front where it would otherwise read behind the end.
    """
    start, counts, taps = _coefficients(length, size)
    count = counts.max()
    even = np.zeros((size, count), np.int32)
    for x in range(size):
        early = max(start[x] + count - length, 0)
        start[x] -= early
        copy(taps[x], counts[x], even[x, early:])
    return start.astype(np.int64), np.int64(count), even.reshape(size * count)


@jit
def _vertical(source, length, out):
    """Resize the first `length` rows of `source` (≥ length + SLACK, W, 3) to the height of `out` (S, W, 3)."""
    size, width, _ = out.shape
    lanes = 3 * width
    rows, into = source.reshape(len(source), lanes), out.reshape(size, lanes)
    if length == size:
        copy(rows.reshape(-1), size * lanes, into.reshape(-1))
        return
    start, count, taps = _coefficients(length, size)
    _weigh(rows, start, count, taps, np.empty(lanes, np.int32), into)


@jit
def _weigh(rows, start, count, taps, total, out):
    """out[y] = Σₖ rows[start[y] + k] · taps[y, k], rounded: u8 (L, lanes) -> u8 (S, lanes).

    `total` i32 (lanes,) is scratch. Up to four taps, the usual case, stay in registers.
    """
    size, lanes = out.shape
    for y in range(size):
        a, b, c, d = start[y], start[y] + 1, start[y] + 2, start[y] + 3
        t0, t1, t2, t3 = taps[y, 0], taps[y, 1], taps[y, 2], taps[y, 3]
        if count[y] <= 2:
            for i in range(lanes):
                out[y, i] = np.int32(_HALF + _two(t0, rows[a, i], t1, rows[b, i])) >> _BITS
            continue
        for i in range(lanes):
            total[i] = _HALF + _two(t0, rows[a, i], t1, rows[b, i]) + _two(t2, rows[c, i], t3, rows[d, i])
        for k in range(4, count[y], 2):
            a, b = start[y] + k, start[y] + k + 1
            t0, t1 = taps[y, k], taps[y, k + 1]
            for i in range(lanes):
                total[i] += _two(t0, rows[a, i], t1, rows[b, i])
        for i in range(lanes):
            out[y, i] = total[i] >> _BITS


@jit
def _two(t0, v0, t1, v1):
    # Narrowed at once: numba would go on in 64 bits, at half the lanes.
    return np.int32(np.int32(t0 * v0) + np.int32(t1 * v1))
