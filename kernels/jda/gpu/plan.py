"""What the GPU is to do with a batch, as records that its kernels read: the host's half of `kernels.jda.gpu.pairs`.

`plan` turns the fired operations of all images into steps, as `kernels.jda._run` takes them for one: statistics of
the source, operations composed into its table, one operation that writes pixels. All of it is arithmetic on arrays
over the batch, about a millisecond for 256 images.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import triton.language as tl

from kernels.jda.ops import CODES, Program

WORDS = tl.constexpr(16)
"""64-bit words per record. 128 bytes: any slice of an array of records is aligned alike, and Triton compiles once."""

HISTOGRAM, LUMA = tl.constexpr(1), tl.constexpr(2)
"""Bits of what a step wants to know of its source."""


def _record(*names: str) -> np.dtype:
    unused = [f"unused_{i}" for i in range(WORDS.value - len(names))]
    return np.dtype([(name, "<i8") for name in (*names, *unused)])


# An address of a table is 0 for the identity. `packed`: the image is words, not bytes (`kernels.jda.gpu.pixels`).
_IMAGE = "source", "packed", "height", "width"

STEP = _record(
    *_IMAGE,
    "table_in",  # the table that `luma` and `ops` start from
    "wants",
    "histogram",  # address of i32 (3, 256), the source's own, or 0
    "luma",  # address of i64, the sum of L through `table_in`
    "ops",  # bit i: operation i of the program is composed into the table
    "signs",
    "table",  # the table after `ops`
    "op",  # the operation that writes pixels through `table`, or −1
    "target",  # address of the words it writes
    "offset",  # of a translation: pixel x comes from x + offset + (x ≥ jump)
    "jump",
)
"""One step of one image."""

CROP = _record(
    *_IMAGE,
    "table",
    "top",
    "left",
    "box_height",
    "box_width",
    "flip",
    "rows",  # address of the coefficients of the vertical pass
    "columns",  # and of the horizontal pass
    "target",  # address of the view, u8 (S, S, 3)
)
"""One view of one image."""


def field(record: np.dtype, name: str) -> tl.constexpr:
    """Where a kernel finds a field of a record, in words."""
    return tl.constexpr(list(record.names or ()).index(name))


_TRANSLATE = CODES["translate_x"], CODES["translate_y"]
_WRITING = {*_TRANSLATE, *(CODES[name] for name in ("color", "sharpness", "rotate", "shear_x", "shear_y"))}
_COUNTING = {CODES["equalize"], CODES["autocontrast"]}
# The published tables list some operations with a magnitude that changes nothing.
_IDLE_AT_0 = {CODES[name] for name in ("color", "contrast", "brightness", "sharpness", "shear_x", "shear_y")}


def program_words(program: Program) -> np.ndarray:
    """A program as i64 (ops, 16): code, bits of the two float64 parameters."""
    words = np.zeros((len(program.codes), WORDS.value), np.int64)
    words[:, 0] = program.codes
    words[:, 1:3] = program.params.view(np.int64)
    return words


def plan(program: Program, views: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The steps (K, B) of B images, still without addresses; who is done before the others has idle ones.

    `views` (B,) of `pipeline.views.drawing.VIEW`, `sizes` i64 (B, 2): height and width.
    """
    fired, signs = views["mask"].astype(np.int64), views["signs"].astype(np.int64)
    steps = np.zeros((len(program.codes) + 1, len(views)), STEP)
    steps["op"] = -1
    last = np.zeros(len(views), np.int64)  # the step that an image is at
    counted = np.zeros(len(views), bool)  # has its source a histogram?
    for i, (code, m) in enumerate(zip(program.codes.tolist(), program.params[:, 0].tolist(), strict=True)):
        if m == 0 and code in _IDLE_AT_0:
            continue
        images = np.flatnonzero(fired >> i & 1)
        if code == CODES["contrast"]:  # looks at pixels through a finished table
            last[images] += steps["ops"][last[images], images] != 0
        at = last[images], images
        if code in _WRITING:
            steps["op"][at] = i
            if code in _TRANSLATE:
                steps["offset"][at], steps["jump"][at] = _translations(
                    np.where(signs[images] >> i & 1, -m, m), sizes[images, int(code == CODES["translate_x"])]
                )
            last[images] += 1
            counted[images] = False
            continue
        steps["ops"][at] |= 1 << i
        if code == CODES["contrast"]:
            steps["wants"][at] |= LUMA.value
        elif code in _COUNTING:
            steps["wants"][at] |= np.where(counted[images], 0, HISTOGRAM.value)
            counted[images] = True
    steps = steps[: last.max(initial=0) + 1]
    steps["signs"] = signs
    steps["height"], steps["width"] = sizes.T
    return steps


