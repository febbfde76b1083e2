"""Subspace codes to logits: they become float16 coefficients, once, and one product with the directions follows.

A coefficient is (q − β·u)·s with u of Philox's byte b, which is q·s + b·m + n of three tables. Segments that are half
the sum and half the difference of the views are added and subtracted. Coefficients are written in the order of Philox's
calls, 16 bytes each; the rows of the basis stand in the same one. Two more rows are the mean and what float16 rounds
off it, with coefficients 1. A power of two, `Lean.unit`, keeps what is summed within float16; it goes into the
temperature. Against float64, logits are off by less than the code's own noise by two orders of magnitude.
"""

# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportAssignmentType=false, reportOptionalOperand=false, reportOptionalMemberAccess=false
# (Triton's annotations are those of Python, not of the language inside @triton.jit.)

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_HEADER = 16  # bytes of a pair's codes before its segments
_LARGEST_STEP = 136  # |q − β·u|: a byte and half a dither of up to four steps
_ROOM = 64.0  # of a coefficient, so that 1,000 directions cannot leave float16


class Lean(NamedTuple):
    """What `coefficients_of` and the product take of a code."""

    table: Tensor
    """f32 (3, S, d): s, m and n of each coefficient; S is 2 if segments are half sums and half differences, else 1."""
    basis: Tensor
    """f16 (K, P): directions in the order of the calls, mean and its rest; K and P are multiples of 16."""
    unit: float
    """Logits are unit times the product."""


