"""The pixel path of a view: JDA, then crop, resize and flip, byte for byte what Pillow 13 computes.

Operations that map one value to another (posterize, solarize, invert, autocontrast, equalize, contrast, brightness)
never touch a pixel: they compose into one table per channel, `lut` (3, 256). A histogram wanted in between is that of
the last materialised image, pushed through the table. Only rotate, shear, translate, color and sharpness write
pixels, and each reads its source through the table. The last table is applied while the crop reads. Only pixels
that the crop, or a histogram on the way to it, depends on are ever computed.

Each function names the Pillow source it reproduces. No fast-math: LLVM then contracts and reorders nothing, and
float32 / float64 expressions give the bits of Pillow's C.
"""

import threading
from functools import cache

import numpy as np

from kernels.jda import enhance as pixels
from kernels.jda import geometry, resample
from kernels.jda.ops import CODES, TABLES, Op, Program, compile_table

_INVERT = CODES["invert"]
_POSTERIZE = CODES["posterize"]
_SOLARIZE = CODES["solarize"]
_AUTOCONTRAST = CODES["autocontrast"]
_EQUALIZE = CODES["equalize"]
_COLOR = CODES["color"]
_CONTRAST = CODES["contrast"]
_BRIGHTNESS = CODES["brightness"]
_SHARPNESS = CODES["sharpness"]
_ROTATE = CODES["rotate"]
_SHEAR_X = CODES["shear_x"]
_SHEAR_Y = CODES["shear_y"]
_TRANSLATE_X = CODES["translate_x"]
_TRANSLATE_Y = CODES["translate_y"]


