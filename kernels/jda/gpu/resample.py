"""Crop, resize and flip on the GPU: the twin of `kernels.jda.resample`, with its bytes.

Both passes of a resize happen in one kernel: the second sums over values of the first that are computed where they
are needed, and rounded to bytes as if they had been stored. At a scale s ≥ 1 this reads about 4s² source pixels for
one of the output where two kernels read 2s² + 2s, but nothing is written in between, and an image at a usual scale
of 1 to 2 stays in the caches.
"""

# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# (Triton's annotations are those of Python, not of the language inside @triton.jit.)

import numpy as np
import triton
import triton.language as tl

from kernels.jda.gpu.pixels import image_of, read
from kernels.jda.gpu.plan import CROP, WORDS, field

_TABLE = field(CROP, "table")
_TOP = field(CROP, "top")
_LEFT = field(CROP, "left")
_BOX_HEIGHT = field(CROP, "box_height")
_BOX_WIDTH = field(CROP, "box_width")
_FLIP = field(CROP, "flip")
_ROWS = field(CROP, "rows")
_COLUMNS = field(CROP, "columns")
_TARGET = field(CROP, "target")

_BITS = tl.constexpr(22)  # fractional bits of a coefficient
_ONE = tl.constexpr(1 << 22)
_HALF = tl.constexpr(1 << 21)


def coefficient_words(length: np.ndarray, size: int) -> np.ndarray:
    """32-bit words that the coefficients from `length` to `size` pixels take: first index, count and taps (size,)."""
    return size * (2 + 2 * np.ceil(np.maximum(length / size, 1.0)).astype(np.int64) + 1)


