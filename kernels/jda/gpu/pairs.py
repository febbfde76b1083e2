"""The pixel path of a view on the GPU: the twin of `kernels.jda`, byte for byte.

A batch is worked on in steps (`kernels.jda.gpu.plan`); step k of all images is three launches at most, and the crops
are two more: their number grows with the longest chain of a batch, not with its size. One copy from pinned memory
brings all arguments; the host never waits for the device.

What 256 images of 500 × 375 with policy `imagenet` move, in MB, on average: statistics read 174; operations on pixels
read 306 and write 348; coefficients 12; crops read 143 and write 77. Sum 1.06 GB, at the least 0.32 ms of an H100's
3.35 TB/s. Histograms are bound by votes within warps instead, which should add about as much again.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.jda.gpu import plan
from kernels.jda.gpu.pixels import pixels_kernel
from kernels.jda.gpu.resample import coefficient_words, coefficients_kernel, resize_kernel, shift_kernel
from kernels.jda.gpu.tables import compose_kernel, statistics_kernel
from kernels.jda.ops import Program

MAX_PIXELS = 1 << 29
"""Of one image: offsets in bytes are 32-bit."""

MAX_SCRATCH_BYTES = 2 << 30
"""For what operations write; a batch that wants more is worked on in parts."""

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""Of every launch. A contracted multiply-add would round, and so change, other bytes than the CPU's."""

# Constants of the kernels: what a program works on at a time. More pixels would cost registers, and so warps.
STATISTICS = {"TILE": 2048}
PIXELS = {"ROWS": 8, "COLUMNS": 32}
VIEW = {"ROWS": 8, "COLUMNS": 32}  # divides 224
COEFFICIENTS = {"BLOCK": 256}

_PROGRAMS = 8192  # share the tiles of all images; several times what an H100 holds, so that they even out
_BLOCK_WORDS = 1 << 24


def pairs(
    addresses: np.ndarray,
    sizes: np.ndarray,
    program: Program,
    views: np.ndarray,
    pad: int,
    size: int,
    both: bool = True,
    device: torch.device | str = "cuda",
) -> Tensor:
    """The views of B decoded images: u8 (2, B, S, S, 3), original, then augmented; (1, B, S, S, 3) unless `both`.

    `addresses` i64 (B,): where on the device each image lies, u8 (H, W, 3), C-contiguous; `sizes` (B, 2): heights and
    widths in pixels. `views` (B,) and `pad` are those of `kernels.jda.pair`, and so are the bytes. Works on the
    current stream: the images must be written before it gets here and be left alone until it has passed.
    Raises ValueError for arguments that do not fit together.
    """
    addresses, sizes = np.asarray(addresses, np.int64), np.asarray(sizes, np.int64)
    if addresses.ndim != 1 or sizes.shape != (len(addresses), 2) or views.shape != addresses.shape:
        shapes = f"{addresses.shape}, {sizes.shape}, {views.shape}"
        raise ValueError(f"addresses, sizes, views: expected shapes (B,), (B, 2), (B,), got {shapes}")
    if sizes.min(initial=1) < 1 or sizes.prod(1).max(initial=1) > MAX_PIXELS:
        found = f"sides of {sizes.min()} to {sizes.max()}"
        raise ValueError(f"sizes: expected 1 to {MAX_PIXELS} pixels per image, got {found}")
    out = torch.empty((1 + both, len(addresses), size, size, 3), dtype=torch.uint8, device=device)
    crops = plan.place_crops(addresses, sizes, views, pad, size, both, out.data_ptr())
    steps = plan.plan(program, views, sizes) if both else np.zeros((0, len(addresses)), plan.STEP)
    with torch.cuda.device_of(out):
        for part in plan.parts(plan.scratch_words(steps), MAX_SCRATCH_BYTES // 4):
            _run(steps[:, part], crops[:, part], program, pad, size, out.device)
    return out


def _run(steps, crops, program: Program, pad: int, size: int, device: torch.device) -> None:
    """Lay out the memory of a part of a batch, then launch."""
    words = int(plan.scratch_words(steps).sum())
    # Batches differ a little; with rounded sizes the allocator finds the block of the last one again.
    scratch = torch.empty(_ceil(words, _BLOCK_WORDS) * _BLOCK_WORDS, dtype=torch.int32, device=device)
    tables = torch.empty((*steps.shape, 3, 256), dtype=torch.uint8, device=device)
    histograms = torch.zeros((*steps.shape, 3, 256), dtype=torch.int32, device=device)
    sums = torch.zeros(steps.shape, dtype=torch.int64, device=device)
    places = [memory.data_ptr() for memory in (scratch, tables, histograms, sums)]
    ends = plan.place_steps(steps, crops["source"][0], *places)
    crops["source"][1:], crops["packed"][1:], crops["table"][1:] = ends

    # A launch is (kernel, its records, grid, other arguments).
    operations = _on_device(plan.program_words(program).tobytes(), device)
    of_program = {"program": operations}
    launches = []
    for step in steps:
        counting, composing, writing = step[step["wants"] != 0], step[step["ops"] != 0], step[step["op"] >= 0]
        runs = _ceil(counting["height"] * counting["width"], STATISTICS["TILE"])
        tiles = _ceil(writing["height"], PIXELS["ROWS"]) * _ceil(writing["width"], PIXELS["COLUMNS"])
        launches += [
            (statistics_kernel, counting, _sharing(runs), STATISTICS),
            (compose_kernel, composing, (len(composing), 3), of_program | {"OPS": len(program.codes)}),
            (pixels_kernel, writing, _sharing(tiles), of_program | PIXELS),
        ]
    crops = crops[crops["box_height"] > 0]
    grid = _ceil(size, VIEW["ROWS"]) * _ceil(size, VIEW["COLUMNS"]), len(crops)
    if pad >= 0:
        launches.append((shift_kernel, crops, grid, {"SIZE": size} | VIEW))
    else:
        lengths = np.stack([crops["box_height"], crops["box_width"]])
        counts = coefficient_words(lengths, size)
        coefficients = torch.empty(int(counts.sum()), dtype=torch.int32, device=device)
        ends = np.cumsum(counts).reshape(counts.shape)
        crops["rows"], crops["columns"] = coefficients.data_ptr() + 4 * (ends - counts)
        blocks = len(crops), 2, _ceil(size, COEFFICIENTS["BLOCK"])
        launches.append((coefficients_kernel, crops, blocks, {"SIZE": size} | COEFFICIENTS))
        launches.append((resize_kernel, crops, grid, {"SIZE": size} | VIEW))
    _launch([launch for launch in launches if len(launch[1])], device)


def _launch(launches: list[tuple[Any, np.ndarray, tuple[int, ...], dict]], device: torch.device) -> None:
    host = torch.from_numpy(np.concatenate([records.view(np.int64) for _, records, _, _ in launches]))
    table = (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
    first = 0
    for kernel, records, grid, arguments in launches:
        last = first + plan.WORDS.value * len(records)
        kernel[grid](records=table[first:last], **arguments, **OPTIONS)
        first = last


@lru_cache
def _on_device(words: bytes, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(words), dtype=torch.int64).to(device)


def _sharing(tiles: np.ndarray) -> tuple[int, int]:
    """A grid for images of so many tiles: few programs for many images, never more than the largest one has tiles."""
    return min(int(tiles.max(initial=1)), _ceil(_PROGRAMS, max(len(tiles), 1))), len(tiles)


def _ceil(a: Any, b: int) -> Any:
    return -(-a // b)
