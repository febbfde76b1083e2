"""The pixel path gives Pillow's bytes: every operation, every policy, gray and CMYK sources, any size."""

import io
from functools import cache

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from PIL import Image
from support.images import guarded, jpeg
from support.pillow import base, jda, operation

import kernels.jda
from kernels.jda import resample, simd
from kernels.jda.ops import TABLES, Op, compile_table
from pipeline.views.drawing import VIEW

# A table of everything, the dearest operations last, so that little but the crop wants their output.
EVERY = [("contrast", 0.4), ("equalize",), ("brightness", 0.3), ("autocontrast",), ("posterize", 5), ("rotate", 20.0)]
EVERY += [("sharpness", 0.8), ("shear_x", 0.2), ("translate_y", 0.3), ("color", 0.5), ("solarize", 100.0)]
EVERY += [("shear_y", 0.15), ("sharpness", 0.5), ("rotate", 45.0), ("translate_x", 0.2), ("shear_x", 0.3), ("invert",)]

SIZES = [(1, 1), (1, 7), (5, 1), (2, 2), (3, 3), (2, 9), (31, 17), (64, 64), (100, 75), (33, 200), (224, 224)]


def test_the_reference_is_pillow_13():
    """Pillow 13 changed the pass order of resize; another version is another reference."""
    assert PIL.__version__.startswith("13.")


def source(rng: np.random.Generator, number: int) -> np.ndarray:
    """Images of many kinds: noise, smooth, flat, few levels, decoded from gray and CMYK JPEG."""
    width, height = SIZES[number % len(SIZES)] if number % 3 else (int(rng.integers(1, 160)), int(rng.integers(1, 120)))
    if number % 250 == 0:
        width, height = 640, 480
    kind = number % 7
    if kind in (0, 1):
        mode = ("L", "CMYK")[kind]
        return np.array(Image.open(io.BytesIO(jpeg(rng, width, height, mode=mode))).convert("RGB"))
    if kind == 2:
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == 3:
        return np.full((height, width, 3), rng.integers(0, 256, 3), np.uint8)
    if kind == 4:
        return rng.integers(100, 104, (height, width, 3), dtype=np.uint8)
    return np.array(Image.open(io.BytesIO(jpeg(rng, width, height))))


@pytest.mark.parametrize("policy", TABLES)
def test_jda_equals_pillow(policy):
    """1,200 random (image, mask, signs) per policy, half with the policy's op rate, half with every second op."""
    rng = np.random.default_rng(list(policy.encode()))
    table = TABLES[policy]
    differing = 0
    for number in range(1200):
        image = source(rng, number)
        fires = rng.random(len(table)) < (0.2 if number % 2 else 0.5)
        mask, signs = int(fires @ (1 << np.arange(len(table)))), int(rng.integers(0, 1 << len(table)))
        expected = np.asarray(jda(Image.fromarray(image), table, mask, signs))
        differing += int((kernels.jda.apply(image, policy, mask, signs) != expected).sum())
    assert differing == 0


@cache
def single(name: str):
    magnitudes = sorted({op.magnitude for table in TABLES.values() for op in table if op.name == name})
    return [Op(name, magnitude) for magnitude in magnitudes]


