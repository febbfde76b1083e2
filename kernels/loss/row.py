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

from kernels.loss.finish import report, row_factors
from kernels.loss.terms import (
    ABSENT,
    LN_2,
    LOG2_E,
    cosine,
    exact_ce,
    exact_kl,
    gradient,
    logits,
    plain_ce,
    plain_kl_terms,
    raised,
    teacher_scale,
)


@triton.jit
def row_loss(
    student_o, student_a, teacher_o, teacher_a, header, index, target, weight, valid, count, loss_scale,
    grad_o, grad_a, parts, slots, loss,
    batch, inverse_t, hard, soft, same_weight, smoothing, unit, limit,
    STRIDE_STUDENT_O: tl.constexpr, STRIDE_STUDENT_A: tl.constexpr,
    STRIDE_TEACHER_O: tl.constexpr, STRIDE_TEACHER_A: tl.constexpr,
    OFFSET_O: tl.constexpr, OFFSET_A: tl.constexpr, STRIDE_HEADER: tl.constexpr,
    STRIDE_GRAD_O: tl.constexpr, STRIDE_GRAD_A: tl.constexpr,
    CLASSES: tl.constexpr, READ_STUDENT: tl.constexpr, READ_TEACHER: tl.constexpr, WRITE: tl.constexpr,
    BLOCK: tl.constexpr, POWER: tl.constexpr, REPORT: tl.constexpr, WEIGHTED: tl.constexpr,
    COSINE: tl.constexpr, SMOOTH: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Row program_id(0) of view program_id(1): its gradient unless `grad_*` are None, and what `REPORT` says of it.

    Rows may be read up to `READ_*` and gradients written up to `WRITE` columns: where the distance between rows leaves
    room, multiples of 8, so that an odd C is still read and written in vectors. `index`: the teacher's row of each
    student's, or None. `hard`, `soft`: factors of one row's CE and KL, times the number of pairs if that comes in
    `count`. View `WEIGHTED` has the weight w: `weight`, the cosine of the teacher's rows if `COSINE`, else
    `same_weight`. Teachers are logits over `unit`. `REPORT`: 0 nothing, 1 the plain forms, 2 the exact ones.
    """
    row = tl.program_id(0).to(tl.int64)
    view = tl.program_id(1)
    at = row
    if index is not None:
        at = tl.load(index + row)
    student = student_o + row * STRIDE_STUDENT_O
    teacher = teacher_o + at * STRIDE_TEACHER_O + OFFSET_O
    if view == 1:
        student = student_a + row * STRIDE_STUDENT_A
        teacher = teacher_a + at * STRIDE_TEACHER_A + OFFSET_A
    columns = tl.arange(0, BLOCK)
    inside = columns < CLASSES
    live = row >= 0
    read_z, read_t = columns < READ_STUDENT, columns < READ_TEACHER
    if valid is not None:  # other rows are not read
        live = tl.load(valid + row) != 0
        read_z, read_t = columns < tl.where(live, READ_STUDENT, 0), columns < tl.where(live, READ_TEACHER, 0)
    z = logits(student + columns, read_z, inside, READ_STUDENT > CLASSES or valid is not None, False, COMPUTE)
    t = logits(teacher + columns, read_t, inside, READ_TEACHER > CLASSES or valid is not None, True, COMPUTE)
    scale = teacher_scale(header, at, view, live, unit, STRIDE_HEADER, COMPUTE)
    w = tl.full((), 1.0, COMPUTE) * same_weight
    if COSINE:
        if view == WEIGHTED:
            w = cosine(
                teacher_o, teacher_a, header, at, live, STRIDE_TEACHER_O, STRIDE_TEACHER_A, OFFSET_O, OFFSET_A,
                STRIDE_HEADER, CLASSES, READ_TEACHER, BLOCK, COMPUTE,
            )  # fmt: skip
    elif weight is not None:
        w = tl.load(weight + row, mask=live, other=0.0).to(COMPUTE)
    if view != WEIGHTED:
        w = tl.full((), 1.0, COMPUTE)

    c = tl.full((), LOG2_E, COMPUTE) * inverse_t
    c_t = c * scale
    top_z, top_t = tl.max(z, 0), tl.max(t, 0)
    # Multiplied and added in one rounding: that of top · c is then one factor of all exponentials, and cancels.
    shift_z, shift_t = -top_z * c, -top_t * c_t
    z2, t2 = tl.fma(z, c, shift_z), tl.fma(t, c_t, shift_t)
    e_q, e_p = tl.exp2(z2), tl.exp2(t2)
    sum_q, sum_p = tl.sum(e_q, 0), tl.sum(e_p, 0)
    hard, soft, scaled = row_factors(count, loss_scale, live, hard, soft, COMPUTE)
    ce, known, h_y = tl.full((), 0.0, COMPUTE), live, tl.full((), 0.0, COMPUTE)
    if target is not None:
        label = tl.load(target + row, mask=live, other=0).to(tl.int64)
        known = label.to(tl.uint64) < CLASSES
        label = tl.where(known, label.to(tl.int32), 0)
        z_y = tl.load(student + label, mask=live, other=0).to(COMPUTE)
        t_y = tl.load(teacher + label, mask=live, other=0).to(COMPUTE)
        if POWER == 0:
            shift_h = -top_z * LOG2_E
            e_h, h_y = tl.exp2(tl.fma(z, LOG2_E, shift_h)), tl.fma(z_y, LOG2_E, shift_h)
        else:
            e_h, h_y = raised(e_q, POWER), tl.fma(z_y, c, shift_z) * POWER
        sum_h = tl.sum(e_h, 0)
        by_all = 1.0 / (sum_q * sum_p * sum_h)  # a division costs as much as ten products
        by_h, by_q, by_p = by_all * (sum_q * sum_p), by_all * sum_h * sum_p, by_all * sum_h * sum_q
        if REPORT == 1:
            ce = plain_ce(sum_h, h_y)
        if REPORT == 2:
            ce = exact_ce(tl.sum(tl.where(columns == label, 0.0, e_h), 0), h_y, z_y == top_z)
        if SMOOTH and REPORT > 0:
            ce += smoothing * (z_y - top_z - tl.sum(tl.where(inside, z - top_z, 0.0), 0) / CLASSES)
    else:
        by_all = 1.0 / (sum_q * sum_p)
        by_h, by_q, by_p = by_all, by_all * sum_p, by_all * sum_q
        e_h = e_q
    kl, same = tl.full((), 0.0, COMPUTE), live
    if REPORT == 1:
        kl = LN_2 * (tl.sum(plain_kl_terms(e_p, z2, t2), 0) * by_p + tl.log2(sum_q * by_p))
    if REPORT == 2:
        # What the shifts were rounded by is in the sums, but not in the logits.
        apart = LN_2 * (tl.log2(sum_q * by_p) - (tl.fma(top_z, c, shift_z) - tl.fma(top_t, c_t, shift_t)))
        kl = tl.sum(exact_kl(z, t, top_z, top_t, e_q, e_p, by_q, by_p, inverse_t, scale, apart), 0)
    if parts is not None:
        same = tl.max(tl.where(z == top_z, t, ABSENT), 0) == top_t

    if grad_o is not None:
        grad = grad_o + row * STRIDE_GRAD_O
        if view == 1:
            grad = grad_a + row * STRIDE_GRAD_A
        b, d = soft * w * inverse_t * scaled * by_q, soft * w * inverse_t * scaled * by_p
        a, even = hard * scaled * by_h, hard * scaled * smoothing / CLASSES
        g = gradient(e_h, e_q, e_p, a, b, d, even, inside, target is not None, SMOOTH)
        tl.store(grad + columns, g.to(grad.dtype.element_ty), mask=columns < WRITE)
    report(parts, slots, loss, row, view, batch, live, known, w, hard, soft, ce, kl, same, limit, WEIGHTED, REPORT)
    if grad_o is not None and target is not None:  # after the row, its element at the target
        if slots is None:  # else the ticket has waited for the program's threads
            tl.debug_barrier()
        q_y, p_y = tl.exp2(tl.fma(z_y, c, shift_z)), tl.exp2(tl.fma(t_y, c_t, shift_t))
        a_y = tl.exp2(h_y) if POWER == 0 else raised(q_y, POWER)
        g_y = gradient(a_y, q_y, p_y, a, b, d, even, live, True, SMOOTH) - hard * scaled * (1.0 - smoothing)
        tl.store(grad + label, g_y.to(grad.dtype.element_ty), mask=live & known)
