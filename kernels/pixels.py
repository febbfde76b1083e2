"""JDA operations that write pixels, each reading its source through a table `lut` u8 (3, 256).

`source` and `out` are u8 (H, W, 3). Each function names the Pillow source it reproduces. No fast-math: LLVM then
contracts and reorders nothing, and float32 / float64 expressions give the bits of Pillow's C.
"""

import hashlib
import os
from pathlib import Path

import numba
import numpy as np

GRAY = np.uint8(128)  # what geometric operations uncover
ONE, TWO = np.uint64(1), np.uint64(2)  # unsigned indices: numba lets a signed one count from the end


def _cache_folder() -> str:
    """Numba's cache knows a function's own file, not those of what it calls: keep one per state of all sources."""
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return str(home / "jda-distill" / hashlib.sha256(sources).hexdigest()[:16])


_CACHE = _cache_folder()


def jit(function):
    """numba.njit without the GIL, compiled once per machine and state of this package."""
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, _CACHE
    try:
        return numba.njit(nogil=True, cache=True)(function)
    finally:
        numba.config.CACHE_DIR = before


@jit
def through(source, lut, out):
    for y in range(source.shape[0]):
        for x in range(source.shape[1]):
            for c in range(3):
                out[y, x, c] = lut[c, source[y, x, c]]


@jit
def identity():
    lut = np.empty((3, 256), np.uint8)
    for v in range(256):
        lut[:, v] = v
    return lut


@jit
def word_tables(lut):
    """Tables u32 (256,) for red, green and blue, whose entries or-ed give a pixel's bytes after `lut` in one word."""
    red, green, blue = np.empty(256, np.uint32), np.empty(256, np.uint32), np.empty(256, np.uint32)
    for v in range(256):
        red[v] = lut[0, v]
        green[v] = np.uint32(lut[1, v]) << np.uint32(8)
        blue[v] = np.uint32(lut[2, v]) << np.uint32(16)
    return red, green, blue


@jit
def luma(r, g, b):
    """L of RGB, libImaging/Convert.c: L24."""
    return (np.int32(r) * 19595 + np.int32(g) * 38470 + np.int32(b) * 7471 + 0x8000) >> 16


@jit
def blend(a, b, factor):
    """libImaging/Blend.c in float32: a + factor·(b − a), truncated; clipped first where it extrapolates."""
    value = np.float32(a) + factor * np.float32(np.int32(np.int32(b) - np.int32(a)))
    if value <= np.float32(0.0):
        return np.uint8(0)
    if value >= np.float32(255.0):
        return np.uint8(255)
    return np.uint8(np.int32(value))


@jit
def color(source, lut, factor, out):
    """PIL.ImageEnhance.Color: blend with L, read from a table of all (L, value)."""
    table = np.empty((256, 256), np.uint8)
    for gray in range(256):
        for v in range(256):
            table[gray, v] = blend(gray, v, factor)
    blends = table.reshape(256 * 256)
    reds, greens, blues = lut
    width = source.shape[1]
    for y in range(len(source)):
        row, result = source[y].reshape(3 * width), out[y].reshape(3 * width)
        for x in range(width):
            i = np.uint64(3 * x)
            r, g, b = reds[row[i]], greens[row[i + ONE]], blues[row[i + TWO]]
            gray = np.uint64(luma(r, g, b) << 8)
            result[i], result[i + ONE], result[i + TWO] = blends[gray + r], blends[gray + g], blends[gray + b]


