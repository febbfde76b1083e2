"""Decoding `subspace` rows on the GPU: dither, unpacking and the product with the directions in one kernel.

A product of its own, right before the loss, and not inside it: a tensor core wants 64 vectors by 128 classes to share
a tile of directions, while the loss wants whole rows. The decoded logits take 8·B·C bytes between the two launches
(8 MB for 1,024 pairs of 1000 classes, which stay in the L2 cache; 65 MB for 8,192, which do not). Decoding by parts
that always stay would take two launches per part.

Directions are int8, exact in float16. A coefficient is the sum of two float16, 22 bits: its error is that of float32
to a factor of two, and no tensor core rounds the products.
"""

# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (Triton's annotations are those of Python, not of the language inside @triton.jit.)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_HEADER = 16  # bytes of a row before its segments


@triton.jit
def _philox(call, view, low, high):
    """The four words of Philox4x32-10 with counter (call, view, 0, 0) and key (low, high), all u32."""
    zero = call & 0
    c0, c1, c2, c3 = call, zero + view, zero, zero
    for _ in tl.static_range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        h0, h1 = tl.umulhi(c0, zero + 0xD2511F53), tl.umulhi(c2, zero + 0xCD9E8D57)
        c0, c1, c2, c3 = h1 ^ c1 ^ low, p1, h0 ^ c3 ^ high, p0
        low, high = low + 0x9E3779B9, high + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def decode(
    rows, stream, basis, scale, beta, mean, out, ticket, vectors, unit,
    ROW_BYTES: tl.constexpr, SEGMENT: tl.constexpr, WIDE: tl.constexpr, DIMS: tl.constexpr, CLASSES: tl.constexpr,
    STRIDE_BASIS: tl.constexpr, VECTORS: tl.constexpr, COLUMNS: tl.constexpr, CALLS: tl.constexpr,
):  # fmt: skip
    """`VECTORS` logits by `COLUMNS` classes of out f32 (B, 2, C); vector v is view v % 2 of row v / 2.

    `ticket`, an i32 scalar or None, is set to 0 for the loss that follows.
    """
    if ticket is not None:
        tl.store(ticket, 0, mask=(tl.program_id(0) == 0) & (tl.program_id(1) == 0))
    number = tl.program_id(1).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)[:, None]
    there = number < vectors
    row, view = number // 2, (number % 2).to(tl.uint32)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    key = tl.load(stream + row, mask=there, other=0)
    low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    start = rows + row * ROW_BYTES + 16 + view.to(tl.int64) * SEGMENT
    total: tl.constexpr = (DIMS + 15) // 16  # calls of Philox per vector
    half: tl.constexpr = (DIMS - WIDE + 1) // 2
    sums = tl.zeros((VECTORS, COLUMNS), tl.float32)
    for first in range(0, total, CALLS):
        call = first + tl.arange(0, CALLS)[None, :]
        words = _philox(call.to(tl.uint32) + tl.zeros((VECTORS, CALLS), tl.uint32), view, low, high)
        for word in tl.static_range(4):
            for byte in tl.static_range(4):
                # Byte j of call k is that of coefficient j·total + k: runs of neighbours.
                i = (4 * word + byte) * total + call
                kept = (call < total) & (i < DIMS)
                at = tl.where(i < WIDE + half, i, i - half)
                q = tl.load(start + at, mask=kept & there, other=0).to(tl.int32)
                nibble = tl.where(i < WIDE + half, q & 15, q >> 4)
                q = tl.where(i < WIDE, (q ^ 128) - 128, (nibble ^ 8) - 8)
                dither = (2 * ((words[word] >> (8 * byte)) & 255).to(tl.int32) - 255).to(tl.float32) * (1.0 / 512)
                step = q.to(tl.float32) - tl.load(beta + i, mask=kept, other=0.0) * dither
                coefficient = step * tl.load(scale + i, mask=kept, other=0.0)
                coarse = coefficient.to(tl.float16)
                fine = (coefficient - coarse.to(tl.float32)).to(tl.float16)
                below = (4 * word + byte) * total + first + tl.arange(0, CALLS)[:, None]
                directions = tl.load(
                    basis + below * STRIDE_BASIS + columns,
                    mask=(below - (4 * word + byte) * total < total) & (below < DIMS) & (columns < STRIDE_BASIS),
                    other=0,
                ).to(tl.float16)
                sums = tl.dot(coarse, directions, sums)
                sums = tl.dot(fine, directions, sums)
    inside = columns < CLASSES
    logits = sums * unit + tl.load(mean + columns, mask=inside, other=0.0)
    tl.store(out + number * CLASSES + columns, logits, mask=there & inside)


def options(dims: int) -> dict[str, int]:
    """Tile and warps of a launch for a code of `dims` directions."""
    launch = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}
    return {"VECTORS": 64, "COLUMNS": 128, "CALLS": 32 if dims > 256 else 16, **launch}


def decode_subspace(
    rows: Tensor,
    stream: Tensor,
    basis: Tensor,
    scale: Tensor,
    beta: Tensor,
    mean: Tensor,
    wide: int,
    unit: float,
    ticket: Tensor | None = None,
) -> Tensor:
    """Rows u8 (B, row_bytes), keys i64 (B,) and a `Decoder`'s fields -> logits f32 (B, 2, C); `ticket` becomes 0."""
    batch, row_bytes = rows.shape
    dims, classes = len(scale), len(mean)
    out = torch.empty((batch, 2, classes), dtype=torch.float32, device=rows.device)
    sizes = options(dims)
    grid = triton.cdiv(classes, sizes["COLUMNS"]), triton.cdiv(2 * batch, sizes["VECTORS"])
    kernel: Any = decode[grid]
    kernel(
        rows,
        stream,
        basis,
        scale,
        beta,
        mean,
        out,
        ticket,
        2 * batch,
        unit,
        ROW_BYTES=row_bytes,
        SEGMENT=(row_bytes - _HEADER) // 2,
        WIDE=wide,
        DIMS=dims,
        CLASSES=classes,
        STRIDE_BASIS=basis.stride(0),
        **sizes,
    )
    return out