@triton.jit
def coefficients_kernel(records, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The coefficients of record `program_id(0)`, vertical or horizontal; as `kernels.jda.resample._coefficients`."""
    record = records + tl.program_id(0) * WORDS
    horizontal = tl.program_id(1)
    length = tl.load(record + _BOX_HEIGHT + horizontal).to(tl.int32)
    out = tl.load(record + _ROWS + horizontal).to(tl.pointer_type(tl.int32))
    x = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = x < SIZE
    scale = length.to(tl.float64) / SIZE
    support = tl.maximum(scale, 1.0)
    inverse = 1.0 / support
    centre = (x.to(tl.float64) + 0.5) * scale
    low = tl.maximum((centre - support + 0.5).to(tl.int32), 0)
    count = tl.minimum((centre + support + 0.5).to(tl.int32), length) - low
    most = tl.max(tl.where(inside, count, 0), 0)
    total = tl.zeros((BLOCK,), tl.float64)
    for k in range(most):
        total += _weight(k, low, count, centre, inverse)
    divisor = tl.where(total != 0.0, total, 1.0)
    tl.store(out + x, low, mask=inside)
    tl.store(out + SIZE + x, count, mask=inside)
    for k in range(most):
        tap = (0.5 + _weight(k, low, count, centre, inverse) / divisor * _ONE).to(tl.int32)
        tl.store(out + (2 + k) * SIZE + x, tap, mask=inside)


@triton.jit
def _weight(k, low, count, centre, inverse):
    weight = tl.maximum(1.0 - tl.abs(((k + low).to(tl.float64) - centre + 0.5) * inverse), 0.0)
    return tl.where(k < count, weight, 0.0)


@triton.jit
def _pass(source, packed, table, line, lines, start, count, taps, most, stride, SIZE: tl.constexpr):
    """One byte per channel of the first pass: along an axis of the source from `line` on, where `lines`."""
    r = tl.full(lines.shape, _HALF, tl.int32)
    g, b = r, r
    for k in range(most):
        near = lines & (k < count)
        tap = tl.load(taps + k * SIZE, mask=k < count, other=0)
        near_r, near_g, near_b = read(source, packed, table, line + (start + k) * stride, near)
        r += near_r * tap
        g += near_g * tap
        b += near_b * tap
    return r >> _BITS, g >> _BITS, b >> _BITS


@triton.jit
def _two_passes(source, packed, table, origin, whole, second, second_stride, first, first_stride, SIZE: tl.constexpr):
    """Red, green, blue of output pixels; `first` and `second` point at their coefficients along the two axes."""
    start, count, taps = tl.load(first), tl.load(first + SIZE), first + 2 * SIZE
    line_start, line_count, line_taps = tl.load(second), tl.load(second + SIZE), second + 2 * SIZE
    most = tl.max(count)
    r = tl.full(whole.shape, _HALF, tl.int32)
    g, b = r, r
    for k in range(tl.max(line_count)):
        lines = whole & (k < line_count)
        tap = tl.load(line_taps + k * SIZE, mask=k < line_count, other=0)
        line = origin + (line_start + k) * second_stride
        line_r, line_g, line_b = _pass(source, packed, table, line, lines, start, count, taps, most, first_stride, SIZE)
        r += line_r * tap
        g += line_g * tap
        b += line_b * tap
    return r >> _BITS, g >> _BITS, b >> _BITS


@triton.jit
def resize_kernel(records, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Tile `program_id(0)` of the view of record `program_id(1)`."""
    record = records + tl.program_id(1) * WORDS
    source, packed, _, width = image_of(record)
    table = tl.load(record + _TABLE)
    h, w = tl.load(record + _BOX_HEIGHT), tl.load(record + _BOX_WIDTH)
    origin = (tl.load(record + _TOP) * width + tl.load(record + _LEFT)).to(tl.int32)
    y, x = _tile(SIZE, ROWS, COLUMNS)
    whole = (y < SIZE) & (x < SIZE)
    rows = tl.load(record + _ROWS).to(tl.pointer_type(tl.int32)) + tl.minimum(y, SIZE - 1)
    columns = tl.load(record + _COLUMNS).to(tl.pointer_type(tl.int32)) + tl.minimum(x, SIZE - 1)
    # Where Pillow 13 passes vertically first. It also asks for w ≠ S; without, the horizontal pass copies anyway.
    if (h > SIZE) & (h - SIZE > 2 * (w - SIZE)):
        r, g, b = _two_passes(source, packed, table, origin, whole, columns, 1, rows, width, SIZE)
    else:
        r, g, b = _two_passes(source, packed, table, origin, whole, rows, width, columns, 1, SIZE)
    _store(record, y, x, r, g, b, whole, SIZE)


@triton.jit
def shift_kernel(records, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Crop without resizing: tile `program_id(0)` of the view of record `program_id(1)`, black outside the image."""
    record = records + tl.program_id(1) * WORDS
    source, packed, height, width = image_of(record)
    y, x = _tile(SIZE, ROWS, COLUMNS)
    whole = (y < SIZE) & (x < SIZE)
    j, i = y + tl.load(record + _TOP).to(tl.int32), x + tl.load(record + _LEFT).to(tl.int32)
    covered = whole & (j >= 0) & (j < height) & (i >= 0) & (i < width)
    r, g, b = read(source, packed, tl.load(record + _TABLE), j * width + i, covered)
    _store(record, y, x, tl.where(covered, r, 0), tl.where(covered, g, 0), tl.where(covered, b, 0), whole, SIZE)


@triton.jit
def _tile(SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    across = tl.cdiv(SIZE, COLUMNS)
    top, left = tl.program_id(0) // across * ROWS, tl.program_id(0) % across * COLUMNS
    return top + tl.arange(0, ROWS)[:, None], left + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _store(record, y, x, r, g, b, whole, SIZE: tl.constexpr):
    x = tl.where(tl.load(record + _FLIP) != 0, SIZE - 1 - x, x)
    byte = tl.load(record + _TARGET).to(tl.pointer_type(tl.uint8)) + 3 * (y * SIZE + x)
    tl.store(byte, r.to(tl.uint8), mask=whole)
    tl.store(byte + 1, g.to(tl.uint8), mask=whole)
    tl.store(byte + 2, b.to(tl.uint8), mask=whole)
