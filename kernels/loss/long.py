"""The loss of rows that registers do not hold, C > 8192: one row of one view per program, read twice.

The first pass takes the sums, each thread's against the largest logit that it has met, so that no thread waits for
another inside the loop; the second, out of the L2 cache, takes gradient and KL. Methods with a level read rows once
more between them, standardised ones also once before them. All passes walk tiles (2, threads, 8) whose
vectors lie wholly in the row and start at multiples of 16 bytes, whatever C is; what is left of a row at its ends, at
most 14 logits, are the `edges`, a tile of their own. `kernels.loss.terms` has the forms.
"""

# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportAssignmentType=false, reportOptionalOperand=false, reportOptionalMemberAccess=false
# (Triton's annotations are those of Python, not of the language inside @triton.jit.)

import triton
import triton.language as tl

from kernels.loss.ends import (
    agreement,
    cross_entropy,
    decouple,
    factors,
    inverses,
    logits,
    place,
    store_target,
    target_of,
    teacher_scale,
    weight_of,
)
from kernels.loss.finish import report, row_factors
from kernels.loss.terms import (
    ABSENT,
    DKD,
    LN_2,
    LOG2_E,
    REVERSE,
    STANDARDISED,
    divergence,
    divergence_terms,
    gradient,
    inverse_deviation,
    level_terms,
    raised,
)


@triton.jit
def _start(begin, head, ALIGNED: tl.constexpr):
    """Where the vectors of a row at `begin` start; told in eights where that is so, for wide loads and stores."""
    if ALIGNED:
        return (begin + 7) // 8 * 8
    return begin + head


@triton.jit
def _clear(grad, width, BLOCK: tl.constexpr):
    """The gradient of a row that does not count is 0."""
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        tl.store(grad + columns, tl.zeros((BLOCK,), grad.dtype.element_ty), mask=columns < width)


@triton.jit
def _largest(tile):
    return tl.max(tl.max(tile, 2), 0)


@triton.jit
def _summed(tile):
    return tl.sum(tl.sum(tile, 2), 0)


@triton.jit
def _exponentials(z, t, c, c_t, shift_z, shift_t, shift_h, POWER: tl.constexpr):
    """Exponents of student and teacher, and e_h, e_q, e_p."""
    z2, t2 = tl.fma(z, c, shift_z), tl.fma(t, c_t, shift_t)
    e_q = tl.exp2(z2)
    e_h = tl.exp2(tl.fma(z, LOG2_E, shift_h)) if POWER == 0 else raised(e_q, POWER)
    return z2, t2, e_h, e_q, tl.exp2(t2)


@triton.jit
def _first(z, t, c, c_t, top_z, top_t, shift_z, shift_t, shift_h, sum_h, sum_q, sum_p, POWER: tl.constexpr):
    """A tile added to each thread's sums. Shifts are carried: products would be fused, and not rounded as before."""
    most_z, most_t = _largest(z), _largest(t)
    new_z, new_t = tl.minimum(shift_z, -most_z * c), tl.minimum(shift_t, -most_t * c_t)
    new_h = tl.minimum(shift_h, -most_z * LOG2_E)
    _, _, e_h, e_q, e_p = _exponentials(
        z, t, c, c_t, new_z[None, :, None], new_t[None, :, None], new_h[None, :, None], POWER
    )
    less_h, less_q, less_p = _less(shift_z, shift_t, shift_h, new_z, new_t, new_h, POWER)
    sum_h, sum_q, sum_p = sum_h * less_h + _summed(e_h), sum_q * less_q + _summed(e_q), sum_p * less_p + _summed(e_p)
    return tl.maximum(top_z, most_z), tl.maximum(top_t, most_t), new_z, new_t, new_h, sum_h, sum_q, sum_p


@triton.jit
def _less(shift_z, shift_t, shift_h, new_z, new_t, new_h, POWER: tl.constexpr):
    """What sums shrink by under new shifts."""
    less_q = tl.exp2(new_z - shift_z)
    less_h = tl.exp2(new_h - shift_h) if POWER == 0 else raised(less_q, POWER)
    return less_h, less_q, tl.exp2(new_t - shift_t)