def apply(image: np.ndarray, policy: str | tuple[Op, ...], mask: int, signs: int) -> np.ndarray:
    """JDA on one image: u8 (H, W, 3) -> u8 (H, W, 3), a new array.

    `policy` is a published name ("imagenet", "cifar10", "cifar100") or an op table. Bit i of `mask` says that
    operation i fires; bit i of `signs` that its sign is minus. Raises ValueError for a bad image or policy.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"image: expected uint8 (H, W, 3), got {image.dtype} {image.shape}")
    if isinstance(policy, str) and policy not in TABLES:
        raise ValueError(f"policy: expected one of {', '.join(TABLES)} or an op table, got {policy!r}")
    program = program_of(TABLES[policy] if isinstance(policy, str) else tuple(policy))
    image = np.require(image, requirements=["C", "W"])
    scratch = _scratch(image.size)
    out = np.empty_like(image)
    _apply(image, program.codes, program.params, mask, signs, scratch, out)
    return out


@cache
def program_of(table: tuple[Op, ...]) -> Program:
    """`compile_table`, once per table."""
    return compile_table(table)


def pair(image: np.ndarray, program: Program, view: np.void, pad: int, out: np.ndarray, position: int) -> None:
    """The views of one decoded image, written to `out[:, position]`: original, then augmented.

    `image` u8 (H, W, 3), C-contiguous. `out` u8 (2, B, S, S, 3), or (1, B, S, S, 3) for the original alone. `view`
    is one record of `pipeline.views.drawing.draw`: boxes `(top, left, height, width)` i32 (2, 4), flips (2,), op mask
    and signs. An original view whose box has no height is not made. `pad` ≥ 0 crops without resizing from an image
    padded black by `pad`; `pad` < 0 resizes the box to S (bilinear, antialiased, as torchvision on Pillow images).
    Releases the GIL; safe to call from many threads.
    """
    scratch = _scratch(resample.scratch_bytes(image.shape[0], image.shape[1], out.shape[2]))
    _pair(
        image,
        program.codes,
        program.params,
        view["mask"],
        view["signs"],
        view["box"],
        view["flip"],
        pad,
        scratch,
        out,
        position,
    )


_local = threading.local()


def _scratch(pixels: int) -> np.ndarray:
    """u8 (2, ≥ pixels), one per thread and grown on demand: fresh memory would cost a page fault per 4 KiB."""
    buffer = getattr(_local, "buffer", None)
    if buffer is None or buffer.shape[1] < pixels:
        buffer = _local.buffer = np.empty((2, pixels), np.uint8)
    return buffer


@pixels.jit
def _apply(image, codes, params, mask, signs, scratch, out):
    lut = np.empty((3, 256), np.uint8)
    whole = (0, 0, image.shape[0], image.shape[1])
    result = _run(image, codes, params, mask, signs, whole, scratch, lut)
    pixels.through(result, lut, whole, out)


@pixels.jit
def _pair(image, codes, params, mask, signs, boxes, flips, pad, scratch, out, position):
    lut = pixels.identity()
    if boxes[0, 2] > 0:
        resample.crop(image, lut, boxes[0], flips[0], pad, scratch[0], out[0, position])
    if out.shape[0] == 1:
        return
    height, width, _ = image.shape
    top, left = boxes[1, 0] - max(pad, 0), boxes[1, 1] - max(pad, 0)
    wanted = (max(top, 0), max(left, 0), min(top + boxes[1, 2], height), min(left + boxes[1, 3], width))
    source = _run(image, codes, params, mask, signs, wanted, scratch, lut)
    # The result of JDA may live in either half of the scratch; the resize gets the other one.
    free = scratch[1] if source.ctypes.data == scratch[0].ctypes.data else scratch[0]
    resample.crop(source, lut, boxes[1], flips[1], pad, free, out[1, position])


@pixels.jit
def _run(image, codes, params, mask, signs, wanted, scratch, lut):
    """Run the fired operations; returns the image to be read through `lut`: `image` itself or a half of `scratch`.

    Of the result only the region `wanted` is valid.
    """
    height, width, _ = image.shape
    first = scratch[0, : image.size].reshape(image.shape)
    second = scratch[1, : image.size].reshape(image.shape)
    source, target = image, first
    histogram = np.empty((3, 256), np.int64)
    fresh = False  # is `histogram` that of `source`?
    regions = _regions(codes, params, mask, signs, wanted, height, width)
    pixels.reset(lut)
    for i in range(len(codes)):
        if not (mask >> i) & 1:
            continue
        code = codes[i]
        m = params[i, 0]
        signed = -m if (signs >> i) & 1 else m
        region = (regions[i, 0], regions[i, 1], regions[i, 2], regions[i, 3])
        if code in (_INVERT, _POSTERIZE, _SOLARIZE):
            for c in range(3):
                for v in range(256):
                    lut[c, v] = _pointwise(code, m, lut[c, v])
        elif code in (_AUTOCONTRAST, _EQUALIZE):
            if not fresh:
                _histogram(source, histogram)
                fresh = True
            for c in range(3):
                if code == _EQUALIZE:
                    _equalize(histogram[c], lut[c])
                else:
                    _autocontrast(histogram[c], lut[c])
        elif code in (_BRIGHTNESS, _CONTRAST):
            gray = _mean_gray(source, lut) if code == _CONTRAST else 0
            for c in range(3):
                for v in range(256):
                    lut[c, v] = pixels.blend(gray, lut[c, v], np.float32(1.0 + signed))
        elif code == _COLOR and m == 0.0:
            continue  # factor 1 copies
        else:
            if code == _COLOR:
                pixels.color(source, lut, np.float32(1.0 + signed), region, target)
            elif code == _SHARPNESS:
                pixels.sharpness(source, lut, np.float32(1.0 + signed), region, target)
            elif code == _ROTATE:
                geometry.rotate(source, lut, m, params[i, 1], region, target)
            elif code == _SHEAR_X:
                geometry.shear_x(source, lut, signed, region, target)
            elif code == _SHEAR_Y:
                geometry.shear_y(source, lut, signed, region, target)
            elif code == _TRANSLATE_X:
                geometry.translate(source, lut, signed * width, 0.0, region, target)
            else:
                geometry.translate(source, lut, 0.0, signed * height, region, target)
            source, target = target, second if target is first else first
            pixels.reset(lut)
            fresh = False
    return source


@pixels.jit
def _regions(codes, params, mask, signs, wanted, height, width):
    """What each operation must produce so that `wanted` of the last one is right: i64 (ops, 4), as `wanted`.

    Worked out backwards. An operation that looks at the whole image (histogram, mean) wants all of it.
    """
    regions = np.empty((len(codes), 4), np.int64)
    region = wanted
    for i in range(len(codes) - 1, -1, -1):
        regions[i, 0], regions[i, 1], regions[i, 2], regions[i, 3] = region
        if not (mask >> i) & 1:
            continue
        code, m = codes[i], params[i, 0]
        signed = -m if (signs >> i) & 1 else m
        if code in (_AUTOCONTRAST, _EQUALIZE, _CONTRAST):
            region = (0, 0, height, width)
        elif code == _SHARPNESS:
            region = _grown(region, height, width)
        elif code == _ROTATE:
            cos, sin = m, params[i, 1]
            x, y = geometry.rotation_offset(cos, sin, height, width)
            region = geometry.reach(region, cos, sin, x, -sin, cos, y, height, width)
        elif code == _SHEAR_X:
            region = geometry.reach(region, 1.0, signed, 0.0, 0.0, 1.0, 0.0, height, width)
        elif code == _SHEAR_Y:
            region = geometry.reach(region, 1.0, 0.0, 0.0, signed, 1.0, 0.0, height, width)
        elif code == _TRANSLATE_X:
            region = geometry.reach(region, 1.0, 0.0, signed * width, 0.0, 1.0, 0.0, height, width)
        elif code == _TRANSLATE_Y:
            region = geometry.reach(region, 1.0, 0.0, 0.0, 0.0, 1.0, signed * height, height, width)
    return regions


@pixels.jit
def _grown(region, height, width):
    """With the neighbours of its pixels."""
    top, left, bottom, right = region
    return max(top - 1, 0), max(left - 1, 0), min(bottom + 1, height), min(right + 1, width)


@pixels.jit
def _pointwise(code, m, v):
    """PIL.ImageOps.invert, posterize, solarize."""
    if code == _POSTERIZE:
        return v & ~((1 << (8 - int(m))) - 1) & 255
    if code == _SOLARIZE and v < m:
        return v
    return 255 - v


@pixels.jit
def _histogram(source, histogram):
    """Of each channel, i64 (3, 256)."""
    # A table for each of four pixels' bytes: counts in one and the same place wait for each other, and neighbours are
    # alike. Unsigned indices, as in `pixels`.
    tables = np.zeros((12, 256), np.uint32)
    values = source.reshape(source.size)
    whole = np.uint64(source.size // 12)
    for k in range(whole):
        for i in range(12):
            tables[i, values[np.uint64(12) * k + np.uint64(i)]] += np.uint32(1)
    for i in range(source.size % 12):
        tables[i, values[12 * (source.size // 12) + i]] += np.uint32(1)
    for c in range(3):
        for v in range(256):
            histogram[c, v] = np.int64(tables[c, v]) + tables[c + 3, v] + tables[c + 6, v] + tables[c + 9, v]


@pixels.jit
def _push(histogram, lut):
    """The histogram (256,) of the image after the table."""
    pushed = np.zeros(256, np.int64)
    for v in range(256):
        pushed[lut[v]] += histogram[v]
    return pushed


@pixels.jit
def _equalize(histogram, lut):
    """PIL.ImageOps.equalize, one channel."""
    pushed = _push(histogram, lut)
    last = 255
    while pushed[last] == 0:
        last -= 1
    step = (pushed.sum() - pushed[last]) // 255
    if step == 0:  # also true of a single value
        return
    table = np.empty(256, np.uint8)
    n = step // 2
    for v in range(256):
        table[v] = min(n // step, 255)
        n += pushed[v]
    for v in range(256):
        lut[v] = table[lut[v]]


@pixels.jit
def _autocontrast(histogram, lut):
    """PIL.ImageOps.autocontrast without cutoff, one channel."""
    pushed = _push(histogram, lut)
    low, high = 0, 255
    while pushed[low] == 0:
        low += 1
    while pushed[high] == 0:
        high -= 1
    if high <= low:
        return
    scale = 255.0 / (high - low)
    offset = -low * scale
    for v in range(256):
        lut[v] = min(max(int(lut[v] * scale + offset), 0), 255)


@pixels.jit
def _mean_gray(source, lut):
    """The gray that PIL.ImageEnhance.Contrast blends with: the rounded mean of L."""
    total = 0
    for y in range(source.shape[0]):
        for x in range(source.shape[1]):
            total += pixels.luma(lut[0, source[y, x, 0]], lut[1, source[y, x, 1]], lut[2, source[y, x, 2]])
    return int(total / (source.shape[0] * source.shape[1]) + 0.5)
