"""JDA operations that write pixels, each reading its source through a table `lut` u8 (3, 256).

`source` and `out` are u8 (H, W, 3). Each function names the Pillow source it reproduces. No fast-math: LLVM then
contracts and reorders nothing, and float32 / float64 expressions give the bits of Pillow's C.
"""

import numpy as np
from numba import njit

GRAY = np.uint8(128)  # what geometric operations uncover

jit = njit(nogil=True, cache=True)


@jit
def through(source, lut, out):
    for y in range(source.shape[0]):
        for x in range(source.shape[1]):
            for c in range(3):
                out[y, x, c] = lut[c, source[y, x, c]]


@jit
def luma(r, g, b):
    """L of RGB, libImaging/Convert.c: L24."""
    return (np.int32(r) * 19595 + np.int32(g) * 38470 + np.int32(b) * 7471 + 0x8000) >> 16


@jit
def blend(a, b, factor):
    """libImaging/Blend.c in float32: a + factor·(b − a), truncated; clipped first where it extrapolates."""
    value = np.float32(a) + factor * np.float32(np.int32(b) - np.int32(a))
    if value <= np.float32(0.0):
        return np.uint8(0)
    if value >= np.float32(255.0):
        return np.uint8(255)
    return np.uint8(np.int32(value))


@jit
def color(source, lut, factor, out):
    """PIL.ImageEnhance.Color: blend with L."""
    for y in range(source.shape[0]):
        for x in range(source.shape[1]):
            r, g, b = lut[0, source[y, x, 0]], lut[1, source[y, x, 1]], lut[2, source[y, x, 2]]
            gray = luma(r, g, b)
            out[y, x, 0] = blend(gray, r, factor)
            out[y, x, 1] = blend(gray, g, factor)
            out[y, x, 2] = blend(gray, b, factor)


@jit
def sharpness(source, factor, out):
    """PIL.ImageEnhance.Sharpness: blend with ImageFilter.SMOOTH, whose border copies the source.

    Pillow sums float32 products with 1/13 and 5/13 and rounds. The exact sum is a multiple of 1/13, never closer
    than 1/26 to a rounding boundary, so integer rounding gives the same byte.
    """
    height, width, _ = source.shape
    for y in range(height):
        inner = 0 < y < height - 1
        for x in range(width):
            for c in range(3):
                v = np.int32(source[y, x, c])
                if inner and 0 < x < width - 1:
                    total = 4 * v
                    for j in range(y - 1, y + 2):
                        for i in range(x - 1, x + 2):
                            total += np.int32(source[j, i, c])
                    smooth = (2 * total + 13) // 26
                else:
                    smooth = v
                out[y, x, c] = blend(smooth, v, factor)


@jit
def rotate(source, lut, cos, sin, out):
    """PIL.Image.rotate, nearest, about the centre: libImaging/Geometry.c affine_fixed, 16.16 fixed point."""
    height, width, _ = source.shape
    # The offset in the operation order of PIL.Image.rotate.
    offset_x = cos * (-(width / 2)) + sin * (-(height / 2)) + 0.0 + width / 2
    offset_y = -sin * (-(width / 2)) + cos * (-(height / 2)) + 0.0 + height / 2
    row_x = _fixed(offset_x + cos * 0.5 + sin * 0.5)
    row_y = _fixed(offset_y + -sin * 0.5 + cos * 0.5)
    dx_x, dx_y = _fixed(cos), _fixed(-sin)
    dy_x, dy_y = _fixed(sin), _fixed(cos)
    for y in range(height):
        xx, yy = row_x, row_y
        for x in range(width):
            i, j = xx >> 16, yy >> 16
            if 0 <= i < width and 0 <= j < height:
                for c in range(3):
                    out[y, x, c] = lut[c, source[j, i, c]]
            else:
                for c in range(3):
                    out[y, x, c] = GRAY
            xx += dx_x
            yy += dx_y
        row_x += dy_x
        row_y += dy_y


@jit
def _fixed(v):
    return int(np.floor(v * 65536.0 + 0.5))


@jit
def translate(source, lut, shift_x, shift_y, out):
    """Image.transform(AFFINE, (1, 0, shift_x, 0, 1, shift_y)), nearest: libImaging/Geometry.c ImagingScaleAffine."""
    height, width, _ = source.shape
    columns = np.empty(width, np.int64)
    at = shift_x + 0.5
    for x in range(width):
        columns[x] = -1 if at < 0.0 else int(at)
        at += 1.0
    at = shift_y + 0.5
    for y in range(height):
        j = -1 if at < 0.0 else int(at)
        at += 1.0
        for x in range(width):
            i = columns[x]
            if 0 <= i < width and 0 <= j < height:
                for c in range(3):
                    out[y, x, c] = lut[c, source[j, i, c]]
            else:
                for c in range(3):
                    out[y, x, c] = GRAY


@jit
def shear_x(source, lut, m, out):
    """Image.transform(AFFINE, (1, m, 0, 0, 1, 0), BICUBIC): the vertical fraction is 0, one row is read."""
    height, width, _ = source.shape
    for y in range(height):
        for x in range(width):
            at = 1.0 * (x + 0.5) + m * (y + 0.5) + 0.0
            if at < 0.0 or at >= width:
                for c in range(3):
                    out[y, x, c] = GRAY
                continue
            at -= 0.5
            i = int(np.floor(at))
            d = at - i
            i0, i1, i2, i3 = _clip(i - 1, width), _clip(i, width), _clip(i + 1, width), _clip(i + 2, width)
            for c in range(3):
                out[y, x, c] = _cubic(
                    float(lut[c, source[y, i0, c]]),
                    float(lut[c, source[y, i1, c]]),
                    float(lut[c, source[y, i2, c]]),
                    float(lut[c, source[y, i3, c]]),
                    d,
                )


@jit
def shear_y(source, lut, m, out):
    """Image.transform(AFFINE, (1, 0, 0, m, 1, 0), BICUBIC): the horizontal fraction is 0, one column is read."""
    height, width, _ = source.shape
    for y in range(height):
        for x in range(width):
            at = m * (x + 0.5) + 1.0 * (y + 0.5) + 0.0
            if at < 0.0 or at >= height:
                for c in range(3):
                    out[y, x, c] = GRAY
                continue
            at -= 0.5
            j = int(np.floor(at))
            d = at - j
            j0, j1, j2, j3 = (
                _clip(j - 1, height),
                _clip(j, height),
                _clip(j + 1, height),
                _clip(j + 2, height),
            )
            for c in range(3):
                out[y, x, c] = _cubic(
                    float(lut[c, source[j0, x, c]]),
                    float(lut[c, source[j1, x, c]]),
                    float(lut[c, source[j2, x, c]]),
                    float(lut[c, source[j3, x, c]]),
                    d,
                )


@jit
def _cubic(v1, v2, v3, v4, d):
    """libImaging/Geometry.c BICUBIC, clipped and truncated to a byte."""
    p2 = -v1 + v3
    p3 = 2 * (v1 - v2) + v3 - v4
    p4 = -v1 + v2 - v3 + v4
    value = v2 + d * (p2 + d * (p3 + d * p4))
    if value <= 0.0:
        return np.uint8(0)
    if value >= 255.0:
        return np.uint8(255)
    return np.uint8(int(value))


@jit
def _clip(i, n):
    return min(max(i, 0), n - 1)