@triton.jit
def _merged(values, inside, mean, square, number):
    """A tile's logits added to each thread's mean, squared distances and number (Chan, Golub, LeVeque, 1983)."""
    more = _summed(tl.where(inside, 1.0, 0.0 * values))
    its = _summed(tl.where(inside, values, 0.0)) / tl.maximum(more, 1.0)
    away = tl.where(inside, values - its[None, :, None], 0.0)
    share = more / tl.maximum(number + more, 1.0)
    apart = its - mean
    return mean + apart * share, square + _summed(away * away) + apart * apart * number * share, number + more


@triton.jit
def _spread(
    rows, first, edge, there, whole, inner, tile, half, scale,
    CLASSES: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, TEACHER: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """`inverse_deviation` of a row; from its `first` logit, beside which an offset of all is nothing."""
    mean = tl.zeros((HALF // 8,), COMPUTE)
    square, number = mean, mean
    for start in range(0, whole, BLOCK):
        values = tl.load(rows + start + tile, eviction_policy="evict_last").to(COMPUTE)
        mean, square, number = _merged(values - first, tile >= 0, mean, square, number)
    for start in range(whole, inner, HALF):
        columns = start + half
        values = logits(rows + columns, columns < inner, columns < inner, False, TEACHER, COMPUTE)
        mean, square, number = _merged(values - first, columns < inner, mean, square, number)
    edges = tl.where(there, edge - first, 0.0)
    middle = (tl.sum(number * mean, 0) + tl.sum(edges, 0)) / CLASSES
    away, sides = mean - middle, tl.where(there, edges - middle, 0.0)
    square = tl.sum(square + number * away * away, 0) + tl.sum(sides * sides, 0)
    return inverse_deviation(square, first + middle, scale, CLASSES)


@triton.jit
def _levels(z, t, inside, c, c_t, shift_z, shift_t, by_q, by_p, METHOD: tl.constexpr):
    """What a tile adds to the level, and to the mean of the student's exponents."""
    z2, t2 = tl.fma(z, c, shift_z), tl.fma(t, c_t, shift_t)
    found = level_terms(z2, t2, tl.exp2(z2), tl.exp2(t2), by_q, by_p, METHOD)
    return found, tl.where(inside, z2, 0.0)


@triton.jit
def _level(
    student, teacher, z_edge, t_edge, there, whole, inner, tile, half, c, c_t, shift_z, shift_t, by_q, by_p,
    CLASSES: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, METHOD: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """A row's level, and the mean of the student's exponents."""
    level = tl.zeros((HALF // 8,), COMPUTE)
    middle = level
    for start in range(0, whole, BLOCK):
        z = tl.load(student + start + tile, eviction_policy="evict_last").to(COMPUTE)
        t = tl.load(teacher + start + tile, eviction_policy="evict_last").to(COMPUTE)
        levels, middles = _levels(z, t, tile >= 0, c, c_t, shift_z, shift_t, by_q, by_p, METHOD)
        level, middle = level + _summed(levels), middle + _summed(middles)
    for start in range(whole, inner, HALF):
        columns = start + half
        z = logits(student + columns, columns < inner, columns < inner, False, False, COMPUTE)
        t = logits(teacher + columns, columns < inner, columns < inner, False, True, COMPUTE)
        levels, middles = _levels(z, t, columns < inner, c, c_t, shift_z, shift_t, by_q, by_p, METHOD)
        level, middle = level + _summed(levels), middle + _summed(middles)
    levels, middles = _levels(z_edge, t_edge, there, c, c_t, shift_z, shift_t, by_q, by_p, METHOD)
    level, middle = tl.sum(level, 0) + tl.sum(levels, 0), tl.sum(middle, 0) + tl.sum(middles, 0)
    return level, middle / CLASSES


@triton.jit
def _others(z, t, columns, label, METHOD: tl.constexpr):
    """Without the target, for dkd."""
    if METHOD == DKD:
        z, t = tl.where(columns == label, ABSENT, z), tl.where(columns == label, ABSENT, t)
    return z, t


@triton.jit
def _second(
    z, t, columns, inside, label, grad, c, c_t, shift_z, shift_t, shift_h, a, b, d, even, level, middle, along,
    top_z, top_t, by_q, by_p, inverse_t, scale, apart, POWER: tl.constexpr, METHOD: tl.constexpr, REPORT: tl.constexpr,
    HARD: tl.constexpr, SMOOTH: tl.constexpr, AGREE: tl.constexpr,
):  # fmt: skip
    """A tile's gradient, unless `grad` is None, and elementwise what KL, CE and agreement are summed from."""
    z, t = _others(z, t, columns, label, METHOD)
    z2, t2, e_h, e_q, e_p = _exponentials(z, t, c, c_t, shift_z, shift_t, shift_h, POWER)
    if grad is not None:
        g = gradient(
            z2, t2, e_h, e_q, e_p, a, b, d, even, level, middle, along, by_q, by_p, inside, METHOD, HARD, SMOOTH
        )  # fmt: skip
        tl.store(grad + columns, g.to(grad.dtype.element_ty), mask=inside)
    kl, rest, flat, same = 0.0 * z, 0.0 * z, 0.0 * z, 0.0 * z
    if REPORT > 0:
        kl = divergence_terms(
            z, t, z2, t2, e_q, e_p, by_q, by_p, top_z, top_t, inverse_t, scale, apart, METHOD, REPORT
        )  # fmt: skip
        if SMOOTH:
            flat = tl.where(z > ABSENT, z - top_z, 0.0)
    if REPORT == 2 and HARD:
        rest = tl.where(columns == label, 0.0, e_h)
    if AGREE:
        same = tl.where((z == top_z) & (t == top_t), 1.0, 0.0)
    return kl, rest, flat, same


@triton.jit
def long_loss(
    student_o, student_a, teacher_o, teacher_a, header, index, target, weight, valid, count, loss_scale,
    grad_o, grad_a, parts, slots, loss,
    batch, inverse_t, hard, soft, same_weight, smoothing, unit, alpha, beta, limit,
    STRIDE_STUDENT_O: tl.constexpr, STRIDE_STUDENT_A: tl.constexpr,
    STRIDE_TEACHER_O: tl.constexpr, STRIDE_TEACHER_A: tl.constexpr,
    OFFSET_O: tl.constexpr, OFFSET_A: tl.constexpr, STRIDE_HEADER: tl.constexpr,
    STRIDE_GRAD_O: tl.constexpr, STRIDE_GRAD_A: tl.constexpr,
    CLASSES: tl.constexpr, READ_STUDENT: tl.constexpr, READ_TEACHER: tl.constexpr, WRITE: tl.constexpr,
    BLOCK: tl.constexpr, POWER: tl.constexpr, METHOD: tl.constexpr, REPORT: tl.constexpr, WEIGHTED: tl.constexpr,
    COSINE: tl.constexpr, COUNTED: tl.constexpr, SMOOTH: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """As `kernels.loss.row.row_loss`, with tiles of `BLOCK` logits for 256 threads."""
    THREADS: tl.constexpr = 256
    HALF: tl.constexpr = 8 * THREADS  # what is left of the tiles is walked by halves, whose ends are masked
    row = tl.program_id(0).to(tl.int64)
    view = tl.program_id(1)
    at, live = place(row, index, valid)
    # Vectors start at multiples of 8 of the student's logits, which is 16 bytes or more.
    FIXED: tl.constexpr = STRIDE_STUDENT_O % 8 == 0 and STRIDE_STUDENT_A % 8 == 0
    EVEN_O: tl.constexpr = OFFSET_O % 8 == 0 and (STRIDE_TEACHER_O - STRIDE_STUDENT_O) % 8 == 0
    EVEN_A: tl.constexpr = OFFSET_A % 8 == 0 and (STRIDE_TEACHER_A - STRIDE_STUDENT_A) % 8 == 0
    begin = row * STRIDE_STUDENT_O
    if view == 1:
        begin = row * STRIDE_STUDENT_A
    head = -begin.to(tl.int32) & 7
    student = student_o + _start(row * STRIDE_STUDENT_O, head, True)
    teacher = teacher_o + _start(at * STRIDE_TEACHER_O + OFFSET_O, head, EVEN_O and (FIXED or index is None))
    if view == 1:
        student = student_a + _start(row * STRIDE_STUDENT_A, head, True)
        teacher = teacher_a + _start(at * STRIDE_TEACHER_A + OFFSET_A, head, EVEN_A and (FIXED or index is None))
    inner = tl.where(live, (CLASSES - head) // 8 * 8, 0)
    whole = inner // BLOCK * BLOCK
    half = tl.arange(0, 1)[:, None, None] + tl.arange(0, THREADS)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    tile = tl.arange(0, BLOCK // HALF)[:, None, None] * HALF + half
    # Columns of the edges, relative to `aligned`: 8 before it, and 8 behind the vectors.
    side = tl.arange(0, 16)
    edge = tl.where(side < 8, side - 8, side - 8 + (CLASSES - head) // 8 * 8)
    there = (edge >= -head) & (edge < tl.where(live, CLASSES - head, -head))
    z_edge = logits(student + edge, there, there, valid is not None, False, COMPUTE)
    t_edge = logits(teacher + edge, there, there, valid is not None, True, COMPUTE)

    scale = teacher_scale(header, at, view, live, unit, STRIDE_HEADER, COMPUTE)
    w = weight_of(
        weight, same_weight, row, view, teacher_o, teacher_a, header, at, live, STRIDE_TEACHER_O, STRIDE_TEACHER_A,
        OFFSET_O, OFFSET_A, STRIDE_HEADER, CLASSES, READ_TEACHER, BLOCK, WEIGHTED, COSINE, COMPUTE,
    )  # fmt: skip
    hard, soft, scaled = row_factors(count, valid, batch, loss_scale, live, hard, soft, COUNTED, COMPUTE)

    HARD: tl.constexpr = target is not None
    AGREE: tl.constexpr = parts is not None
    zero = tl.full((), 0.0, COMPUTE)
    known, label, z_y, t_y, h_y = live, 0, zero, zero, zero
    if HARD:
        label, known, hard = target_of(target, row, live, hard, CLASSES)
        label -= head
    by_z, varies = 1.0, live
    if METHOD == STANDARDISED:
        first_z = tl.load(student - head, mask=live, other=0).to(COMPUTE)
        first_t = tl.load(teacher - head, mask=live, other=0).to(COMPUTE)
        by_z, varies = _spread(
            student, first_z, z_edge, there, whole, inner, tile, half, 1.0, CLASSES, BLOCK, HALF, False, COMPUTE
        )  # fmt: skip
        by_t, _ = _spread(
            teacher, first_t, t_edge, there, whole, inner, tile, half, scale, CLASSES, BLOCK, HALF, True, COMPUTE
        )  # fmt: skip
        inverse_t, scale = inverse_t * by_z, scale * (by_t / by_z)
    c = tl.full((), LOG2_E, COMPUTE) * inverse_t
    c_t = c * scale
    none = tl.zeros((THREADS,), COMPUTE)
    top_z, top_t = none + ABSENT, none + ABSENT
    shift_z, shift_t, shift_h = none + 1e20, none + 1e20, none + 1e20  # what is absent stays below it
    sum_h, sum_q, sum_p = none, none, none
    for start in range(0, whole, BLOCK):
        z = tl.load(student + start + tile, eviction_policy="evict_last").to(COMPUTE)
        t = tl.load(teacher + start + tile, eviction_policy="evict_last").to(COMPUTE)
        z, t = _others(z, t, start + tile, label, METHOD)
        top_z, top_t, shift_z, shift_t, shift_h, sum_h, sum_q, sum_p = _first(
            z, t, c, c_t, top_z, top_t, shift_z, shift_t, shift_h, sum_h, sum_q, sum_p, POWER
        )
    for start in range(whole, inner, HALF):
        columns = start + half
        z = logits(student + columns, columns < inner, columns < inner, False, False, COMPUTE)
        t = logits(teacher + columns, columns < inner, columns < inner, False, True, COMPUTE)
        z, t = _others(z, t, columns, label, METHOD)
        top_z, top_t, shift_z, shift_t, shift_h, sum_h, sum_q, sum_p = _first(
            z, t, c, c_t, top_z, top_t, shift_z, shift_t, shift_h, sum_h, sum_q, sum_p, POWER
        )

    if HARD:  # not before: no register need hold them in the first pass
        z_y = tl.load(student + label, mask=live, other=0).to(COMPUTE)
        t_y = tl.load(teacher + label, mask=live, other=0).to(COMPUTE)
    # Threads and edges together.
    z_edge, t_edge = _others(z_edge, t_edge, edge, label, METHOD)
    edge_z, edge_t = tl.max(z_edge, 0), tl.max(t_edge, 0)
    most_z, most_t = tl.maximum(tl.max(top_z, 0), edge_z), tl.maximum(tl.max(top_t, 0), edge_t)
    to_z = tl.minimum(tl.min(shift_z, 0), -edge_z * c)
    to_t = tl.minimum(tl.min(shift_t, 0), -edge_t * c_t)
    to_h = tl.minimum(tl.min(shift_h, 0), -edge_z * LOG2_E)
    less_h, less_q, less_p = _less(shift_z, shift_t, shift_h, to_z, to_t, to_h, POWER)
    _, _, e_h, e_q, e_p = _exponentials(z_edge, t_edge, c, c_t, to_z, to_t, to_h, POWER)
    all_h = tl.sum(sum_h * less_h, 0) + tl.sum(e_h, 0)
    all_q = tl.sum(sum_q * less_q, 0) + tl.sum(e_q, 0)
    all_p = tl.sum(sum_p * less_p, 0) + tl.sum(e_p, 0)
    if valid is not None:  # the sums of a row that is not read are 0, and its shifts beyond any exponential
        all_h, all_q, all_p = tl.where(live, all_h, 1.0), tl.where(live, all_q, 1.0), tl.where(live, all_p, 1.0)
        to_z, to_t, to_h = tl.where(live, to_z, 0.0), tl.where(live, to_t, 0.0), tl.where(live, to_h, 0.0)
    by_h, by_q, by_p = inverses(all_h, all_q, all_p, HARD)
    if HARD:
        h_y = tl.fma(z_y, LOG2_E, to_h) if POWER == 0 else tl.fma(z_y, c, to_z) * POWER
    level, middle = zero, zero
    if METHOD >= REVERSE:
        level, middle = _level(
            student, teacher, z_edge, t_edge, there, whole, inner, tile, half, c, c_t, to_z, to_t, by_q, by_p,
            CLASSES, BLOCK, HALF, METHOD, COMPUTE,
        )  # fmt: skip
    # What the shifts were rounded by is in the sums, but not in the logits.
    apart = LN_2 * (tl.log2(all_q * by_p) - (tl.fma(most_z, c, to_z) - tl.fma(most_t, c_t, to_t)))
    a, b, d, even, along = factors(
        hard, soft, w, scaled, smoothing, inverse_t, c, by_h, by_q, by_p, by_z, varies, level, CLASSES, METHOD
    )  # fmt: skip
    ce, tckd, own = zero, zero, zero
    if METHOD == DKD:
        ce, tckd, own, a, b, d = decouple(
            z_y, t_y, h_y, c, c_t, to_z, to_t, all_h, all_q, all_p, a, b, d, even, soft * w * inverse_t * scaled,
            hard * scaled, smoothing, alpha, beta,
        )  # fmt: skip
    grad = None
    if grad_o is not None:
        grad = grad_o + _start(row * STRIDE_GRAD_O, head, (STRIDE_GRAD_O - STRIDE_STUDENT_O) % 8 == 0)
        if view == 1:
            grad = grad_a + _start(row * STRIDE_GRAD_A, head, (STRIDE_GRAD_A - STRIDE_STUDENT_A) % 8 == 0)

    # Edges first: no register need hold them in the second pass.
    edge_kls, edge_rests, edge_flats, edge_sames = _second(
        z_edge, t_edge, edge, there, label, grad, c, c_t, to_z, to_t, to_h, a, b, d, even,
        level, middle, along, most_z, most_t, by_q, by_p, inverse_t, scale, apart, POWER, METHOD, REPORT, HARD,
        SMOOTH, AGREE,
    )  # fmt: skip
    edge_kl, edge_rest = tl.sum(edge_kls, 0), tl.sum(edge_rests, 0)
    edge_flat, edge_same = tl.sum(edge_flats, 0), tl.max(edge_sames, 0)
    kl, rest, flat, same = none, none, none, none
    for start in range(0, whole, BLOCK):
        z = tl.load(student + start + tile, eviction_policy="evict_first").to(COMPUTE)
        t = tl.load(teacher + start + tile, eviction_policy="evict_first").to(COMPUTE)
        kls, rests, flats, sames = _second(
            z, t, start + tile, tile >= 0, label, grad, c, c_t, to_z, to_t, to_h, a, b, d, even,
            level, middle, along, most_z, most_t, by_q, by_p, inverse_t, scale, apart, POWER, METHOD, REPORT, HARD,
            SMOOTH, AGREE,
        )  # fmt: skip
        kl, rest, flat = kl + _summed(kls), rest + _summed(rests), flat + _summed(flats)
        same = tl.maximum(same, _largest(sames))
    for start in range(whole, inner, HALF):
        columns = start + half
        z = logits(student + columns, columns < inner, columns < inner, False, False, COMPUTE)
        t = logits(teacher + columns, columns < inner, columns < inner, False, True, COMPUTE)
        kls, rests, flats, sames = _second(
            z, t, columns, columns < inner, label, grad, c, c_t, to_z, to_t, to_h, a, b, d, even,
            level, middle, along, most_z, most_t, by_q, by_p, inverse_t, scale, apart, POWER, METHOD, REPORT, HARD,
            SMOOTH, AGREE,
        )  # fmt: skip
        kl, rest, flat = kl + _summed(kls), rest + _summed(rests), flat + _summed(flats)
        same = tl.maximum(same, _largest(sames))
    total = zero
    if REPORT > 0:
        total = divergence(tl.sum(kl, 0) + edge_kl, level, all_q, all_p, by_q, by_p, METHOD, REPORT)
        left, even_sum = tl.sum(rest, 0) + edge_rest, tl.sum(flat, 0) + edge_flat
        if METHOD == DKD:
            total = alpha * tckd + beta * total
            if SMOOTH:
                ce += smoothing * (z_y - most_z - (even_sum + (z_y - most_z)) / CLASSES)
        elif HARD:
            ce = cross_entropy(all_h, left, even_sum, h_y, z_y, most_z, smoothing, CLASSES, REPORT, SMOOTH)
    agree = tl.maximum(tl.max(same, 0), edge_same) > 0.0
    if AGREE:
        agree = agreement(agree, z_y, t_y, most_z, most_t, METHOD)
    if grad_o is not None and valid is not None:
        _clear(grad - head, tl.where(live, 0, CLASSES), BLOCK)
    report(parts, slots, loss, row, view, batch, live, known, w, hard, soft, ce, total, agree, limit, WEIGHTED, REPORT)
    if grad_o is not None and HARD:
        store_target(
            grad, label, live & known, slots, z_y, t_y, h_y, c, c_t, to_z, to_t, a, b, d, even, level, middle,
            along, by_q, by_p, hard * scaled * (1.0 - smoothing), own, POWER, METHOD, SMOOTH,
        )  # fmt: skip