def lean(basis: Tensor, scale: Tensor, beta: Tensor, mean: Tensor, unit: float) -> Lean:
    """Of a `Decoder`'s fields, once per code: it waits for the device."""
    dims, columns = basis.shape
    scale, beta = scale.reshape(-1, dims), beta.reshape(-1, dims)
    calls = -(-dims // 16)
    largest = max(float(scale.sum(0).max()) * unit * 128 * _LARGEST_STEP, float(mean.abs().max()), 1e-30)
    shared = 2.0 ** torch.tensor(largest / _ROOM).log2().ceil().item()
    s = scale.double() * (unit * 128 / shared)
    table = torch.stack([s, -beta.double() * s / 256, 255 * beta.double() * s / 512]).float()
    placed = torch.zeros((16 * calls + 16, columns), dtype=torch.float64, device=basis.device)
    i = torch.arange(dims, device=basis.device)
    placed[16 * (i % calls) + i // calls] = basis.double() / 128
    middle = mean.double() / shared
    placed[16 * calls, : len(mean)] = middle.half().double()
    placed[16 * calls + 1, : len(mean)] = middle - middle.half().double()
    return Lean(table.contiguous(), placed.half(), shared)


@triton.jit
def philox(call, view, low, high):
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
def _coefficient(
    start, table, words, call,
    BYTE: tl.constexpr, WIDE: tl.constexpr, DIMS: tl.constexpr, TABLES: tl.constexpr,
):  # fmt: skip
    """Coefficients f32 of byte `BYTE` of the calls: a run of neighbours in the segment and in the table."""
    TOTAL: tl.constexpr = (DIMS + 15) // 16
    HALF: tl.constexpr = (DIMS - WIDE + 1) // 2
    i = BYTE * TOTAL + call
    kept = (call < TOTAL) & (i < DIMS)
    at = tl.where(i < WIDE + HALF, i, i - HALF)
    q = tl.load(start + at, mask=kept, other=0).to(tl.int32)
    nibble = tl.where(i < WIDE + HALF, q & 15, q >> 4)
    q = tl.where(i < WIDE, (q ^ 128) - 128, (nibble ^ 8) - 8).to(tl.float32)
    byte = ((words[BYTE // 4] >> (8 * (BYTE % 4))) & 255).to(tl.int32).to(tl.float32)
    s = tl.load(table + i, mask=kept, other=0.0)
    m = tl.load(table + TABLES * DIMS + i, mask=kept, other=0.0)
    n = tl.load(table + 2 * TABLES * DIMS + i, mask=kept, other=0.0)
    return tl.fma(q, s, tl.fma(byte, m, n))


@triton.jit
def _of_both(
    start, table, words, others, call,
    BYTE: tl.constexpr, WIDE: tl.constexpr, DIMS: tl.constexpr, TABLES: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Coefficients f16 of both views; with two tables the segments are their half sum and half difference."""
    first = _coefficient(start, table, words, call, BYTE, WIDE, DIMS, TABLES)
    second = _coefficient(start + SEGMENT, table + (TABLES - 1) * DIMS, others, call, BYTE, WIDE, DIMS, TABLES)
    if TABLES == 2:
        first, second = first + second, first - second
    return first.to(tl.float16), second.to(tl.float16)


@triton.jit
def _joined(c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, c14, c15):
    """From the highest bit of the byte's number down: 16 neighbours of 32 bytes for each lane."""
    low = tl.join(tl.join(tl.join(c0, c8), tl.join(c4, c12)), tl.join(tl.join(c2, c10), tl.join(c6, c14)))
    high = tl.join(tl.join(tl.join(c1, c9), tl.join(c5, c13)), tl.join(tl.join(c3, c11), tl.join(c7, c15)))
    return tl.reshape(tl.join(low, high), (c0.shape[0] * 16,))


@triton.jit
def unpack(
    codes, rows, dither_keys, table, out,
    CODE_BYTES: tl.constexpr, WIDE: tl.constexpr, DIMS: tl.constexpr, TABLES: tl.constexpr, CALLS: tl.constexpr,
):  # fmt: skip
    """Coefficients f16 (B, 2, K) of codes u8 (N, row_bytes): a pair is a program's."""
    K: tl.constexpr = (DIMS + 15) // 16 * 16 + 16
    pair = tl.program_id(0).to(tl.int64)
    key = tl.load(dither_keys + pair)
    row = pair
    if rows is not None:
        row = tl.load(rows + pair)
    start = codes + row * CODE_BYTES + 16
    call = tl.arange(0, CALLS)
    low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    words, others = philox(call.to(tl.uint32), 0, low, high), philox(call.to(tl.uint32), 1, low, high)
    SEGMENT: tl.constexpr = (CODE_BYTES - 16) // 2
    o0, a0 = _of_both(start, table, words, others, call, 0, WIDE, DIMS, TABLES, SEGMENT)
    o1, a1 = _of_both(start, table, words, others, call, 1, WIDE, DIMS, TABLES, SEGMENT)
    o2, a2 = _of_both(start, table, words, others, call, 2, WIDE, DIMS, TABLES, SEGMENT)
    o3, a3 = _of_both(start, table, words, others, call, 3, WIDE, DIMS, TABLES, SEGMENT)
    o4, a4 = _of_both(start, table, words, others, call, 4, WIDE, DIMS, TABLES, SEGMENT)
    o5, a5 = _of_both(start, table, words, others, call, 5, WIDE, DIMS, TABLES, SEGMENT)
    o6, a6 = _of_both(start, table, words, others, call, 6, WIDE, DIMS, TABLES, SEGMENT)
    o7, a7 = _of_both(start, table, words, others, call, 7, WIDE, DIMS, TABLES, SEGMENT)
    o8, a8 = _of_both(start, table, words, others, call, 8, WIDE, DIMS, TABLES, SEGMENT)
    o9, a9 = _of_both(start, table, words, others, call, 9, WIDE, DIMS, TABLES, SEGMENT)
    o10, a10 = _of_both(start, table, words, others, call, 10, WIDE, DIMS, TABLES, SEGMENT)
    o11, a11 = _of_both(start, table, words, others, call, 11, WIDE, DIMS, TABLES, SEGMENT)
    o12, a12 = _of_both(start, table, words, others, call, 12, WIDE, DIMS, TABLES, SEGMENT)
    o13, a13 = _of_both(start, table, words, others, call, 13, WIDE, DIMS, TABLES, SEGMENT)
    o14, a14 = _of_both(start, table, words, others, call, 14, WIDE, DIMS, TABLES, SEGMENT)
    o15, a15 = _of_both(start, table, words, others, call, 15, WIDE, DIMS, TABLES, SEGMENT)
    original = _joined(o0, o1, o2, o3, o4, o5, o6, o7, o8, o9, o10, o11, o12, o13, o14, o15)
    augmented = _joined(a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15)
    columns, ones, start = tl.arange(0, CALLS * 16), tl.arange(0, 16), out + 2 * pair * K
    tl.store(start + columns, original, mask=columns < K - 16)
    tl.store(start + K + columns, augmented, mask=columns < K - 16)
    one = tl.where(ones < 2, 1.0, 0.0).to(tl.float16)
    tl.store(start + K - 16 + ones, one)
    tl.store(start + 2 * K - 16 + ones, one)


def subspace_logits(codes: Tensor, rows: Tensor | None, dither_keys: Tensor, code: Lean, wide: int) -> Tensor:
    """Codes u8 (N, row_bytes), rows i64 (B,) or None, keys i64 (B,) -> logits over `code.unit`, f16 (B, 2, P)."""
    pairs, (_, tables, dims) = len(dither_keys), code.table.shape
    found = torch.empty((2 * pairs, code.basis.shape[0]), dtype=torch.float16, device=codes.device)
    kernel: Any = unpack[(pairs,)]
    kernel(
        codes,
        rows,
        dither_keys,
        code.table,
        found,
        CODE_BYTES=codes.shape[1],
        WIDE=wide,
        DIMS=dims,
        TABLES=tables,
        **options(dims),
    )
    return torch.mm(found, code.basis).view(pairs, 2, -1)


def bytes_of_pair(code: Lean) -> int:
    """Coefficients and logits f16 of both views."""
    return 2 * 2 * sum(code.basis.shape)


_sides: dict[torch.device, Any] = {}


def _side(device: torch.device) -> Any:
    if device not in _sides:
        _sides[device] = torch.cuda.Stream(device)
    return _sides[device]


def beside(codes: Tensor, rows: Tensor | None, dither_keys: Tensor, code: Lean, wide: int) -> tuple[Tensor, Any]:
    """`subspace_logits` on a stream of their own, and the event after which they may be read."""
    main, side = torch.cuda.current_stream(codes.device), _side(codes.device)
    side.wait_stream(main)  # on which codes and dither keys came
    with torch.cuda.device_of(codes), torch.cuda.stream(side):
        made = subspace_logits(codes, rows, dither_keys, code, wide)
    for read in (codes, rows, dither_keys):
        if read is not None:
            read.record_stream(side)  # not to be given to others while it is read there
    made.record_stream(main)
    return made, side.record_event()


def options(dims: int) -> dict[str, int | bool]:
    """Tile and warps of a launch: a lane a call of Philox."""
    calls = max(triton.next_power_of_2(-(-dims // 16)), 1)
    return {"CALLS": calls, "num_warps": max(calls // 32, 1), "enable_fp_fusion": True}
