"""Crop, resize and flip, as `PIL.Image.crop(...).resize((S, S), BILINEAR)` of Pillow 13 computes it.

Pillow resizes in two 8-bit passes. Up to version 12 the horizontal pass always came first; version 13 takes the
cheaper order, which changes bytes because the intermediate is rounded. Pillow 13 is what a new installation gets, so
its order is the one followed: vertical first iff h > S and h − S > 2 (w − S), with w ≠ S.
"""

import numpy as np

from kernels.pixels import jit

_BITS = 22  # fractional bits of a coefficient, libImaging/Resample.c PRECISION_BITS


@jit
def crop(source, lut, box, flip, pad, scratch, out):
    """Write one view `out`, u8 (size, size, 3), of `source` u8 (H, W, 3) read through `lut` u8 (3, 256).

    `box` is (top, left, height, width). With `pad` >= 0 it lies in the image padded black by `pad` and has the
    output's size; with `pad` < 0 it lies in the image and is resized. `scratch` u8 (≥ 3·size·max(H, W),).
    """
    size = out.shape[1]
    top, left, height, width = box[0], box[1], box[2], box[3]
    if pad >= 0:
        _shift(source, lut, top - pad, left - pad, flip, out)
        return
    vertical_first = height > size and height - size > 2 * (width - size) and width != size
    if vertical_first:
        between = scratch[: size * width * 3].reshape(size, width, 3)
        _vertical(source, lut, top, left, height, between)
        _horizontal(between, _unchanged(), 0, 0, width, flip, out)
    else:
        between = scratch[: height * size * 3].reshape(height, size, 3)
        _horizontal(source, lut, top, left, width, flip, between)
        _vertical(between, _unchanged(), 0, 0, height, out)


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
    """Resize rows of `source` from `top` on, columns [left, left + length), to the width of `out`; then flip."""
    size = out.shape[1]
    if length == size:
        for y in range(out.shape[0]):
            for x in range(size):
                i = left + (size - 1 - x if flip else x)
                for c in range(3):
                    out[y, x, c] = lut[c, source[top + y, i, c]]
        return
    start, count, taps = _coefficients(length, size)
    row = np.empty((length, 3), np.int32)
    for y in range(out.shape[0]):
        for x in range(length):
            for c in range(3):
                row[x, c] = lut[c, source[top + y, left + x, c]]
        for x in range(size):
            r = g = b = np.int32(1 << (_BITS - 1))
            low = start[x]
            for k in range(count[x]):
                t = taps[x, k]
                r += row[low + k, 0] * t
                g += row[low + k, 1] * t
                b += row[low + k, 2] * t
            at = size - 1 - x if flip else x
            out[y, at, 0] = r >> _BITS
            out[y, at, 1] = g >> _BITS
            out[y, at, 2] = b >> _BITS


@jit
def _vertical(source, lut, top, left, length, out):
    """Resize columns of `source` from `left` on, rows [top, top + length), to the height of `out`."""
    size, width, _ = out.shape
    if length == size:
        for y in range(size):
            for x in range(width):
                for c in range(3):
                    out[y, x, c] = lut[c, source[top + y, left + x, c]]
        return
    start, count, taps = _coefficients(length, size)
    total = np.empty((width, 3), np.int32)
    for y in range(size):
        total[:] = 1 << (_BITS - 1)
        for k in range(count[y]):
            t = taps[y, k]
            j = top + start[y] + k
            for x in range(width):
                for c in range(3):
                    total[x, c] += np.int32(lut[c, source[j, left + x, c]]) * t
        for x in range(width):
            for c in range(3):
                out[y, x, c] = total[x, c] >> _BITS
