"""The loss of rows that registers hold, C ≤ 8192: one row of one view per program, 32 logits a lane.

A pair of elements costs what it must: two loads, three exponentials (two where T is 1, 2 or 4), the sums, and three
multiply-adds for the gradient. Nothing in the tile knows of the target: its own element is stored once more, from
scalars, when the row is written. `kernels.loss.terms` has the forms, `kernels.reference` is the specification.
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
def _spread(tile, top, inside, scale, CLASSES: tl.constexpr):
    """`inverse_deviation` of a row; from its `top`, beside which an offset of all logits is nothing."""
    mean = tl.sum(tl.where(inside, tile - top, 0.0), 0) / CLASSES
    away = tl.where(inside, tile - top - mean, 0.0)
    return inverse_deviation(tl.sum(away * away, 0), top + mean, scale, CLASSES)


@triton.jit
def row_loss(
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
    """Row program_id(0) of view program_id(1): its gradient unless `grad_*` are None, and what `REPORT` says of it.

    Rows may be read up to `READ_*` and gradients written up to `WRITE` columns: where the distance between rows leaves
    room, multiples of 8, so that an odd C is still read and written in vectors. `index`: the teacher's row of each
    student's, or None. `hard`, `soft`: factors of one row's CE and KL, times the number of pairs if that comes in
    `count`, or is that of the valid ones, which is `COUNTED` here. View `WEIGHTED` has the weight w: `weight`, the
    cosine of the teacher's rows if `COSINE`, else `same_weight`. Teachers are logits over `unit`. `METHOD`: of
    `terms.METHODS`; `alpha`, `beta`: dkd's. `POWER`: T where e_h is e_q to that power, else 0. `REPORT`: 0 nothing, 1
    the plain forms, 2 the exact ones.
    """
    row = tl.program_id(0).to(tl.int64)
    view = tl.program_id(1)
    at, live = place(row, index, valid)
    student = student_o + row * STRIDE_STUDENT_O
    teacher = teacher_o + at * STRIDE_TEACHER_O + OFFSET_O
    if view == 1:
        student = student_a + row * STRIDE_STUDENT_A
        teacher = teacher_a + at * STRIDE_TEACHER_A + OFFSET_A
    columns = tl.arange(0, BLOCK)
    inside = columns < CLASSES
    read_z, read_t = columns < READ_STUDENT, columns < READ_TEACHER
    if valid is not None:  # other rows are not read
        read_z, read_t = columns < tl.where(live, READ_STUDENT, 0), columns < tl.where(live, READ_TEACHER, 0)
    z = logits(student + columns, read_z, inside, READ_STUDENT > CLASSES or valid is not None, False, COMPUTE)
    t = logits(teacher + columns, read_t, inside, READ_TEACHER > CLASSES or valid is not None, True, COMPUTE)
    scale = teacher_scale(header, at, view, live, unit, STRIDE_HEADER, COMPUTE)
    w = weight_of(
        weight, same_weight, row, view, teacher_o, teacher_a, header, at, live, STRIDE_TEACHER_O, STRIDE_TEACHER_A,
        OFFSET_O, OFFSET_A, STRIDE_HEADER, CLASSES, READ_TEACHER, BLOCK, WEIGHTED, COSINE, COMPUTE,
    )  # fmt: skip
    hard, soft, scaled = row_factors(count, valid, batch, loss_scale, live, hard, soft, COUNTED, COMPUTE)

    HARD: tl.constexpr = target is not None
    zero = tl.full((), 0.0, COMPUTE)
    known, z_y, t_y, h_y = live, zero, zero, zero
    if HARD:
        label, known, hard = target_of(target, row, live, hard, CLASSES)
        z_y = tl.load(student + label, mask=live, other=0).to(COMPUTE)
        t_y = tl.load(teacher + label, mask=live, other=0).to(COMPUTE)
    if METHOD == DKD:
        z, t = tl.where(columns == label, ABSENT, z), tl.where(columns == label, ABSENT, t)
    top_z, top_t = tl.max(z, 0), tl.max(t, 0)
    by_z, varies = 1.0, live
    if METHOD == STANDARDISED:
        by_z, varies = _spread(z, top_z, inside, 1.0, CLASSES)
        by_t, _ = _spread(t, top_t, inside, scale, CLASSES)
        inverse_t, scale = inverse_t * by_z, scale * (by_t / by_z)
    c = tl.full((), LOG2_E, COMPUTE) * inverse_t
    c_t = c * scale
    # Multiplied and added in one rounding: that of top · c is then one factor of all exponentials, and cancels.
    shift_z, shift_t = -top_z * c, -top_t * c_t
    z2, t2 = tl.fma(z, c, shift_z), tl.fma(t, c_t, shift_t)
    e_q, e_p = tl.exp2(z2), tl.exp2(t2)
    e_h = e_q
    if HARD:
        if POWER == 0:
            shift_h = -top_z * LOG2_E
            e_h, h_y = tl.exp2(tl.fma(z, LOG2_E, shift_h)), tl.fma(z_y, LOG2_E, shift_h)
        else:
            e_h, h_y = raised(e_q, POWER), tl.fma(z_y, c, shift_z) * POWER
    sum_h, sum_q, sum_p = tl.sum(e_h, 0), tl.sum(e_q, 0), tl.sum(e_p, 0)
    by_h, by_q, by_p = inverses(sum_h, sum_q, sum_p, HARD)
    level, middle = zero, zero
    if METHOD >= REVERSE:
        level = tl.sum(level_terms(z2, t2, e_q, e_p, by_q, by_p, METHOD), 0)
    if METHOD == STANDARDISED:
        middle = tl.sum(tl.where(inside, z2, 0.0), 0) / CLASSES
    a, b, d, even, along = factors(
        hard, soft, w, scaled, smoothing, inverse_t, c, by_h, by_q, by_p, by_z, varies, level, CLASSES, METHOD
    )  # fmt: skip

    ce, tckd, own = zero, zero, zero
    if METHOD == DKD:
        ce, tckd, own, a, b, d = decouple(
            z_y, t_y, h_y, c, c_t, shift_z, shift_t, sum_h, sum_q, sum_p, a, b, d, even, soft * w * inverse_t * scaled,
            hard * scaled, smoothing, alpha, beta,
        )  # fmt: skip
    kl, rest, flat, same = zero, zero, zero, live
    if REPORT > 0:
        # What the shifts were rounded by is in the sums, but not in the logits.
        apart = LN_2 * (tl.log2(sum_q * by_p) - (tl.fma(top_z, c, shift_z) - tl.fma(top_t, c_t, shift_t)))
        total = tl.sum(
            divergence_terms(z, t, z2, t2, e_q, e_p, by_q, by_p, top_z, top_t, inverse_t, scale, apart, METHOD, REPORT),
            0,
        )
        kl = divergence(total, level, sum_q, sum_p, by_q, by_p, METHOD, REPORT)
        if SMOOTH:
            flat = tl.sum(tl.where(z > ABSENT, z - top_z, 0.0), 0)
        if METHOD == DKD:
            kl = alpha * tckd + beta * kl
            if SMOOTH:
                ce += smoothing * (z_y - top_z - (flat + (z_y - top_z)) / CLASSES)
        elif HARD:
            if REPORT == 2:
                rest = tl.sum(tl.where(columns == label, 0.0, e_h), 0)
            ce = cross_entropy(sum_h, rest, flat, h_y, z_y, top_z, smoothing, CLASSES, REPORT, SMOOTH)
    if parts is not None:
        same = tl.max(tl.where(z == top_z, t, ABSENT), 0) == top_t
        same = agreement(same, z_y, t_y, top_z, top_t, METHOD)

    if grad_o is not None:
        grad = grad_o + row * STRIDE_GRAD_O
        if view == 1:
            grad = grad_a + row * STRIDE_GRAD_A
        g = gradient(
            z2, t2, e_h, e_q, e_p, a, b, d, even, level, middle, along, by_q, by_p, inside, METHOD, HARD, SMOOTH
        )  # fmt: skip
        tl.store(grad + columns, g.to(grad.dtype.element_ty), mask=columns < WRITE)
    report(parts, slots, loss, row, view, batch, live, known, w, hard, soft, ce, kl, same, limit, WEIGHTED, REPORT)
    if grad_o is not None and HARD:
        store_target(
            grad, label, live & known, slots, z_y, t_y, h_y, c, c_t, shift_z, shift_t, a, b, d, even, level, middle,
            along, by_q, by_p, hard * scaled * (1.0 - smoothing), own, POWER, METHOD, SMOOTH,
        )  # fmt: skip