@jit
def sharpness(source, factor, out):
    """PIL.ImageEnhance.Sharpness: blend with ImageFilter.SMOOTH, whose border copies the source.

    Pillow sums float32 products with 1/13 and 5/13 and rounds. The exact sum is a multiple of 1/13, never closer
    than 1/26 to a rounding boundary, so integer rounding gives the same byte.
    """
    height, width, _ = source.shape
    out[0], out[-1] = source[0], source[-1]
    if width < 3:
        out[:] = source
        return
    lanes = 3 * width
    sums = np.empty(lanes, np.int32)  # of three rows; a pixel's neighbours in the row are three bytes off
    left, centre, right = sums, sums[3:], sums[6:]
    for y in range(1, height - 1):
        row, result = source[y].reshape(lanes), out[y].reshape(lanes)
        above, below = source[y - 1].reshape(lanes), source[y + 1].reshape(lanes)
        for i in range(lanes):
            sums[i] = np.int32(above[i]) + np.int32(row[i]) + np.int32(below[i])
        inner, smoothed = row[3:], result[3:]
        for i in range(lanes - 6):
            v = np.int32(inner[i])
            total = np.int32(left[i] + centre[i] + right[i] + 4 * v)
            # (2·total + 13) // 26, exact for all totals up to 13·255
            smooth = np.int32((2 * total + 13) * 10083) >> 18
            smoothed[i] = blend(smooth, v, factor)
        result[:3], result[lanes - 3 :] = row[:3], row[lanes - 3 :]


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
    reds, greens, blues = lut
    pixels = source.reshape(source.size)
    for y in range(height):
        first, stop = _inside(row_x, dx_x, width << 16, 0, width)
        first, stop = _inside(row_y, dx_y, height << 16, first, stop)
        result = out[y].reshape(3 * width)
        result[: 3 * first] = GRAY
        result[3 * stop :] = GRAY
        xx, yy = row_x + first * dx_x, row_y + first * dx_y
        for x in range(first, stop):
            at, i = np.uint64(3 * ((yy >> 16) * width + (xx >> 16))), np.uint64(3 * x)
            result[i] = reds[pixels[at]]
            result[i + ONE] = greens[pixels[at + ONE]]
            result[i + TWO] = blues[pixels[at + TWO]]
            xx += dx_x
            yy += dx_y
        row_x += dy_x
        row_y += dy_y


@jit
def _inside(start, step, limit, first, stop):
    """The part of [first, stop) whose x have 0 <= start + x·step < limit: (first, stop), stop >= first."""
    if step > 0:
        first, stop = max(first, -(start // step)), min(stop, -((start - limit) // step))
    elif step < 0:
        first, stop = max(first, (start - limit) // -step + 1), min(stop, start // -step + 1)
    elif not 0 <= start < limit:
        stop = first
    return first, max(first, stop)


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
    lanes = 3 * width
    line = np.empty(lanes + 12, np.uint8)  # a row after the table, its ends repeated twice on either side
    for y in range(height):
        for x in range(width):
            for c in range(3):
                line[3 * x + c + 6] = lut[c, source[y, x, c]]
        for c in range(6):
            line[c], line[lanes + 6 + c] = line[6 + c % 3], line[lanes + 3 + c % 3]
        result = out[y].reshape(lanes)
        shift = m * (y + 0.5)
        x = 0
        while x < width and (x + 0.5) + shift < 0.0:
            x += 1
        result[: 3 * x] = GRAY
        at = (x + 0.5) + shift
        while x < width and at < width:
            # Pillow computes `at` for each pixel. Up to the next power of two all these sums are rounded alike, so
            # the pixels of a run share their fraction to the last bit.
            limit = 1.0
            while limit <= at:
                limit *= 2.0
            limit = min(limit, float(width))
            stop = min(width, int(limit - shift) + 2)
            while (stop - 0.5) + shift >= limit:
                stop -= 1
            column = int(np.floor(at - 0.5))
            _cubic_run(line[3 * (column + 1) :], (at - 0.5) - column, result[3 * x : 3 * stop])
            x = stop
            at = (x + 0.5) + shift
        result[3 * x :] = GRAY


@jit
def _cubic_run(line, d, out):
    """out[i] = `_cubic` of line[i], line[i + 3], line[i + 6], line[i + 9]."""
    first, second, third, fourth = line, line[3:], line[6:], line[9:]
    for i in range(len(out)):
        out[i] = _cubic(first[i], second[i], third[i], fourth[i], d)


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
                v1, v2 = lut[c, source[j0, x, c]], lut[c, source[j1, x, c]]
                v3, v4 = lut[c, source[j2, x, c]], lut[c, source[j3, x, c]]
                out[y, x, c] = _cubic(v1, v2, v3, v4, d)


@jit
def _cubic(v1, v2, v3, v4, d):
    """libImaging/Geometry.c BICUBIC in float64, clipped and truncated to a byte; the coefficients are whole numbers."""
    v1, v2, v3, v4 = np.int32(v1), np.int32(v2), np.int32(v3), np.int32(v4)
    p2 = np.float64(np.int32(v3 - v1))
    p3 = np.float64(np.int32(2 * (v1 - v2) + v3 - v4))
    p4 = np.float64(np.int32(v2 - v1 - v3 + v4))
    value = v2 + d * (p2 + d * (p3 + d * p4))
    if value <= 0.0:
        return np.uint8(0)
    if value >= 255.0:
        return np.uint8(255)
    return np.uint8(np.int32(value))


@jit
def _clip(i, n):
    return min(max(i, 0), n - 1)
