"""JDA operations that move pixels: rotate, translate, shear; each reads its source through a table `lut` u8 (3, 256).

`source` and `out` are u8 (H, W, 3); only `region` (top, left, bottom, right) of `out` is written, and only what
`reach` says of it is read. Each function names the Pillow source it reproduces.
"""

import numpy as np

from kernels.jda.enhance import ONE, TWO, jit, through_row

GRAY = np.uint8(128)  # what geometric operations uncover


@jit
def reach(region, a, b, c, d, e, f, height, width):
    """The pixels that `region` of the output may read under the affine map x, y -> a·x + b·y + c, d·x + e·y + f.

    The bounding box of the mapped corners with a margin of three pixels, for a bicubic's neighbours and rounding;
    (top, left, bottom, right), cut to the image and possibly empty.
    """
    top, left, bottom, right = region
    low_x = c + min(a * left, a * right) + min(b * top, b * bottom)
    high_x = c + max(a * left, a * right) + max(b * top, b * bottom)
    low_y = f + min(d * left, d * right) + min(e * top, e * bottom)
    high_y = f + max(d * left, d * right) + max(e * top, e * bottom)
    return (
        min(max(int(np.floor(low_y)) - 3, 0), height),
        min(max(int(np.floor(low_x)) - 3, 0), width),
        min(max(int(np.ceil(high_y)) + 3, 0), height),
        min(max(int(np.ceil(high_x)) + 3, 0), width),
    )


@jit
def rotation_offset(cos, sin, height, width):
    """Where the origin comes from, in the operation order of PIL.Image.rotate."""
    x = cos * (-(width / 2)) + sin * (-(height / 2)) + 0.0 + width / 2
    y = -sin * (-(width / 2)) + cos * (-(height / 2)) + 0.0 + height / 2
    return x, y


@jit
def rotate(source, lut, cos, sin, region, out):
    """PIL.Image.rotate, nearest, about the centre: libImaging/Geometry.c affine_fixed, 16.16 fixed point."""
    height, width, _ = source.shape
    top, left, bottom, right = region
    offset_x, offset_y = rotation_offset(cos, sin, height, width)
    dx_x, dx_y = _fixed(cos), _fixed(-sin)
    dy_x, dy_y = _fixed(sin), _fixed(cos)
    row_x = _fixed(offset_x + cos * 0.5 + sin * 0.5) + top * dy_x
    row_y = _fixed(offset_y + -sin * 0.5 + cos * 0.5) + top * dy_y
    reds, greens, blues = lut
    pixels = source.reshape(source.size)
    for y in range(top, bottom):
        first, stop = _inside(row_x, dx_x, width << 16, left, right)
        first, stop = _inside(row_y, dx_y, height << 16, first, stop)
        result = out[y].reshape(3 * width)
        result[3 * left : 3 * first] = GRAY
        result[3 * stop : 3 * right] = GRAY
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
    """The part of [first, stop) whose x have 0 <= start + x·step < limit: (first, stop), first <= stop."""
    if step > 0:
        low, high = -(start // step), -((start - limit) // step)
    elif step < 0:
        low, high = (start - limit) // -step + 1, start // -step + 1
    else:
        low, high = first, stop if 0 <= start < limit else first
    first = min(max(first, low), stop)
    return first, max(first, min(stop, high))


@jit
def _fixed(v):
    return int(np.floor(v * 65536.0 + 0.5))


@jit
def translate(source, lut, shift_x, shift_y, region, out):
    """Image.transform(AFFINE, (1, 0, shift_x, 0, 1, shift_y)), nearest: libImaging/Geometry.c ImagingScaleAffine."""
    height, width, _ = source.shape
    top, left, bottom, right = region
    columns = np.empty(width, np.int64)
    at = shift_x + 0.5
    for x in range(width):
        columns[x] = -1 if at < 0.0 else int(at)
        at += 1.0
    at = shift_y + 0.5
    for y in range(bottom):
        j = -1 if at < 0.0 else int(at)
        at += 1.0
        if y < top:
            continue
        for x in range(left, right):
            i = columns[x]
            if 0 <= i < width and 0 <= j < height:
                for c in range(3):
                    out[y, x, c] = lut[c, source[j, i, c]]
            else:
                for c in range(3):
                    out[y, x, c] = GRAY


@jit
def shear_x(source, lut, m, region, out):
    """Image.transform(AFFINE, (1, m, 0, 0, 1, 0), BICUBIC): the vertical fraction is 0, one row is read."""
    width = source.shape[1]
    top, left, bottom, right = region
    lanes = 3 * width
    line = np.empty(lanes + 12, np.uint8)  # a row after the table, its ends repeated twice on either side
    for y in range(top, bottom):
        shift = m * (y + 0.5)
        low = min(max(int(np.floor(left + shift)) - 3, 0), width)
        high = min(max(int(np.ceil(right + shift)) + 3, 0), width)
        through_row(source[y].reshape(lanes), lut, low, high, line[6:])
        for c in range(6):
            line[c], line[lanes + 6 + c] = line[6 + c % 3], line[lanes + 3 + c % 3]
        result = out[y].reshape(lanes)
        x = left
        while x < right and (x + 0.5) + shift < 0.0:
            x += 1
        result[3 * left : 3 * x] = GRAY
        at = (x + 0.5) + shift
        while x < right and at < width:
            # Pillow computes `at` for each pixel. Up to the next power of two all these sums are rounded alike, so
            # the pixels of a run share their fraction to the last bit.
            limit = 1.0
            while limit <= at:
                limit *= 2.0
            limit = min(limit, float(width))
            stop = min(right, int(limit - shift) + 2)
            while (stop - 0.5) + shift >= limit:
                stop -= 1
            column = int(np.floor(at - 0.5))
            _cubic_run(line[3 * (column + 1) :], (at - 0.5) - column, result[3 * x : 3 * stop])
            x = stop
            at = (x + 0.5) + shift
        result[3 * x : 3 * right] = GRAY


@jit
def _cubic_run(line, d, out):
    """out[i] = `_cubic` of line[i], line[i + 3], line[i + 6], line[i + 9]."""
    first, second, third, fourth = line, line[3:], line[6:], line[9:]
    for i in range(len(out)):
        out[i] = _cubic(first[i], second[i], third[i], fourth[i], d)


@jit
def shear_y(source, lut, m, region, out):
    """Image.transform(AFFINE, (1, 0, 0, m, 1, 0), BICUBIC): the horizontal fraction is 0, one column is read."""
    height = source.shape[0]
    top, left, bottom, right = region
    for y in range(top, bottom):
        for x in range(left, right):
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
