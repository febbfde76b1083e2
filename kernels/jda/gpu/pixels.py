"""JDA operations that write pixels, on the GPU: the twin of `kernels.jda.enhance`, with its bytes.

Decoded images are u8 (H, W, 3); what an operation writes is i32 (H, W), one word r | g << 8 | b << 16 per pixel: a
third more to move than bytes, but a single coalesced access where bytes take three. Every read goes through a table
u8 (3, 256). A program takes its arguments from one record of 16 words, so that a launch serves all images of a batch.

No kernel may be compiled with `enable_fp_fusion`: a contracted multiply-add would change the bytes.
"""

# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# (Triton's annotations are those of Python, not of the language inside @triton.jit.)

import triton
import triton.language as tl

from kernels.jda.gpu.plan import STEP, WORDS, field
from kernels.jda.ops import CODES

_SIGNS = field(STEP, "signs")
_TABLE = field(STEP, "table")
_OP = field(STEP, "op")
_TARGET = field(STEP, "target")
_OFFSET = field(STEP, "offset")
_JUMP = field(STEP, "jump")

_COLOR = tl.constexpr(CODES["color"])
_SHARPNESS = tl.constexpr(CODES["sharpness"])
_ROTATE = tl.constexpr(CODES["rotate"])
_SHEAR_X = tl.constexpr(CODES["shear_x"])
_SHEAR_Y = tl.constexpr(CODES["shear_y"])
_TRANSLATE_X = tl.constexpr(CODES["translate_x"])
_GRAY = tl.constexpr(128)  # what geometric operations uncover


@triton.jit
def image_of(record):
    """The first four fields of a record: address, packed, height, width."""
    return (
        tl.load(record),
        tl.load(record + 1) != 0,
        tl.load(record + 2).to(tl.int32),
        tl.load(record + 3).to(tl.int32),
    )


@triton.jit
def operation(program, signs, i):
    """Operation `i` of a program: its code, its magnitude with the sign that was drawn, its second parameter."""
    code = tl.load(program + i * WORDS)
    m = tl.load(program + i * WORDS + 1).to(tl.float64, bitcast=True)
    second = tl.load(program + i * WORDS + 2).to(tl.float64, bitcast=True)
    return code, m, tl.where((signs >> i) & 1 != 0, -m, m), second


@triton.jit
def read(source, packed, table, at, inside):
    """Pixels number `at` through the table: red, green, blue, i32. What is not `inside` is not read."""
    if packed:
        word = tl.load(source.to(tl.pointer_type(tl.int32)) + at, mask=inside, other=0)
        r, g, b = word & 255, (word >> 8) & 255, word >> 16
    else:
        byte = source.to(tl.pointer_type(tl.uint8)) + 3 * at
        r = tl.load(byte, mask=inside, other=0).to(tl.int32)
        g = tl.load(byte + 1, mask=inside, other=0).to(tl.int32)
        b = tl.load(byte + 2, mask=inside, other=0).to(tl.int32)
    if table != 0:
        entry = table.to(tl.pointer_type(tl.uint8))
        r = tl.load(entry + r).to(tl.int32)
        g = tl.load(entry + 256 + g).to(tl.int32)
        b = tl.load(entry + 512 + b).to(tl.int32)
    return r, g, b


@triton.jit
def luma(r, g, b):
    return (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16


@triton.jit
def blend(a, b, factor):
    """As `kernels.jda.enhance.blend`: clipping first, then truncating gives what its branches give."""
    value = a.to(tl.float32) + factor * (b - a).to(tl.float32)
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32)


@triton.jit
def _pack(r, g, b):
    return r | (g << 8) | (b << 16)


@triton.jit
def _color(source, packed, table, at, inside, factor):
    r, g, b = read(source, packed, table, at, inside)
    gray = luma(r, g, b)
    return _pack(blend(gray, r, factor), blend(gray, g, factor), blend(gray, b, factor))