@pytest.mark.parametrize("name", sorted({op.name for table in TABLES.values() for op in table}))
def test_each_operation_alone_equals_pillow(name):
    rng = np.random.default_rng(1)
    for number in range(40):
        image = source(rng, number)
        for op in single(name):
            for minus in (False, True):
                expected = np.asarray(operation(Image.fromarray(image), name, op.magnitude, minus))
                got = kernels.jda.apply(image, (op,), 1, int(minus))
                np.testing.assert_array_equal(got, expected, f"{op}, minus {minus}, {image.shape}")


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.booleans(), st.integers(0, 2**32 - 1))
def test_crop_and_resize_equal_pillow(width, height, size, flip, seed):
    """Both pass orders of Pillow 13, up- and downscaling, any box."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    h, w = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
    box = np.array([rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w], np.int32)
    out = np.empty((size, size, 3), np.uint8)
    lut = np.tile(np.arange(256, dtype=np.uint8), (3, 1))
    resample.crop(image, lut, box, flip, -1, np.empty(resample.scratch_bytes(height, width, size), np.uint8), out)
    np.testing.assert_array_equal(out, np.asarray(base(Image.fromarray(image), box, flip, size, -1)))


@pytest.mark.parametrize("look_up", [simd.look_up, simd._look_up_scalar], ids=["this processor's", "scalar"])
def test_looking_up_is_indexing(look_up):
    """64 pixels, at any place of a row; nothing else is touched."""
    rng = np.random.default_rng(0)
    lut = rng.integers(0, 256, (3, 256), dtype=np.uint8)
    row = rng.integers(0, 256, 3 * 200, dtype=np.uint8)
    for first in (0, 1, 77, 136):
        out, expected = np.zeros_like(row), np.zeros_like(row)
        njit(lambda row, at, lut, out: look_up(row, at, lut, out))(row, 3 * first, lut, out)
        pixels = slice(3 * first, 3 * first + simd.LOOKED_UP)
        expected[pixels] = lut[np.arange(3), row[pixels].reshape(-1, 3)].ravel()
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("policy", [*TABLES, "every"])
def test_pairs_equal_pillow(policy):
    """500 pairs per table, crops from one pixel to the whole image: only what a crop needs is computed, and rightly.

    Image and output lie against pages that may not be touched.
    """
    rng = np.random.default_rng(list(policy.encode()))
    table = TABLES[policy] if policy in TABLES else tuple(Op(*op) for op in EVERY)
    program, size, pad = compile_table(table), 16, 3
    differing = 0
    for number in range(500):
        image = guarded(source(rng, number), at_end=number % 3 > 0)
        height, width = image.shape[:2]
        view = np.zeros((), VIEW)
        view["mask"] = int((rng.random(len(table)) < 0.3) @ (1 << np.arange(len(table))))
        view["signs"], view["flip"] = rng.integers(0, 1 << len(table)), rng.integers(0, 2, 2)
        padded = number % 2 and min(height, width) + 2 * pad >= size
        margin = 2 * pad if padded else 0
        for box in view["box"]:
            box[2:] = (size, size) if padded else (rng.integers(1, height + 1), rng.integers(1, width + 1))
            box[:2] = rng.integers(0, height + margin - box[2] + 1), rng.integers(0, width + margin - box[3] + 1)
        out = guarded(np.zeros((2, 1, size, size, 3), np.uint8), at_end=number % 5 > 0)
        kernels.jda.pair(image, program, view[()], pad if padded else -1, out, 0)
        augmented = jda(Image.fromarray(image), table, int(view["mask"]), int(view["signs"]))
        for v, seen in enumerate((Image.fromarray(image), augmented)):
            crop = base(seen, view["box"][v], bool(view["flip"][v]), size, pad if padded else -1)
            differing += int((out[v, 0] != np.asarray(crop)).sum())
    assert differing == 0


def test_the_input_is_left_alone():
    image = np.random.default_rng(0).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    before = image.copy()
    kernels.jda.apply(image, "imagenet", (1 << 25) - 1, 0)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)],
)
def test_a_wrong_image_is_refused(image):
    with pytest.raises(ValueError, match=r"image: expected uint8 \(H, W, 3\), got"):
        kernels.jda.apply(image, "imagenet", 0, 0)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ((Op("twist", 1),), "expected one of invert"),
        ((Op("rotate", 90),), r"magnitude of rotate in \[0, 45\], got 90"),
        ((Op("posterize", 2.5),), "whole number of bits"),
        ((), "expected 1 to 32 operations, got 0"),
        ((Op("invert"),) * 33, "got 33"),
    ],
)
def test_a_wrong_table_is_refused(table, message):
    with pytest.raises(ValueError, match=message):
        compile_table(table)
    with pytest.raises(ValueError, match=r"expected one of imagenet|expected one of cifar10"):
        kernels.jda.apply(np.zeros((1, 1, 3), np.uint8), "imagnet", 0, 0)
