"""The pixel path of the GPU gives the bytes of the CPU's and of Pillow: in Triton's interpreter and on a GPU.

The interpreter is chosen when a kernel is decorated, so it runs in processes of its own. What a GPU would execute is
compiled here without one, and looked at.
"""

import multiprocessing
import os
import re
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.images import guarded, pixels
from support.interpreter import hasten
from support.pillow import base, jda

import kernels.jda
from kernels.jda.gpu import pairs as jda_gpu
from kernels.jda.gpu import plan
from kernels.jda.ops import BOUNDS, CODES, TABLES, Op, compile_table

VIEW = np.dtype(
    [("box", "<i4", (2, 4)), ("flip", "u1", 2), ("mask", "<u4"), ("signs", "<u4")]
)  # pipeline.views.drawing.VIEW
SIZES = [(1, 1), (1, 7), (5, 1), (2, 2), (3, 3), (2, 9), (17, 33)]


def pairs(device: str, images: list, table, views, pad: int, size: int, both=True, **settings) -> np.ndarray:
    """`kernels.jda.gpu.pairs.pairs` of numpy images, which it must leave alone; `settings` are its constants."""
    tensors = [
        torch.from_numpy(guarded(image, bool(i % 2))) if device == "cpu" else torch.from_numpy(image).to(device)
        for i, image in enumerate(images)
    ]
    if device == "cpu":
        hasten()
    addresses = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
    sizes = np.array([image.shape[:2] for image in images]).reshape(-1, 2)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for name, value in settings.items():
            patch.setattr(jda_gpu, name, value)
        out = jda_gpu.pairs(addresses, sizes, compile_table(tuple(table)), views, pad, size, both, device).cpu()
    assert all((tensor.cpu().numpy() == image).all() for tensor, image in zip(tensors, images, strict=True))
    return out.numpy()


class Machine(NamedTuple):
    pairs: Callable[..., np.ndarray]
    images: int  # of a batch
    side: int  # of an image, at most
    large: tuple[int, int]  # height and width of one that several programs share


@pytest.fixture(scope="module")
def interpreter():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(os.getpid).result()  # the process exists from here on
        yield lambda *arguments, **options: pool.submit(pairs, "cpu", *arguments, **options).result()