@triton.jit
def _sharpness(source, packed, table, y, x, height, width, inside, factor):
    at = y * width + x
    inner = (y > 0) & (y < height - 1) & (x > 0) & (x < width - 1)
    r, g, b = read(source, packed, table, at, inside)
    total_r, total_g, total_b = 5 * r, 5 * g, 5 * b
    for j in tl.static_range(-1, 2):
        for i in tl.static_range(-1, 2):
            if i != 0 or j != 0:
                near_r, near_g, near_b = read(source, packed, table, at + j * width + i, inner)
                total_r += near_r
                total_g += near_g
                total_b += near_b
    smooth_r = tl.where(inner, (2 * total_r + 13) // 26, r)
    smooth_g = tl.where(inner, (2 * total_g + 13) // 26, g)
    smooth_b = tl.where(inner, (2 * total_b + 13) // 26, b)
    return _pack(blend(smooth_r, r, factor), blend(smooth_g, g, factor), blend(smooth_b, b, factor))


@triton.jit
def _nearest(source, packed, table, j, i, height, width, inside):
    """The pixel at row `j`, column `i`, gray where the image has none."""
    covered = inside & (i >= 0) & (i < width) & (j >= 0) & (j < height)
    r, g, b = read(source, packed, table, j * width + i, covered)
    return tl.where(covered, _pack(r, g, b), _pack(_GRAY, _GRAY, _GRAY))


@triton.jit
def _fixed(v):
    return tl.floor(v * 65536.0 + 0.5).to(tl.int64)


@triton.jit
def _rotated(cos, sin, height, width, top, left, dy, dx):
    """Row and column that rotate reads for the pixel (top + dy, left + dx): affine_fixed, as `jda.enhance.rotate`.

    The corner of the tile is 64-bit; only its fraction meets what is added inside the tile.
    """
    half_x, half_y = width.to(tl.float64) * 0.5, height.to(tl.float64) * 0.5
    offset_x = cos * (-half_x) + sin * (-half_y) + 0.0 + half_x
    offset_y = -sin * (-half_x) + cos * (-half_y) + 0.0 + half_y
    cos_fixed, sin_fixed, minus_sin_fixed = _fixed(cos), _fixed(sin), _fixed(-sin)
    xx = _fixed(offset_x + cos * 0.5 + sin * 0.5) + left * cos_fixed + top * sin_fixed
    yy = _fixed(offset_y + -sin * 0.5 + cos * 0.5) + left * minus_sin_fixed + top * cos_fixed
    more_x = dx * cos_fixed.to(tl.int32) + dy * sin_fixed.to(tl.int32)
    more_y = dx * minus_sin_fixed.to(tl.int32) + dy * cos_fixed.to(tl.int32)
    j = (yy >> 16).to(tl.int32) + (((yy & 0xFFFF).to(tl.int32) + more_y) >> 16)
    i = (xx >> 16).to(tl.int32) + (((xx & 0xFFFF).to(tl.int32) + more_x) >> 16)
    return j, i


@triton.jit
def _shear(source, packed, table, along, across, length, stride_along, stride_across, inside, m):
    """Bicubic along one axis; `along` and `across` are the pixel's coordinates on it and on the other one."""
    at = (along.to(tl.float64) + 0.5) + m * (across.to(tl.float64) + 0.5)
    covered = inside & (at >= 0.0) & (at < length.to(tl.float64))
    at -= 0.5
    floor = tl.floor(at)
    d = at - floor
    i = floor.to(tl.int32)
    line = across * stride_across
    r1, g1, b1 = read(source, packed, table, line + _clip(i - 1, length) * stride_along, covered)
    r2, g2, b2 = read(source, packed, table, line + _clip(i, length) * stride_along, covered)
    r3, g3, b3 = read(source, packed, table, line + _clip(i + 1, length) * stride_along, covered)
    r4, g4, b4 = read(source, packed, table, line + _clip(i + 2, length) * stride_along, covered)
    word = _pack(_cubic(r1, r2, r3, r4, d), _cubic(g1, g2, g3, g4, d), _cubic(b1, b2, b3, b4, d))
    return tl.where(covered, word, _pack(_GRAY, _GRAY, _GRAY))


@triton.jit
def _cubic(v1, v2, v3, v4, d):
    """As `kernels.jda.enhance._cubic`, whose coefficients are small integers: exact in any arithmetic."""
    p2 = (v3 - v1).to(tl.float64)
    p3 = (2 * (v1 - v2) + v3 - v4).to(tl.float64)
    p4 = (v2 - v1 - v3 + v4).to(tl.float64)
    value = v2.to(tl.float64) + d * (p2 + d * (p3 + d * p4))
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32)


@triton.jit
def _clip(i, n):
    return tl.minimum(tl.maximum(i, 0), n - 1)


@triton.jit
def pixels_kernel(records, program, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The pixel operation of record `program_id(1)`, if it has one; the programs along axis 0 share its tiles."""
    record = records + tl.program_id(1) * WORDS
    op = tl.load(record + _OP)
    if op < 0:
        return
    source, packed, height, width = image_of(record)
    table = tl.load(record + _TABLE)
    target = tl.load(record + _TARGET).to(tl.pointer_type(tl.int32))
    offset, jump = tl.load(record + _OFFSET).to(tl.int32), tl.load(record + _JUMP).to(tl.int32)
    code, m, signed, second = operation(program, tl.load(record + _SIGNS), op)
    factor = (1.0 + signed).to(tl.float32)
    horizontal = (code == _SHEAR_X) | (code == _TRANSLATE_X)
    tiles_x = tl.cdiv(width, COLUMNS)
    dy, dx = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(height, ROWS) * tiles_x, tl.num_programs(0)):
        top, left = tile // tiles_x * ROWS, tile % tiles_x * COLUMNS
        y, x = top + dy, left + dx
        inside = (y < height) & (x < width)
        at = y * width + x
        if code == _COLOR:
            word = _color(source, packed, table, at, inside, factor)
        elif code == _SHARPNESS:
            word = _sharpness(source, packed, table, y, x, height, width, inside, factor)
        elif (code == _SHEAR_X) | (code == _SHEAR_Y):
            along, across = tl.where(horizontal, x, y), tl.where(horizontal, y, x)
            length, stride = tl.where(horizontal, width, height), tl.where(horizontal, 1, width)
            stride_across = tl.where(horizontal, width, 1)
            word = _shear(source, packed, table, along, across, length, stride, stride_across, inside, signed)
        else:
            if code == _ROTATE:
                j, i = _rotated(m, second, height, width, top, left, dy, dx)
            else:
                along = tl.where(horizontal, x, y)
                moved = along + offset + (along >= jump).to(tl.int32)
                j, i = tl.where(horizontal, y, moved), tl.where(horizontal, moved, x)
            word = _nearest(source, packed, table, j, i, height, width, inside)
        tl.store(target + at, word, mask=inside)
