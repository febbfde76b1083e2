"""JDA operations that change a pixel's value, and what the numba kernels share.

`source` and `out` are u8 (H, W, 3), `lut` u8 (3, 256) is a table that the source is read through, and `region` the
part of the output wanted, (top, left, bottom, right). Each function names the Pillow source it reproduces. No
fast-math: LLVM then contracts and reorders nothing, and float32 / float64 expressions give the bits of Pillow's C.
"""

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
from numba import njit
from numba.core import config

from kernels.jda.simd import LOOKED_UP, look_up

ONE, TWO = np.uint64(1), np.uint64(2)  # unsigned indices: numba lets a signed one count from the end


def _cache_folder() -> str | None:
    """Where compiled kernels are kept: below NUMBA_CACHE_DIR, else the user's cache, else the temporary folder.

    None if none of them can be written, as in a read-only container. Numba's cache knows a function's own file, not
    those of what it calls: there is a folder per state of all sources.
    """
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    state = hashlib.sha256(sources).hexdigest()[:16]
    for place in (_chosen, _temporary):
        try:
            folder = place(state)
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_uid == os.getuid():  # others' files in a shared folder would be run as code
                tempfile.TemporaryFile(dir=folder).close()
                return str(folder)
        except (OSError, RuntimeError):  # RuntimeError: a user without a home
            continue
    return None


def _chosen(state: str) -> Path:
    return Path(getattr(config, "CACHE_DIR") or _user_cache()) / "jda-distill" / state  # noqa: B009


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _temporary(state: str) -> Path:
    return Path(tempfile.gettempdir()) / f"jda-distill-{os.getuid()}-{state}"


_CACHE = _cache_folder()


def jit(function):
    """numba.njit without the GIL, compiled once per machine and state of this package, if it can be kept."""
    if _CACHE is None:
        return njit(nogil=True)(function)
    before = getattr(config, "CACHE_DIR")  # noqa: B009 - numba sets its options at run time
    try:
        setattr(config, "CACHE_DIR", _CACHE)  # noqa: B010
        return njit(nogil=True, cache=True)(function)
    finally:
        setattr(config, "CACHE_DIR", before)  # noqa: B010


@jit
def through(source, lut, region, out):
    """Copy `region` (top, left, bottom, right) through the table."""
    top, left, bottom, right = region
    lanes = 3 * source.shape[1]
    for y in range(top, bottom):
        through_row(source[y].reshape(lanes), lut, left, right, out[y].reshape(lanes))


@jit
def through_row(row, lut, left, right, out):
    """Copy the pixels [left, right) of a row, u8 (3·W,), through the table, to the same place."""
    at = 3 * left
    while 3 * right - at >= LOOKED_UP:
        look_up(row, at, lut, out)
        at += LOOKED_UP
    for x in range(at // 3, right):
        for c in range(3):
            out[3 * x + c] = lut[c, row[3 * x + c]]


@jit
def copy(source, count, out):
    """The first `count` values. Assigned as a slice, numba would compile the text of an error: seconds."""
    for i in range(count):
        out[i] = source[i]


@jit
def reset(lut):
    for c in range(3):
        for v in range(256):
            lut[c, v] = v


@jit
def identity():
    lut = np.empty((3, 256), np.uint8)
    reset(lut)
    return lut


@jit
def is_identity(lut):
    different = 0
    for v in range(256):
        different |= (lut[0, v] ^ v) | (lut[1, v] ^ v) | (lut[2, v] ^ v)
    return different == 0


@jit
def luma(r, g, b):
    """L of RGB, libImaging/Convert.c: L24."""
    weighted = np.int32(np.int32(r) * 19595) + np.int32(np.int32(g) * 38470) + np.int32(np.int32(b) * 7471)
    return np.int32(weighted + 0x8000) >> 16


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
def color(source, lut, factor, region, out):
    """PIL.ImageEnhance.Color: blend with L."""
    top, left, bottom, right = region
    lanes = 3 * source.shape[1]
    plain = is_identity(lut)
    line = np.empty(lanes, np.uint8)
    for y in range(top, bottom):
        row = source[y].reshape(lanes)
        if not plain:
            through_row(row, lut, left, right, line)
            row = line
        pixels, result = row[3 * left : 3 * right], out[y].reshape(lanes)[3 * left : 3 * right]
        for x in range(right - left):  # nothing but arithmetic, so that it vectorises
            r, g, b = pixels[3 * x], pixels[3 * x + 1], pixels[3 * x + 2]
            gray = luma(r, g, b)
            result[3 * x] = blend(gray, r, factor)
            result[3 * x + 1] = blend(gray, g, factor)
            result[3 * x + 2] = blend(gray, b, factor)


@jit
def sharpness(source, lut, factor, region, out):
    """PIL.ImageEnhance.Sharpness: blend with ImageFilter.SMOOTH, whose border copies the source.

    Pillow sums float32 products with 1/13 and 5/13 and rounds. The exact sum is a multiple of 1/13, never closer
    than 1/26 to a rounding boundary, so integer rounding gives the same byte.
    """
    height, width, _ = source.shape
    top, left, bottom, right = region
    lanes = 3 * width
    low, high = max(left - 1, 0), min(right + 1, width)
    lines = np.empty((3, lanes), np.uint8)  # the rows above, at and below y after the table, at their number mod 3
    sums = np.empty(lanes, np.int32)  # of the three; a pixel's neighbours in its row are three bytes off
    left_sums, centre_sums, right_sums = sums, sums[3:], sums[6:]
    first, stop = 3 * max(left, 1), 3 * min(right, width - 1)
    done = max(top - 1, 0)
    for y in range(top, bottom):
        while done < min(y + 2, height):
            through_row(source[done].reshape(lanes), lut, low, high, lines[done % 3])
            done += 1
        row, result = lines[y % 3], out[y].reshape(lanes)
        if y == 0 or y == height - 1 or first >= stop:
            copy(row[3 * left :], 3 * (right - left), result[3 * left :])
            continue
        # Slices, so that indices begin at 0 and numba need not ask whether they are negative.
        above, at, below = lines[(y - 1) % 3, first - 3 :], row[first - 3 :], lines[(y + 1) % 3, first - 3 :]
        for i in range(stop - first + 6):
            sums[i] = np.int32(above[i]) + np.int32(at[i]) + np.int32(below[i])
        centre, smoothed = row[first:], result[first:]
        for i in range(stop - first):
            v = np.int32(centre[i])
            total = np.int32(left_sums[i] + centre_sums[i] + right_sums[i] + 4 * v)
            # (2·total + 13) // 26, exact for all totals up to 13·255
            smooth = np.int32((2 * total + 13) * 10083) >> 18
            smoothed[i] = blend(smooth, v, factor)
        copy(row[3 * left :], first - 3 * left, result[3 * left :])
        copy(row[stop:], 3 * right - stop, result[stop:])