@pytest.fixture(scope="module", params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def machine(request) -> Machine:
    if request.param == "interpreter":
        return Machine(request.getfixturevalue("interpreter"), 4, 20, (41, 37))
    return Machine(partial(pairs, "cuda"), 64, 700, (2999, 4001))


def picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise, smooth, gray, flat, few levels."""
    kind = rng.integers(5)
    if kind == 0:
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == 1:
        return np.array(pixels(rng, width, height))
    if kind == 2:
        return np.array(pixels(rng, width, height, "L").convert("RGB"))
    if kind == 3:
        return np.full((height, width, 3), rng.integers(0, 256, 3), np.uint8)
    return rng.integers(126, 130, (height, width, 3), dtype=np.uint8)


def pictures(rng: np.random.Generator, machine: Machine, count: int) -> list[np.ndarray]:
    """Every third of a size where borders matter."""
    return [
        picture(rng, *map(int, SIZES[i // 3 % len(SIZES)] if i % 3 == 0 else rng.integers(1, machine.side, 2)))
        for i in range(count)
    ]


def boxes_inside(rng: np.random.Generator, images: list[np.ndarray]) -> np.ndarray:
    """Any box inside each image, for two views: (B, 2, 4)."""
    sides = np.repeat([image.shape[:2] for image in images], 2, axis=0).reshape(-1, 2, 2)
    extent = rng.integers(1, sides + 1)
    return np.concatenate([rng.integers(0, sides - extent + 1), extent], axis=2)


def boxes_over(rng: np.random.Generator, images: list[np.ndarray], pad: int, size: int) -> np.ndarray:
    """A box of an output's size anywhere over each padded image, the same for both views: (B, 2, 4)."""
    sides = np.array([image.shape[:2] for image in images])
    corner = rng.integers(0, np.maximum(sides + 2 * pad - size, 0) + 1)
    return np.repeat(np.concatenate([corner, np.full_like(corner, size)], axis=1)[:, None], 2, axis=1)


def views_of(masks, signs, boxes, flips=0) -> np.ndarray:
    views = np.zeros(len(boxes), VIEW)
    views["mask"], views["signs"], views["box"], views["flip"] = masks, signs, boxes, flips
    return views


def random_bits(rng: np.random.Generator, count: int, rates: np.ndarray) -> np.ndarray:
    """Words whose bits are set at a rate: (len(rates),)."""
    return (rng.random((len(rates), count)) < rates[:, None]) @ (1 << np.arange(count))


def on_the_cpu(images, table, views, pad: int, size: int) -> np.ndarray:
    out = np.empty((2, len(images), size, size, 3), np.uint8)
    for i, image in enumerate(images):
        kernels.jda.pair(image, compile_table(tuple(table)), views[i], pad, out, i)
    return out


def by_pillow(images, table, views, pad: int, size: int) -> np.ndarray:
    out = np.empty((2, len(images), size, size, 3), np.uint8)
    for i, (image, view) in enumerate(zip(map(Image.fromarray, images), views, strict=True)):
        both = image, jda(image, table, int(view["mask"]), int(view["signs"]))
        out[:, i] = [base(*arguments, size, pad) for arguments in zip(both, view["box"], view["flip"], strict=True)]
    return out


def assert_same_bytes(machine: Machine, images: list[np.ndarray], table, views: np.ndarray, pad: int, size: int):
    """As the CPU's kernel and as Pillow."""
    got = machine.pairs(images, table, views, pad, size)
    for reference in (on_the_cpu, by_pillow):
        wrong = np.argwhere((got != reference(images, table, views, pad, size)).any(axis=(2, 3, 4)))
        shown = [f"view {view} of {images[i].shape}, {views[i]}" for view, i in wrong[:3]]
        assert not len(wrong), f"not {reference.__name__}: {len(wrong)} views, {shown}"


@pytest.mark.parametrize("name", CODES)
def test_each_operation_gives_the_bytes_of_the_cpu_and_of_pillow(machine, name):
    """Every magnitude of a table and of the bounds, both signs, without a resize that might hide a level."""
    rng = np.random.default_rng(CODES[name])
    magnitudes = {op.magnitude for table in TABLES.values() for op in table if op.name == name}
    magnitudes |= set(BOUNDS.get(name, (0,))) | ({128} if name == "solarize" else set())
    magnitudes -= {0} if name == "posterize" else set()  # Pillow has none
    table = [Op(name, magnitude) for magnitude in sorted(magnitudes)]
    ops, signs = np.divmod(np.arange(2 * len(table)), 2)
    ops, signs = np.tile(ops, machine.images // 4), np.tile(signs, machine.images // 4)
    images = pictures(rng, machine, len(ops))
    pad, size = 3, machine.side * 3 // 5
    views = views_of(1 << ops, signs << ops, boxes_over(rng, images, pad, size))
    assert_same_bytes(machine, images, table, views, pad, size)


def test_fixed_point_rounds_down_below_zero(machine):
    """Truncated, a row of 32 pixels would be another one at 45 degrees, one or two pixels at the other angles."""
    table = [Op("rotate", 45.0), Op("rotate", 5.0), Op("rotate", 2.0)]
    images = list(np.random.default_rng(3).integers(0, 256, (3, 64, 32, 3), dtype=np.uint8))
    views = views_of([1, 2, 4], 0, [[(0, 0, 64, 64)] * 2] * 3)
    assert_same_bytes(machine, images, table, views, 0, 64)


def test_a_translation_skips_a_pixel_where_its_rounding_error_grows_to_one(machine):
    """0.58 · 25 is 14.499999999999998: adding 0.5 and ones gives 14.999999999999998, 15.999999999999998, 17."""
    table = [Op("translate_x", 0.58), Op("translate_y", 0.58), Op("translate_x", 0.14), Op("translate_y", 0.14)]
    images = list(np.random.default_rng(2).integers(0, 256, (4, 25, 25, 3), dtype=np.uint8))
    views = views_of([1, 2, 4, 8], 12, [[(0, 0, 25, 25)] * 2] * 4)
    assert_same_bytes(machine, images, table, views, 0, 25)


@pytest.mark.parametrize(
    "policy", ["imagenet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cifar10", "cifar100"))]
)
def test_chains_give_the_bytes_of_the_cpu_and_of_pillow(machine, policy):
    """From no operation to all of them, in one batch; resized and flipped."""
    rng = np.random.default_rng(list(policy.encode()))
    table, images = TABLES[policy], pictures(rng, machine, machine.images)
    rates = np.resize([0, 0.2, 0.5, 1.0], len(images))
    masks, signs = random_bits(rng, len(table), rates), random_bits(rng, len(table), np.full(len(images), 0.5))
    views = views_of(masks, signs, boxes_inside(rng, images), rng.integers(0, 2, (len(images), 2)))
    assert_same_bytes(machine, images, table, views, -1, machine.side // 3)


@settings(max_examples=2, deadline=None)
@given(st.lists(st.sampled_from(list(CODES)), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
@example(["equalize", "contrast", "equalize", "contrast", "autocontrast", "color", "contrast", "equalize"], 1)
@example(["brightness", "contrast", "contrast", "solarize", "equalize", "posterize", "equalize"], 2)
def test_any_table_gives_the_bytes_of_the_cpu_and_of_pillow(machine, names, seed):
    """Statistics are of what the table has made of the source, whatever came before."""
    rng = np.random.default_rng(seed)
    ranges = [(1, 8) if name == "posterize" else BOUNDS.get(name, (0, 0)) for name in names]
    # An enhancement by up to the factor of 11 that is allowed would leave black and white.
    magnitudes = [
        rng.integers(1, 9) if low == 1 else rng.uniform(low, 1 if high == 10 else high) for low, high in ranges
    ]
    table = [Op(name, float(magnitude)) for name, magnitude in zip(names, magnitudes, strict=True)]
    images = pictures(rng, machine, 3)
    masks, signs = random_bits(rng, len(table), np.array([1, 1, 0.7])), random_bits(rng, len(table), np.full(3, 0.5))
    views = views_of(masks, signs, boxes_over(rng, images, 2, 16), rng.integers(0, 2, (3, 2)))
    assert_same_bytes(machine, images, table, views, 2, 16)


@settings(max_examples=3, deadline=None)
@given(st.sampled_from([5, 8, 16]), st.integers(0, 2**32 - 1))
def test_resize_gives_the_bytes_of_the_cpu_and_of_pillow(machine, size, seed):
    """Up- and downscaling, words and bytes as the source, through a table and not, in both orders of the passes."""
    rng = np.random.default_rng(seed)
    images = pictures(rng, machine, 4)
    boxes = boxes_inside(rng, images)
    views = views_of([0, 1, 2, 3], 0, boxes, rng.integers(0, 2, (4, 2)))
    assert_same_bytes(machine, images, [Op("color", 0.4), Op("invert")], views, -1, size)


def test_resize_passes_vertically_first_where_pillow_does(machine):
    """Around the condition h > S and h − S > 2 (w − S), w ≠ S; and at scales of far more than a tile."""
    size = 8
    sides = [(h, w) for w in (8, 9) for h in (9, 10, 16, 17)] + [(8, 12), (2, 99), (99, 2)]
    images = [picture(np.random.default_rng(h), h, w) for h, w in sides]
    views = views_of(0, 0, [[(0, 0, h, w)] * 2 for h, w in sides])
    assert_same_bytes(machine, images, [Op("invert")], views, -1, size)


@pytest.mark.parametrize("programs", [1, 7])
def test_any_number_of_programs_shares_an_image(machine, programs):
    """The last contrast and equalize want their statistics, one through brightness's table and one not, in one step."""
    rng = np.random.default_rng(4)
    table = [Op("equalize"), Op("contrast", 0.6), Op("rotate", 20.0)]
    table += [Op("brightness", 0.5), Op("contrast", 0.2), Op("equalize")]
    images = [picture(rng, *machine.large), picture(rng, 9, 9)]
    views = views_of(63, 8, boxes_over(rng, images, 0, 9))
    got = machine.pairs(images, table, views, 0, 9, _PROGRAMS=2 * programs)
    np.testing.assert_array_equal(got, on_the_cpu(images, table, views, 0, 9))


def test_a_batch_may_have_any_size_and_one_view(machine):
    rng = np.random.default_rng(5)
    images = pictures(rng, machine, 3)
    views = views_of(7, 0, boxes_inside(rng, images))
    table = TABLES["imagenet"]
    both = machine.pairs(images, table, views, -1, 9)
    alone = machine.pairs(images, table, views, -1, 9, both=False)
    augmented = views.copy()
    augmented["box"][:, 0] = 0  # a partner has no original view
    np.testing.assert_array_equal(machine.pairs(images, table, augmented, -1, 9)[1], both[1])
    np.testing.assert_array_equal(alone, both[:1])
    assert machine.pairs([], table, views[:0], -1, 9).shape == (2, 0, 9, 9, 3)
    assert machine.pairs([], table, views[:0], 0, 9, both=False).shape == (1, 0, 9, 9, 3)


def test_a_batch_is_cut_to_fit_its_scratch_memory(machine):
    rng = np.random.default_rng(6)
    table = [Op("color", 0.4), Op("rotate", 20.0), Op("translate_x", 0.2)]
    images = [picture(rng, 10, 10 + i) for i in range(5)]
    views = views_of([7, 0, 1, 7, 7], 0, boxes_over(rng, images, 0, 10))
    room = 4 * 320  # the first three images fit in together
    np.testing.assert_array_equal(
        machine.pairs(images, table, views, 0, 10, MAX_SCRATCH_BYTES=room), machine.pairs(images, table, views, 0, 10)
    )
    steps = plan.plan(compile_table(tuple(table)), views, np.array([image.shape[:2] for image in images]))
    words = plan.scratch_words(steps)
    assert words.tolist() == [200, 0, 120, 260, 280]
    assert list(plan.parts(words, 319)) == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5)]
    assert list(plan.parts(words, 320)) == [slice(0, 3), slice(3, 4), slice(4, 5)]


def test_launches_grow_with_the_longest_chain_and_not_with_the_batch():
    program = compile_table(TABLES["imagenet"])
    rotate_color_and_sharpness = 1 << 8 | 1 << 14 | 1 << 17
    for images in (1, 1000):
        views = views_of(rotate_color_and_sharpness, 0, np.zeros((images, 2, 4)))
        views["mask"][1:] = 0
        steps = plan.plan(program, views, np.full((images, 2), 9))
        assert steps.shape == (4, images)
        assert (steps["op"] >= 0).sum() == 3


def test_a_source_is_counted_once():
    program = compile_table((Op("equalize"), Op("contrast", 0.3), Op("autocontrast"), Op("invert"), Op("equalize")))
    steps = plan.plan(program, views_of(31, 0, np.zeros((1, 2, 4))), np.full((1, 2), 9))
    assert steps["wants"].ravel().tolist() == [plan.HISTOGRAM.value, plan.LUMA.value]


@settings(max_examples=300)
@given(st.floats(-60, 60) | st.integers(-500, 500).map(lambda tenths: tenths * 0.1), st.integers(1, 50))
@example(0.58 * 25, 25)
@example(-0.14 * 25, 25)
def test_a_translation_is_what_adding_one_again_and_again_gives(shift, side):
    """As the loop of kernels.jda.enhance.translate, outside the image everywhere or nowhere."""
    offset, jump = plan.translation(shift, side)
    at = shift + 0.5
    for x in range(side):
        moved = x + offset + (x >= jump)
        assert moved < 0 if at < 0.0 else moved == int(at)
        at += 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": np.ones((2, 3))}, r"expected shapes \(B,\), \(B, 2\), \(B,\), got \(2,\), \(2, 3\), \(2,\)"),
        ({"views": np.zeros(3, VIEW)}, r"got \(2,\), \(2, 2\), \(3,\)"),
        ({"addresses": np.zeros((2, 1))}, r"got \(2, 1\)"),
        ({"sizes": np.array([[1, 1], [0, 5]])}, "sizes: expected 1 to 536870912 pixels per image, got sides of 0 to 5"),
        ({"sizes": np.array([[1, 1], [65536, 65536]])}, "got sides of 1 to 65536"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes, message):
    arguments = {"addresses": np.zeros(2), "sizes": np.ones((2, 2)), "views": np.zeros(2, VIEW)} | changes
    with pytest.raises(ValueError, match=message):
        jda_gpu.pairs(**arguments, program=compile_table(TABLES["imagenet"]), pad=-1, size=8, device="cpu")


KERNELS = {
    "statistics": jda_gpu.STATISTICS,
    "compose": {"OPS": 25},
    "pixels": jda_gpu.PIXELS,
    "coefficients": {"SIZE": 224} | jda_gpu.COEFFICIENTS,
    "resize": {"SIZE": 224} | jda_gpu.VIEW,
    "shift": {"SIZE": 32} | jda_gpu.VIEW,
}


@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles_without_a_gpu_to_registers_and_no_contraction(
    name, arch, tmp_path, monkeypatch, capfd, record_property
):
    """128 registers leave room for 16 warps per multiprocessor; Triton 3.6 and 3.9 need 26 to 128 of them."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DUMP_PTXAS_LOG", "1")
    kernel, constants = getattr(jda_gpu, f"{name}_kernel"), KERNELS[name]
    signature = {argument: "constexpr" if argument in constants else "*i64" for argument in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind != "constexpr"}
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = compile(source, target=GPUTarget("cuda", arch, 32), options=jda_gpu.OPTIONS)
    log = capfd.readouterr().out
    registers, spilled = (int(re.search(text, log)[1]) for text in (r"Used (\d+) registers", r"(\d+) bytes spill st"))
    record_property("registers", registers)
    assert spilled == 0 and registers <= 128
    ptx = compiled.asm["ptx"]
    assert f".target sm_{arch}" in ptx and not re.search(r"\bfma\.", ptx)
    assert not compiled.metadata.enable_fp_fusion  # nor may ptxas contract
    if name not in ("compose", "coefficients"):  # they divide float64, which is made of multiply-adds
        assert not re.search(r"\b[FD]FMA\b", compiled.asm["sass"])


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    rng = np.random.default_rng(7)
    image = torch.from_numpy(picture(rng, 50, 60)).cuda()
    program = compile_table(TABLES["imagenet"])
    views = views_of(np.array([(1 << 25) - 1]), 0, [[(0, 0, 50, 60)] * 2])
    for mode in ("default", "error"):  # the first call compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            jda_gpu.pairs(np.array([image.data_ptr()]), np.array([[50, 60]]), program, views, -1, 16)
        finally:
            torch.cuda.set_sync_debug_mode("default")