def _translations(fractions: np.ndarray, sides: np.ndarray) -> np.ndarray:
    shifts = fractions * sides
    moves = [translation(shift, side) for shift, side in zip(shifts.tolist(), sides.tolist(), strict=True)]
    return np.array(moves, np.int64).reshape(-1, 2).T


@lru_cache(4096)
def translation(shift: float, side: int) -> tuple[int, int]:
    """(offset, jump) of a shift: pixel x of `side` comes from x + offset + (x ≥ jump).

    `kernels.jda.enhance.translate` adds 1 to shift + 0.5 again and again. Rounding can carry that over an integer, and
    only once, since no fraction is left to round after it.
    """
    at = np.floor(np.add.accumulate([shift + 0.5] + [1.0] * (side - 1))).astype(np.int64) - np.arange(side)
    return int(at[0]), int(np.argmax(at != at[0])) or side


def scratch_words(steps: np.ndarray) -> np.ndarray:
    """Words (B,) for what operations write: two places per image, in turn, or one where one suffices."""
    return np.minimum((steps["op"] >= 0).sum(0), 2) * (steps["height"] * steps["width"]).max(0, initial=0)


def parts(words: np.ndarray, limit: int) -> Iterator[slice]:
    """Cut a batch so that no part needs more words than `limit`, unless a single image does."""
    start, total = 0, 0
    for i, count in enumerate(words.tolist()):
        if i > start and total + count > limit:
            yield slice(start, i)
            start, total = i, 0
        total += count
    if len(words):
        yield slice(start, len(words))


def place_steps(
    steps: np.ndarray, addresses: np.ndarray, scratch: int, tables: int, histograms: int, sums: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fill in the addresses of steps (K, B), given those of the images (B,) and of the device's memory:

    i32 (Σ scratch_words,), u8 (K, B, 3, 256), i32 (K, B, 3, 256) and i64 (K, B). Returns what JDA ends with, (B,)
    each: address of the image, whether it is packed, address of the table to read it through.
    """
    words = scratch_words(steps)
    places = scratch + 4 * (np.cumsum(words) - words)
    image = np.arange(len(addresses))
    source, (packed, table, histogram) = addresses, np.zeros((3, len(addresses)), np.int64)
    turn = np.zeros(len(addresses), np.int64)
    for k, step in enumerate(steps):
        slot = k * len(addresses) + image
        step["source"], step["packed"], step["table_in"] = source, packed, table
        table = np.where(step["ops"] != 0, tables + 3 * 256 * slot, table)
        histogram = np.where(step["wants"] & HISTOGRAM.value, histograms + 4 * 3 * 256 * slot, histogram)
        step["table"], step["histogram"], step["luma"] = table, histogram, sums + 8 * slot
        step["target"] = places + 4 * turn * step["height"] * step["width"]
        writes = step["op"] >= 0
        source, packed = np.where(writes, step["target"], source), packed | writes
        table, turn = np.where(writes, 0, table), turn ^ writes
    return source, packed, table


def place_crops(
    addresses: np.ndarray, sizes: np.ndarray, views: np.ndarray, pad: int, size: int, both: bool, out: int
) -> np.ndarray:
    """The crops of the original and, if `both`, of the augmented view, (1 or 2, B): all read the decoded image still.

    `out` is the address of u8 (1 or 2, B, S, S, 3); the rest is as in `kernels.jda.gpu.pairs.pairs`.
    """
    count = 1 + both
    records = np.zeros((count, len(addresses)), CROP)
    records["source"] = addresses
    records["height"], records["width"] = sizes.T
    for name, edge in zip(("top", "left", "box_height", "box_width"), range(4), strict=True):
        records[name] = views["box"][:, :count, edge].T
    records["flip"] = views["flip"][:, :count].T
    if pad >= 0:
        records["top"] -= pad
        records["left"] -= pad
    records["target"] = out + 3 * size * size * np.arange(records.size).reshape(records.shape)
    return records
