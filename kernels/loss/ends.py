"""Both ends of a loss kernel, of short rows and of long ones: what a row is, and what becomes of its sums."""

# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (Triton's annotations are those of Python, not of the language inside @triton.jit.)

import triton
import triton.language as tl

from kernels.loss.terms import (
    ABSENT,
    DKD,
    JSD,
    LN_2,
    REVERSE,
    STANDARDISED,
    decoupled,
    exact_ce,
    gradient,
    plain_ce,
    raised,
)

# Before the passes


@triton.jit
def place(row, index, valid):
    """The teacher's row of a student's, and whether the pair counts."""
    at, live = row, row >= 0
    if index is not None:
        at = tl.load(index + row)
    if valid is not None:
        live = tl.load(valid + row) != 0
    return at, live


@triton.jit
def target_of(target, row, live, hard, CLASSES: tl.constexpr):
    """A row's label, 0 where it is none of the classes, whether it is one of them, and the factor of its CE.

    That is NaN where it is none, and so is the gradient: a step whose loss nobody asks for must not pass silently.
    """
    label = tl.load(target + row, mask=live, other=0).to(tl.int64)
    known = label.to(tl.uint64) < CLASSES
    return tl.where(known, label.to(tl.int32), 0), known, tl.where(known | (live == 0), hard, float("nan"))


@triton.jit
def logits(pointer, read, inside, PADDED: tl.constexpr, TEACHER: tl.constexpr, COMPUTE: tl.constexpr):
    """Logits where `inside`, else what counts for nothing. `PADDED`: whether `read` may reach beyond `inside`.

    float16 has no finite number that small. A teacher's may be −inf, which the forms of KL know; a student's may not.
    """
    if PADDED or pointer.dtype.element_ty == tl.int8 or (pointer.dtype.element_ty == tl.float16 and not TEACHER):
        return tl.where(inside, tl.load(pointer, mask=read, other=0).to(COMPUTE), ABSENT)
    if pointer.dtype.element_ty == tl.float16:
        return tl.load(pointer, mask=read, other=float("-inf")).to(COMPUTE)
    return tl.load(pointer, mask=read, other=ABSENT).to(COMPUTE)


@triton.jit
def header_field(pointer, row, live, STRIDE: tl.constexpr, FIELD):
    """A float32 of int8 codes, by halves: codes of an odd number of classes start at any even address."""
    at = pointer + row * STRIDE + 2 * FIELD
    low = tl.load(at, mask=live, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)
    high = tl.load(at + 1, mask=live, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)
    return (low | (high << 16)).to(tl.float32, bitcast=True)


@triton.jit
def teacher_scale(header, row, view, live, unit, STRIDE: tl.constexpr, COMPUTE: tl.constexpr):
    """Logits per unit of a view's row: see `cache.codec.Int8`. Its offset is nothing to a softmax."""
    scale = tl.full((), 1.0, COMPUTE) * unit
    if header is not None:
        scale = header_field(header, row, live, STRIDE, view).to(COMPUTE)
        scale = tl.where(scale < 1e-20, 1e-20, scale)  # of equal logits it is 0, and padding must stay far below them
    return scale


@triton.jit
def _read(teacher, columns, read, scale, offset, CLASSES: tl.constexpr, COMPUTE: tl.constexpr):
    t = tl.load(teacher + columns, mask=read, other=0).to(COMPUTE)
    return tl.where(columns < CLASSES, t * scale + offset, 0.0)


