"""JDA operations that map a value to a value, on the GPU: they compose into one table u8 (3, 256) per image.

The twin of the tables in `kernels.jda`, with their bytes.
"""

# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# (Triton's annotations are those of Python, not of the language inside @triton.jit.)

import triton
import triton.language as tl

from kernels.jda.gpu.pixels import blend, image_of, luma, operation, read
from kernels.jda.gpu.plan import HISTOGRAM, LUMA, STEP, WORDS, field
from kernels.jda.ops import CODES

_TABLE_IN = field(STEP, "table_in")
_WANTS = field(STEP, "wants")
_HISTOGRAM = field(STEP, "histogram")
_LUMA = field(STEP, "luma")
_OPS = field(STEP, "ops")
_SIGNS = field(STEP, "signs")
_TABLE = field(STEP, "table")

_INVERT = tl.constexpr(CODES["invert"])
_POSTERIZE = tl.constexpr(CODES["posterize"])
_SOLARIZE = tl.constexpr(CODES["solarize"])
_AUTOCONTRAST = tl.constexpr(CODES["autocontrast"])
_EQUALIZE = tl.constexpr(CODES["equalize"])
_CONTRAST = tl.constexpr(CODES["contrast"])

_CHUNK = tl.constexpr(16)  # 256 x 256 comparisons at once would not fit in registers


@triton.jit
def statistics_kernel(records, TILE: tl.constexpr):
    """Histogram of the source (not through the table) and sum of its luma (through it), where they are wanted."""
    record = records + tl.program_id(1) * WORDS
    source, packed, height, width = image_of(record)
    table, wants = tl.load(record + _TABLE_IN), tl.load(record + _WANTS)
    red = tl.zeros((256,), tl.int32)
    green, blue = red, red
    lumas = tl.zeros((TILE,), tl.int32)
    for first in range(tl.program_id(0) * TILE, height * width, tl.num_programs(0) * TILE):
        at = first + tl.arange(0, TILE)
        inside = at < height * width
        if wants & HISTOGRAM != 0:
            r, g, b = read(source, packed, 0, at, inside)
            red += tl.histogram(r, 256, mask=inside)
            green += tl.histogram(g, 256, mask=inside)
            blue += tl.histogram(b, 256, mask=inside)
        if wants & LUMA != 0:
            r, g, b = read(source, packed, table, at, inside)
            lumas += tl.where(inside, luma(r, g, b), 0)
    if wants & HISTOGRAM != 0:
        histogram = tl.load(record + _HISTOGRAM).to(tl.pointer_type(tl.int32)) + tl.arange(0, 256)
        tl.atomic_add(histogram, red, sem="relaxed")
        tl.atomic_add(histogram + 256, green, sem="relaxed")
        tl.atomic_add(histogram + 512, blue, sem="relaxed")
    if wants & LUMA != 0:
        tl.atomic_add(tl.load(record + _LUMA).to(tl.pointer_type(tl.int64)), tl.sum(lumas.to(tl.int64), 0))


@triton.jit
def compose_kernel(records, program, OPS: tl.constexpr):
    """Put the operations of record `program_id(0)` into its table, for channel `program_id(1)`."""
    record = records + tl.program_id(0) * WORDS
    channel = tl.program_id(1) * 256
    v = tl.arange(0, 256)
    table_in = tl.load(record + _TABLE_IN)
    table = v
    if table_in != 0:
        table = tl.load(table_in.to(tl.pointer_type(tl.uint8)) + channel + v).to(tl.int32)
    histogram_at = tl.load(record + _HISTOGRAM)
    histogram = tl.zeros((256,), tl.int32)
    if histogram_at != 0:
        histogram = tl.load(histogram_at.to(tl.pointer_type(tl.int32)) + channel + v)
    ops, signs = tl.load(record + _OPS), tl.load(record + _SIGNS)
    for i in range(OPS):
        if (ops >> i) & 1 != 0:
            code, m, signed, _ = operation(program, signs, i)
            if code == _INVERT:
                table = 255 - table
            elif code == _POSTERIZE:
                table = table & ~((1 << (8 - m.to(tl.int32))) - 1)
            elif code == _SOLARIZE:
                table = tl.where(table.to(tl.float64) < m, table, 255 - table)
            elif code == _EQUALIZE:
                table = _equalized(table, histogram)
            elif code == _AUTOCONTRAST:
                table = _autocontrasted(table, histogram)
            else:  # contrast or brightness
                gray = tl.zeros((256,), tl.int32)
                if code == _CONTRAST:
                    gray += _mean_gray(record)
                table = blend(gray, table, (1.0 + signed).to(tl.float32))
    tl.store(tl.load(record + _TABLE).to(tl.pointer_type(tl.uint8)) + channel + v, table.to(tl.uint8))


@triton.jit
def _equalized(table, histogram):
    """PIL.ImageOps.equalize of the image through the table.

    Pillow sums the histogram below a value. That is the number of pixels whose value, through the table, is smaller:
    no histogram has to be pushed through the table.
    """
    last = tl.max(tl.where(histogram > 0, table, 0), 0)
    step = tl.sum(tl.where(table == last, 0, histogram), 0) // 255
    below = tl.zeros((256,), tl.int32)
    for first in range(0, 256, _CHUNK):
        some = first + tl.arange(0, _CHUNK)
        smaller = tl.gather(table, some, 0)[None, :] < table[:, None]
        below += tl.sum(tl.where(smaller, tl.gather(histogram, some, 0)[None, :], 0), 1)
    divisor = tl.maximum(step, 1)
    return tl.where(step == 0, table, tl.minimum((divisor // 2 + below) // divisor, 255))


@triton.jit
def _autocontrasted(table, histogram):
    """PIL.ImageOps.autocontrast, without cutoff, of the image through the table."""
    low = tl.min(tl.where(histogram > 0, table, 255), 0)
    high = tl.max(tl.where(histogram > 0, table, 0), 0)
    scale = 255.0 / tl.maximum(high - low, 1).to(tl.float64)
    offset = -low.to(tl.float64) * scale
    stretched = (table.to(tl.float64) * scale + offset).to(tl.int32)
    return tl.where(high > low, tl.minimum(tl.maximum(stretched, 0), 255), table)


@triton.jit
def _mean_gray(record):
    _, _, height, width = image_of(record)
    total = tl.load(tl.load(record + _LUMA).to(tl.pointer_type(tl.int64)))
    return (total.to(tl.float64) / (height * width).to(tl.float64) + 0.5).to(tl.int32)
