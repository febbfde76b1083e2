"""The distillation loss in Triton: loss and gradient of pairs of rows in one go; launched by `kernels.loss.autograd`.

`one_pass` holds whole rows in registers; `two_pass` reads them twice, the second time from L2. Both work on tiles
(rows, classes), so that their terms, `kernels.loss.terms_gpu`, look alike. Teachers are dense in any dtype, or int8
rows with a header of scale and offset; `OFFSET_*` is where a view's logits start behind an aligned pointer.

Every sum has one order, so that the same bits come out every run. The pairs' shares of the loss are added by
`total_of`, or, where `ticket` is given, by the program that draws its last number: an integer, the only thing that
programs touch at once.
"""

# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (Triton's annotations are those of Python, not of the language inside @triton.jit.)

import triton
import triton.language as tl

from kernels.loss.terms_gpu import (
    add_shares,
    add_shares_last,
    cosine,
    header_fields,
    load,
    row_factors,
    store_parts,
    unit,
    view,
    whole_rows,
)


@triton.jit
def one_pass(
    student_o, student_a, teacher_o, teacher_a, header, target, weight, valid, count, loss_scale,
    parts, grad_o, grad_a, ticket, loss,
    batch, inverse_t, hard, soft, same_weight, smoothing,
    STRIDE_STUDENT_O: tl.constexpr, STRIDE_STUDENT_A: tl.constexpr,
    STRIDE_TEACHER_O: tl.constexpr, STRIDE_TEACHER_A: tl.constexpr,
    STRIDE_HEADER: tl.constexpr, OFFSET_O: tl.constexpr, OFFSET_A: tl.constexpr,
    STRIDE_GRAD_O: tl.constexpr, STRIDE_GRAD_A: tl.constexpr,
    CLASSES: tl.constexpr, READ_STUDENT: tl.constexpr, READ_TEACHER: tl.constexpr, WRITE: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, POWER: tl.constexpr,
    COSINE: tl.constexpr, SMOOTH: tl.constexpr, COUNTED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """`ROWS` pairs per program, each of `BLOCK` ≥ C classes: parts, and the gradients unless they are None.

    Rows may be read up to `READ_*` and gradients written up to `WRITE` columns: where the distance between rows leaves
    room, multiples of 8, so that an odd C is still read and written in vectors.
    `hard`, `soft`: factors of one row's CE and KL, times the number of pairs if that comes in `count`, or is that of
    the valid ones if `COUNTED`. w is `weight`, the cosine of the teacher's rows if `COSINE`, else `same_weight`. With a
    `ticket`, 0 so far, the last program adds the pairs' shares up.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    here = row < batch
    live = here
    if valid is not None:
        live = here & (tl.load(valid + row, mask=here, other=0) != 0)
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (columns < CLASSES) & live
    label = tl.load(target + row, mask=live, other=0).to(tl.int64)
    is_target = columns == label

    read = (columns < READ_TEACHER) & live
    t_o = load(teacher_o, row, columns, read, STRIDE_TEACHER_O, OFFSET_O, COMPUTE)
    t_a = load(teacher_a, row, columns, read, STRIDE_TEACHER_A, OFFSET_A, COMPUTE)
    read = (columns < READ_STUDENT) & live
    z_o = load(student_o, row, columns, read, STRIDE_STUDENT_O, 0, COMPUTE)
    z_a = load(student_a, row, columns, read, STRIDE_STUDENT_A, 0, COMPUTE)
    if header is not None:
        scale_o, shift_o = header_fields(header, row, live, STRIDE_HEADER, 0, COMPUTE)
        scale_a, shift_a = header_fields(header, row, live, STRIDE_HEADER, 1, COMPUTE)
        t_o, t_a = t_o * scale_o + shift_o, t_a * scale_a + shift_a
    if COSINE:
        o = tl.where(inside, t_o, 0.0)
        a = tl.where(inside, t_a, 0.0)
        square_o = tl.sum(o * o, 1, keep_dims=True)
        square_a = tl.sum(a * a, 1, keep_dims=True)
        both = unit(o, a, square_o, square_a)
        w = 0.5 * tl.sum(both * both, 1, keep_dims=True)
        w = tl.where((square_o == 0.0) | (square_a == 0.0), 1.0, w)
    elif weight is not None:
        w = tl.load(weight + row, mask=live, other=0.0).to(COMPUTE)
    else:
        w = tl.full((ROWS, 1), 0.0, COMPUTE) + same_weight

    ce_o, kl_o, agree_o, hard_o, soft_o = whole_rows(
        z_o, t_o, is_target, inside, inverse_t, smoothing, CLASSES, POWER, SMOOTH
    )
    ce_a, kl_a, agree_a, hard_a, soft_a = whole_rows(
        z_a, t_a, is_target, inside, inverse_t, smoothing, CLASSES, POWER, SMOOTH
    )
    hard, soft = row_factors(count, valid, batch, hard, soft, COUNTED)
    total = hard * (ce_o + ce_a) + soft * (kl_o + w * kl_a)
    total = tl.where((label >= 0) & (label < CLASSES), total, float("nan"))
    store_parts(parts, row, batch, here, live, total, ce_o, ce_a, kl_o, kl_a, w, agree_o, agree_a)
    if grad_o is not None:
        if loss_scale is not None:
            scale = tl.load(loss_scale).to(tl.float32)
            hard, soft = hard * scale, soft * scale
        by_t = soft * inverse_t
        stored = (columns < WRITE) & here
        d_o = tl.where(inside, hard * hard_o + by_t * soft_o, 0.0)
        d_a = tl.where(inside, hard * hard_a + by_t * w * soft_a, 0.0)
        tl.store(grad_o + row * STRIDE_GRAD_O + columns, d_o.to(grad_o.dtype.element_ty), mask=stored)
        tl.store(grad_a + row * STRIDE_GRAD_A + columns, d_a.to(grad_a.dtype.element_ty), mask=stored)
    if ticket is not None:
        add_shares_last(ticket, parts, loss, batch)


@triton.jit
def two_pass(
    student_o, student_a, teacher_o, teacher_a, header, target, weight, valid, count, loss_scale,
    parts, grad_o, grad_a, ticket, loss,
    batch, inverse_t, hard, soft, same_weight, smoothing,
    STRIDE_STUDENT_O: tl.constexpr, STRIDE_STUDENT_A: tl.constexpr,
    STRIDE_TEACHER_O: tl.constexpr, STRIDE_TEACHER_A: tl.constexpr,
    STRIDE_HEADER: tl.constexpr, OFFSET_O: tl.constexpr, OFFSET_A: tl.constexpr,
    STRIDE_GRAD_O: tl.constexpr, STRIDE_GRAD_A: tl.constexpr,
    CLASSES: tl.constexpr, READ_STUDENT: tl.constexpr, READ_TEACHER: tl.constexpr, WRITE: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, POWER: tl.constexpr,
    COSINE: tl.constexpr, SMOOTH: tl.constexpr, COUNTED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """As `one_pass`, one pair per program, `BLOCK` classes at a time."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)[:, None]
    here = row < batch
    live = here
    if valid is not None:
        live = here & (tl.load(valid + row, mask=here, other=0) != 0)
    label = tl.load(target + row, mask=live, other=0).to(tl.int64)
    one = tl.full((1, 1), 1.0, COMPUTE)
    scale_o, scale_a, shift_o, shift_a = one, one, 0.0 * one, 0.0 * one
    if header is not None:
        scale_o, shift_o = header_fields(header, row, live, STRIDE_HEADER, 0, COMPUTE)
        scale_a, shift_a = header_fields(header, row, live, STRIDE_HEADER, 1, COMPUTE)
    if COSINE:
        w = cosine(
            teacher_o, teacher_a, row, live, scale_o, scale_a, shift_o, shift_a,
            STRIDE_TEACHER_O, STRIDE_TEACHER_A, OFFSET_O, OFFSET_A, CLASSES, READ_TEACHER, BLOCK, COMPUTE,
        )  # fmt: skip
    elif weight is not None:
        w = tl.load(weight + row, mask=live, other=0.0).to(COMPUTE)
    else:
        w = same_weight * one
    hard, soft = row_factors(count, valid, batch, hard, soft, COUNTED)
    grad_scale = one
    if loss_scale is not None:
        grad_scale = one * tl.load(loss_scale).to(tl.float32)
    ce_o, kl_o, agree_o = view(
        student_o, teacher_o, row, live, here, scale_o, shift_o, label, one, grad_o,
        inverse_t, hard, soft, grad_scale, smoothing,
        STRIDE_STUDENT_O, STRIDE_TEACHER_O, OFFSET_O, STRIDE_GRAD_O,
        CLASSES, READ_STUDENT, READ_TEACHER, WRITE, BLOCK, POWER, SMOOTH, COMPUTE,
    )  # fmt: skip
    ce_a, kl_a, agree_a = view(
        student_a, teacher_a, row, live, here, scale_a, shift_a, label, w, grad_a,
        inverse_t, hard, soft, grad_scale, smoothing,
        STRIDE_STUDENT_A, STRIDE_TEACHER_A, OFFSET_A, STRIDE_GRAD_A,
        CLASSES, READ_STUDENT, READ_TEACHER, WRITE, BLOCK, POWER, SMOOTH, COMPUTE,
    )  # fmt: skip
    total = hard * (ce_o + ce_a) + soft * (kl_o + w * kl_a)
    total = tl.where((label >= 0) & (label < CLASSES), total, float("nan"))
    store_parts(parts, row, batch, here, live, total, ce_o, ce_a, kl_o, kl_a, w, agree_o, agree_a)
    if ticket is not None:
        add_shares_last(ticket, parts, loss, batch)


@triton.jit
def total_of(shares, loss, pairs):
    """The loss where no ticket is used. One program."""
    add_shares(shares, loss, pairs)


@triton.jit
def rescale(
    grad_o,
    grad_a,
    out_o,
    out_a,
    incoming,
    stored,
    size,
    IN_PLACE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients f32 or 16-bit (size,) of both students times incoming / stored, two device scalars.

    In place nothing is read or written if that is 1: a plain `loss.backward()` costs an empty launch.
    """
    factor = tl.load(incoming).to(COMPUTE)
    if stored is not None:
        factor = factor / tl.load(stored).to(COMPUTE)
    wanted = True
    if IN_PLACE:
        wanted = factor != 1.0
    if wanted:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, step):
            at = start + tl.arange(0, BLOCK)
            inside = at < size
            o = tl.load(grad_o + at, mask=inside, other=0.0).to(COMPUTE) * factor
            a = tl.load(grad_a + at, mask=inside, other=0.0).to(COMPUTE) * factor
            tl.store(out_o + at, o.to(out_o.dtype.element_ty), mask=inside)
            tl.store(out_a + at, a.to(out_a.dtype.element_ty), mask=inside)