@triton.jit
def cosine(
    teacher_o, teacher_a, header, row, live,
    STRIDE_O: tl.constexpr, STRIDE_A: tl.constexpr, OFFSET_O: tl.constexpr, OFFSET_A: tl.constexpr,
    STRIDE_HEADER: tl.constexpr, CLASSES: tl.constexpr, READ: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """w of a pair, as `reference.cosine_weight`: norms first, as ½|ô + â|² does not cancel and a product does."""
    o, a = teacher_o + row * STRIDE_O + OFFSET_O, teacher_a + row * STRIDE_A + OFFSET_A
    one = tl.full((), 1.0, COMPUTE)
    scale_o, scale_a, offset_o, offset_a = one, one, 0.0 * one, 0.0 * one
    if header is not None:
        scale_o = header_field(header, row, live, STRIDE_HEADER, 0).to(COMPUTE)
        scale_a = header_field(header, row, live, STRIDE_HEADER, 1).to(COMPUTE)
        offset_o = header_field(header, row, live, STRIDE_HEADER, 2).to(COMPUTE)
        offset_a = header_field(header, row, live, STRIDE_HEADER, 3).to(COMPUTE)
    square_o = tl.zeros((BLOCK,), COMPUTE)
    square_a = tl.zeros((BLOCK,), COMPUTE)
    for start in range(0, CLASSES, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        read = columns < tl.where(live, READ, 0)
        t_o = _read(o, columns, read, scale_o, offset_o, CLASSES, COMPUTE)
        t_a = _read(a, columns, read, scale_a, offset_a, CLASSES, COMPUTE)
        square_o += t_o * t_o
        square_a += t_a * t_a
    norm_o, norm_a = tl.sum(square_o, 0), tl.sum(square_a, 0)
    by_o, by_a = tl.rsqrt(tl.where(norm_o == 0.0, 1.0, norm_o)), tl.rsqrt(tl.where(norm_a == 0.0, 1.0, norm_a))
    both = tl.zeros((BLOCK,), COMPUTE)
    for start in range(0, CLASSES, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        read = columns < tl.where(live, READ, 0)
        t_o = _read(o, columns, read, scale_o, offset_o, CLASSES, COMPUTE)
        t_a = _read(a, columns, read, scale_a, offset_a, CLASSES, COMPUTE)
        units = t_o * by_o + t_a * by_a
        both += units * units
    return tl.where((norm_o == 0.0) | (norm_a == 0.0), 1.0, 0.5 * tl.sum(both, 0))


@triton.jit
def weight_of(
    weight, same_weight, row, view, teacher_o, teacher_a, header, at, live,
    STRIDE_O: tl.constexpr, STRIDE_A: tl.constexpr, OFFSET_O: tl.constexpr, OFFSET_A: tl.constexpr,
    STRIDE_HEADER: tl.constexpr, CLASSES: tl.constexpr, READ: tl.constexpr, BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr, COSINE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """w of a row: of view `WEIGHTED` what was given, or the cosine of the teacher's rows; of the other one 1."""
    w = tl.full((), 1.0, COMPUTE) * same_weight
    if COSINE:
        if view == WEIGHTED:
            w = cosine(
                teacher_o, teacher_a, header, at, live, STRIDE_O, STRIDE_A, OFFSET_O, OFFSET_A, STRIDE_HEADER,
                CLASSES, READ, BLOCK, COMPUTE,
            )  # fmt: skip
    elif weight is not None:
        w = tl.load(weight + row, mask=live, other=0.0).to(COMPUTE)
    if view != WEIGHTED:
        w = tl.full((), 1.0, COMPUTE)
    return w


# Behind them


@triton.jit
def inverses(sum_h, sum_q, sum_p, HARD: tl.constexpr):
    """1/S_h, 1/S_q and 1/S_p by one division, which costs as much as ten products."""
    if HARD:
        by_all = 1.0 / (sum_q * sum_p * sum_h)
        by_h, by_q, by_p = by_all * (sum_q * sum_p), by_all * sum_h * sum_p, by_all * sum_h * sum_q
    else:
        by_all = 1.0 / (sum_q * sum_p)
        by_h, by_q, by_p = by_all, by_all * sum_p, by_all * sum_q
    return by_h, by_q, by_p


@triton.jit
def cross_entropy(
    sum_h, rest, flat, h_y, z_y, top_z, smoothing, CLASSES: tl.constexpr, REPORT: tl.constexpr, SMOOTH: tl.constexpr
):
    """`rest`: the exact form's sum without the target; `flat`: Σ (z − top) of all classes, for smoothing."""
    ce = exact_ce(rest, h_y, z_y == top_z) if REPORT == 2 else plain_ce(sum_h, h_y)
    if SMOOTH:
        ce += smoothing * (z_y - top_z - flat / CLASSES)
    return ce


@triton.jit
def factors(
    hard, soft, w, scaled, smoothing, inverse_t, c, by_h, by_q, by_p, by_z, varies, level,
    CLASSES: tl.constexpr, METHOD: tl.constexpr,
):  # fmt: skip
    """Of `gradient` a, b, d, even and along."""
    b, d = soft * w * inverse_t * scaled * by_q, soft * w * inverse_t * scaled * by_p
    a, even = hard * scaled * by_h, hard * scaled * smoothing / CLASSES
    along = 0.0
    if METHOD == REVERSE:
        b *= LN_2
    if METHOD == JSD:
        b *= 0.5 * LN_2
    if METHOD == STANDARDISED:
        along = tl.where(varies, soft * w * scaled * by_z * by_z * LN_2 * level / (c * CLASSES), 0.0)
    return a, b, d, even, along


@triton.jit
def decouple(
    z_y, t_y, h_y, c, c_t, shift_z, shift_t, sum_h, sum_q, sum_p, a, b, d, even, soft, hard, smoothing, alpha, beta
):
    """Of dkd CE, TCKD, the target's own gradient, and a, b and d of the others', whose sums these are.

    `soft`, `hard`: the factors of the gradient's terms.
    """
    ce, missing, tckd, apart = decoupled(
        h_y, tl.fma(z_y, c, shift_z), tl.fma(t_y, c_t, shift_t), sum_h, sum_q, sum_p
    )  # fmt: skip
    own = soft * alpha * apart + hard * (smoothing - missing) - even
    return ce, tckd, own, a * missing, b * (beta - alpha * apart), d * beta


@triton.jit
def agreement(same, z_y, t_y, top_z, top_t, METHOD: tl.constexpr):
    """Whether a class is the largest of both, where `same` says it of the classes in the tops."""
    if METHOD == DKD:
        same = ((z_y >= top_z) & (t_y >= top_t)) | ((z_y <= top_z) & (t_y <= top_t) & same)
    return same


@triton.jit
def store_target(
    grad, label, wanted, slots, z_y, t_y, h_y, c, c_t, shift_z, shift_t, a, b, d, even, level, middle, along,
    by_q, by_p, hard, own, POWER: tl.constexpr, METHOD: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """After a row's gradient its element at the target: `own`, or that of the others less the `hard` term's one."""
    if slots is None:  # else the ticket has waited for the program's threads
        tl.debug_barrier()
    if METHOD == DKD:
        g_y = own
    else:
        z2, t2 = tl.fma(z_y, c, shift_z), tl.fma(t_y, c_t, shift_t)
        q_y, p_y = tl.exp2(z2), tl.exp2(t2)
        a_y = tl.exp2(h_y) if POWER == 0 else raised(q_y, POWER)
        g_y = gradient(
            z2, t2, a_y, q_y, p_y, a, b, d, even, level, middle, along, by_q, by_p, wanted, METHOD, True, SMOOTH
        ) - hard  # fmt: skip
    tl.store(grad + label, g_y.to(grad.dtype.element_ty), mask=wanted)
