"""From rows to the loss: shares are added up in the launch that made them.

Whole numbers give the same sum in any order, so shares are added as multiples of 2^-40 by atomics. The program that
draws the last number of a ticket writes the loss, and leaves slots and ticket as it found them: all zero.
"""

# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportAssignmentType=false
# (Triton's annotations are those of Python, not of the language inside @triton.jit.)

import triton
import triton.language as tl

SLOTS = 32
"""Sums that programs spread over; the ticket stands before them."""

LARGEST = 2.0**22
"""A loss beyond it is NaN where shares are whole numbers."""

_ONE = tl.constexpr(2.0**40)
_SLOTS, _LARGEST = tl.constexpr(SLOTS), tl.constexpr(LARGEST)


@triton.jit
def add_share(slots, loss, share, limit):
    """Add a program's share of the loss; NaN, and what is not below `limit`, is noted in the ticket's upper half."""
    programs = tl.num_programs(0) * tl.num_programs(1)
    sound = tl.abs(share) < limit  # false for NaN
    whole = (tl.where(sound, share, 0.0) * _ONE).to(tl.int64)
    tl.atomic_add(slots + 1 + ((tl.program_id(0) + tl.program_id(1)) & (_SLOTS - 1)), whole, sem="relaxed")
    drawn = tl.where(sound, 1, (1 << 32) + 1).to(tl.int64)
    # After all that the program's threads have written. What others wrote concerns the last one alone, so that only it
    # acquires: a barrier less for all programs.
    before = tl.atomic_add(slots, drawn, sem="release")
    if (before & 0xFFFFFFFF).to(tl.int32) == programs - 1:
        every = tl.atomic_add(slots, 0, sem="acquire")
        each = tl.arange(0, _SLOTS)
        total = tl.sum(tl.load(slots + 1 + each, cache_modifier=".cg"), 0).to(tl.float64) * (1.0 / _ONE)
        unsound = (every >> 32) != 0
        tl.store(loss, tl.where(unsound, float("nan"), total).to(loss.dtype.element_ty))
        tl.store(slots + 1 + each, tl.zeros((_SLOTS,), tl.int64))
        tl.store(slots, 0)


@triton.jit
def total_of(shares, loss, count, BLOCK: tl.constexpr = 1024):
    """The loss of an exact report, as a float64 sum of the shares in one order. One program."""
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums += tl.load(shares + at, mask=at < count, other=0.0).to(tl.float64)
    tl.store(loss, tl.sum(sums, 0).to(loss.dtype.element_ty))


@triton.jit
def _number(valid, batch):
    """Of the pairs that count, at most 8,192: every program counts them, so that no launch has to.

    Bytes of 0 and 1 are added four at a time; a lane meets 64 words at most, so that no byte runs over.
    """
    ROUNDS: tl.constexpr = 8
    words = valid.to(tl.pointer_type(tl.int32), bitcast=True)
    lane = tl.arange(0, ROUNDS)[:, None] * 128 + tl.arange(0, 128)[None, :]
    found = tl.zeros((128,), tl.int32)
    for start in range(0, batch // 4, ROUNDS * 128):
        at = start + lane
        found += tl.sum(tl.load(words + at, mask=at // 4 < batch // 16, other=0), 0)  # 16 bytes, or none
    halves = (found & 0x00FF00FF) + ((found >> 8) & 0x00FF00FF)
    left = batch // 16 * 16 + tl.arange(0, 16)
    rest = tl.load(valid + left, mask=left < batch, other=0).to(tl.int32)
    return tl.sum((halves & 0xFFFF) + (halves >> 16), 0) + tl.sum(rest, 0)


@triton.jit
def row_factors(count, valid, batch, loss_scale, live, hard, soft, COUNTED: tl.constexpr, COMPUTE: tl.constexpr):
    """The factors of one row's CE and KL, over the number of pairs where that is on the device; and of its gradient."""
    if count is not None or COUNTED:
        pairs = tl.load(count).to(COMPUTE) if count is not None else _number(valid, batch).to(COMPUTE)
        pairs = tl.where(pairs == 0.0, 1.0, pairs)  # of no pairs the loss is 0
        hard, soft = hard / pairs, soft / pairs
    scaled = tl.where(live, 1.0, 0.0).to(COMPUTE)
    if loss_scale is not None:
        scaled = scaled * tl.load(loss_scale).to(COMPUTE)
    return hard, soft, scaled


@triton.jit
def report(
    parts, slots, loss, row, view, batch, live, known, w, hard, soft, ce, kl, same, limit,
    WEIGHTED: tl.constexpr, REPORT: tl.constexpr,
):  # fmt: skip
    """Add a row's share to the loss, and store what it is made of; without a report the loss is NaN."""
    if REPORT > 0:
        ce = tl.where(known, ce, float("nan"))
        share = tl.where(live, hard * ce + soft * w * kl, 0.0)
        if parts is not None:
            tl.store(parts + view * batch + row, share)
            tl.store(parts + (2 + view) * batch + row, tl.where(live, ce, 0.0))
            tl.store(parts + (4 + view) * batch + row, tl.where(live, kl, 0.0))
            tl.store(parts + (6 + view) * batch + row, tl.where(live & same, 1.0, 0.0))
            tl.store(parts + 8 * batch + row, tl.where(live, w, 0.0), mask=view == WEIGHTED)
        if slots is not None:
            add_share(slots, loss, share, limit)
    else:
        tl.store(loss, float("nan"), mask=(row == 0) & (view == 0))


@triton.jit
def rescale(
    grad_o, grad_a, out_o, out_a, incoming, stored, rows, width,
    STRIDE_GRAD_O: tl.constexpr, STRIDE_GRAD_A: tl.constexpr, STRIDE_OUT_O: tl.constexpr, STRIDE_OUT_A: tl.constexpr,
    IN_PLACE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients (rows, width) of the views that program_id(1) counts, times incoming / stored, two device scalars.

    In place nothing is read or written if that is 1: a plain `loss.backward()` costs an empty launch.
    """
    factor = tl.load(incoming).to(COMPUTE)
    if stored is not None:
        factor = factor / tl.load(stored).to(COMPUTE)
    wanted = True
    if IN_PLACE:
        wanted = factor != 1.0
    if wanted:
        tiles = (width + BLOCK - 1) // BLOCK
        for number in range(tl.program_id(0).to(tl.int64), rows * tiles, tl.num_programs(0)):
            row = number // tiles
            columns = number % tiles * BLOCK + tl.arange(0, BLOCK)
            grad, out = grad_o + row * STRIDE_GRAD_O, out_o + row * STRIDE_OUT_O
            if tl.program_id(1) == 1:
                grad, out = grad_a + row * STRIDE_GRAD_A, out_a + row * STRIDE_OUT_A
            scaled = tl.load(grad + columns, mask=columns < width, other=0.0).to(COMPUTE) * factor
            tl.store(out + columns, scaled.to(out.dtype.element_ty), mask=columns < width)
