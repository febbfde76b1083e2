"""Crop, resize and flip, as `PIL.Image.crop(...).resize((S, S), BILINEAR)` of Pillow 13 computes it.

Pillow resizes in two 8-bit passes. Up to version 12 the horizontal pass always came first; version 13 takes the
cheaper order, which changes bytes because the intermediate is rounded. Pillow 13 is what a new installation gets, so
its order is the one followed: vertical first iff h > S and h − S > 2 (w − S), with w ≠ S.
"""

import numpy as np

from kernels.pixels import jit, through

_BITS = 22  # fractional bits of a coefficient, libImaging/Resample.c PRECISION_BITS
_STRIP = 16  # rows that the horizontal pass handles at a time; 48 lanes of bytes, widened, fill the vector registers


@jit
def crop(source, lut, box, flip, pad, scratch, out):
    """Write one view `out`, u8 (size, size, 3), of `source` u8 (H, W, 3) read through `lut` u8 (3, 256).

    `box` is (top, left, height, width). With `pad` >= 0 it lies in the image padded black by `pad` and has the
    output's size; with `pad` < 0 it lies in the image and is resized. `scratch` u8 (≥ 3·max(H, W)·(min(H, W) + size),).
    """
    size = out.shape[1]
    top, left, height, width = box[0], box[1], box[2], box[3]
    if pad >= 0:
        _shift(source, lut, top - pad, left - pad, flip, out)
        return
    if height > size and height - size > 2 * (width - size) and width != size:
        pixels = height * width * 3
        region = scratch[:pixels].reshape(height, width, 3)
        through(source[top : top + height, left : left + width], lut, region)
        between = scratch[pixels : pixels + size * width * 3].reshape(size, width, 3)
        _vertical(region, between)
        _horizontal(between, _unchanged(), 0, 0, width, flip, out)
    else:
        between = scratch[: height * size * 3].reshape(height, size, 3)
        _horizontal(source, lut, top, left, width, flip, between)
        _vertical(between, out)


@jit
def _unchanged():
    lut = np.empty((3, 256), np.uint8)
    for v in range(256):
        lut[:, v] = v
    return lut


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

    Returns the first source index i32 (size,), the number of taps i32 (size,) and the taps i32 (size, taps).
    """
    scale = length / size
    support = max(scale, 1.0)
    inverse = 1.0 / support
    start = np.empty(size, np.int32)
    count = np.empty(size, np.int32)
    taps = np.zeros((size, int(np.ceil(support)) * 2 + 1), np.int32)
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

    Rows are worked on in strips, transposed so that the rows and channels of one column are neighbours: the inner
    loop then runs over them and vectorises.
    """
    height, size, _ = out.shape
    if length == size:
        for y in range(height):
            for x in range(size):
                i = left + (size - 1 - x if flip else x)
                for c in range(3):
                    out[y, x, c] = lut[c, source[top + y, i, c]]
        return
    start, count, taps = _coefficients(length, size)
    strip = np.zeros((length, 3 * _STRIP), np.uint8)
    total = np.empty(3 * _STRIP, np.int32)
    for first in range(0, height, _STRIP):
        rows = min(_STRIP, height - first)
        for r in range(rows):
            for x in range(length):
                for c in range(3):
                    strip[x, 3 * r + c] = lut[c, source[top + first + r, left + x, c]]
        for x in range(size):
            total[:] = 1 << (_BITS - 1)
            for k in range(count[x]):
                t = taps[x, k]
                column = strip[start[x] + k]
                for lane in range(3 * _STRIP):
                    total[lane] += np.int32(column[lane]) * t
            at = size - 1 - x if flip else x
            for r in range(rows):
                for c in range(3):
                    out[first + r, at, c] = total[3 * r + c] >> _BITS


@jit
def _vertical(source, out):
    """Resize the columns of `source` (L, W, 3) to the height of `out` (S, W, 3)."""
    size, width, _ = out.shape
    if len(source) == size:
        out[:] = source
        return
    start, count, taps = _coefficients(len(source), size)
    total = np.empty(3 * width, np.int32)
    for y in range(size):
        total[:] = 1 << (_BITS - 1)
        for k in range(count[y]):
            t = taps[y, k]
            row = source[start[y] + k].reshape(3 * width)
            for i in range(3 * width):
                total[i] += np.int32(row[i]) * t
        row = out[y].reshape(3 * width)
        for i in range(3 * width):
            row[i] = total[i] >> _BITS
