"""The forms of the loss's terms, for the kernels of short and of long rows. `kernels.reference` is the specification.

Exponentials are of base 2: e_q = exp2(z·c + shift) with c = log2(e)/T and shift = −top·c, e_p likewise of the teacher,
and e_h of the student at T = 1, which is e_q squared 0, 1 or 2 times at T = 1, 2 and 4. Sums S_h, S_q, S_p of them:

    plain   CE = ln2·(log2 S_h − h),  h the exponent of the target      KL = ln2·(Σ e_p·(t2 − z2) / S_p + log2(S_q/S_p))
    exact   CE = log1p(rest of S_h) where the target is the largest     KL = Σ p·(x + exp(−x) − 1),  x = log p − log q

The plain form is wrong by an amount, not a share: up to 2e-6 in a row's CE and 5e-7 in its KL (2^-22 of one above 2)
on a GPU, whose exp2 is off by 2^-22. The exact one sums only terms ≥ 0, and an error of a sum drops out of it, its
derivative being Σ (p − q) = 0; it costs as much again. Both have the same gradient.
"""

# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (Triton's annotations are those of Python, not of the language inside @triton.jit.)

import triton
import triton.language as tl

# Stands for −inf: exp2 gives 0, and the product with a probability of 0 is 0 instead of NaN.
ABSENT = tl.constexpr(-1e30)
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


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
def raised(exps, POWER: tl.constexpr):
    if POWER > 1:
        exps = exps * exps
    if POWER > 2:
        exps = exps * exps
    return exps


@triton.jit
def log1p(x):
    """log(1 + x) for x ≥ 0: the rounding of 1 + x is undone (Goldberg 1991, theorem 4)."""
    one_plus = 1.0 + x
    lost = one_plus == 1.0
    return tl.where(lost, x, tl.log(one_plus) * (x / tl.where(lost, 1.0, one_plus - 1.0)))


@triton.jit
def exact_kl(z, t, top_z, top_t, e_q, e_p, by_q, by_p, inverse_t, scale, apart):
    """p·(x + exp(−x) − 1) with x = log p − log q and exp(−x) = q/p; `scale` is that of int8 teachers, else 1."""
    # Differences first: of nearly equal rows the exponents' own roundings would be all that is left.
    x = ((t - top_t) * scale - (z - top_z)) * inverse_t + apart
    x = tl.where(x > ABSENT, x, ABSENT)  # also where the teacher's logit is −inf: p = 0 gives 0 and not 0·−inf
    p, q = e_p * by_p, e_q * by_q
    small = tl.abs(x) < 0.5
    y = tl.where(small, x, 0.0)
    # y + exp(−y) − 1 = y²/2·(1 − y/3·(1 − y/4·(…))); what is cut off is below 2^-26 of it.
    series = 1.0 - y * (1.0 / 9)
    for k in tl.static_range(8, 2, -1):
        series = 1.0 - y * (1.0 / k) * series
    return tl.where(small, p * (0.5 * y * y * series), p * (x - 1.0) + q)


@triton.jit
def plain_ce(sum_h, h_y):
    return LN_2 * (tl.log2(sum_h) - h_y)


@triton.jit
def exact_ce(rest, h_y, first):
    """`rest`: the sum without the target's own; `first`: whether the target is the largest."""
    e_y = tl.exp2(h_y)
    near = log1p(rest / tl.where(first, e_y, 1.0))
    return tl.where(first, near, tl.log(rest + e_y) - LN_2 * h_y)


@triton.jit
def plain_kl_terms(e_p, z2, t2):
    return e_p * tl.maximum(t2 - z2, ABSENT)  # where the teacher's logit is −inf 0, not 0·−inf


@triton.jit
def gradient(e_h, e_q, e_p, a, b, d, even, inside, HARD: tl.constexpr, SMOOTH: tl.constexpr):
    """By the student's logits, but for the target's own part; zero where there is no class."""
    g = b * e_q - d * e_p
    if SMOOTH:
        g = tl.where(inside, a * e_h + (b * e_q - (d * e_p + even)), 0.0)
    elif HARD:
        g = a * e_h + (b * e_q - d * e_p)
    return g


@triton.jit
def header_field(pointer, row, live, STRIDE: tl.constexpr, FIELD):
    """A float32 of int8 rows, by halves: rows of an odd number of classes start at any even address."""
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
