"""The terms of the distillation loss in Triton, for tiles (rows, classes) of logits.

`kernels.reference` is the specification. Everything is computed in float32 and still meets float64, because only
terms are summed that do not cancel:

- Logits lose their maximum first, which rounds nothing away where all are around ±1e4.
- KL = Σ p·(x + exp(−x) − 1) with x = log p − log q. Each term is ≥ 0, and an error in a log-sum-exp shifts every x
  alike and drops out, its derivative being Σ(p − q) = 0. In Σ p·x it stays: 2e-5 of the loss of a student near its
  teacher, measured.
- A cross-entropy near 0 is log(1 + rest), with the target's own exp(0) = 1 kept out of the rest.

At T = 1, 2 and 4 exp(z) is exp(z/T), which the soft term needs anyway, squared 0, 1 or 2 times.
"""

# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (Triton's annotations are those of Python, not of the language inside @triton.jit.)

import triton
import triton.language as tl

# Stands for −inf in padding: exp gives 0, and the difference of two of them is 0 instead of NaN.
_ABSENT = tl.constexpr(-1e30)
_LOG2_E, _LOG2_E_REST, _LN_2 = (
    tl.constexpr(1.4426950216293335),
    tl.constexpr(1.925963033500e-8),
    tl.constexpr(0.6931472),
)


@triton.jit
def _log1p(x):
    """log(1 + x) for x ≥ 0: the rounding of 1 + x is undone (Goldberg 1991, theorem 4)."""
    one_plus = 1.0 + x
    lost = one_plus == 1.0
    return tl.where(lost, x, tl.log(one_plus) * (x / tl.where(lost, 1.0, one_plus - 1.0)))


@triton.jit
def _exp(x):
    """(e, c) with exp(x) = e + e·c for x ≤ 0: c makes up for what the GPU's exp loses in x·log2(e), |x|·2^-24."""
    if x.dtype == tl.float64:
        return tl.exp(x), 0.0 * x
    x = tl.where(x < -120.0, -120.0, x)  # not maximum: a NaN stays
    high = x * _LOG2_E
    low = tl.fma(x, tl.full(x.shape, _LOG2_E, tl.float32), -high) + x * _LOG2_E_REST
    return tl.exp2(high), low * _LN_2


@triton.jit
def _raised(exps, POWER: tl.constexpr):
    if POWER > 1:
        exps = exps * exps
    if POWER > 2:
        exps = exps * exps
    return exps


@triton.jit
def _exps(z, inverse_t, POWER: tl.constexpr):
    """exp(z/T) and exp(z) of shifted logits; `POWER` is T, or 0 where squaring does not lead from one to the other."""
    soft, lost = _exp(z * inverse_t)
    if POWER == 0:
        hard, lost_too = _exp(z)
        return soft + soft * lost, hard + hard * lost_too
    hard = _raised(soft, POWER)
    return soft + soft * lost, hard + hard * (POWER * lost)


@triton.jit
def _log_total(rest, z_target):
    """log Σ exp of shifted logits, with the target's own term apart from the rest."""
    # The largest logit is 0: if the target has it, its exp is the 1 of log1p.
    first = z_target == 0.0
    return tl.where(first, _log1p(rest), tl.log(tl.where(first, 1.0, rest + tl.exp(z_target))))


@triton.jit
def _kl_terms(z, t, p, q, shift, inverse_t):
    """p·(x + exp(−x) − 1) with x = (t − z)/T − shift, so that exp(−x) = q/p."""
    # Finite also where the teacher's logit is −inf, so that p = 0 gives 0 and not 0·−inf.
    x = (t - z) * inverse_t - shift
    x = tl.where(x < _ABSENT, _ABSENT, x)
    small = tl.abs(x) < 1.0
    y = tl.where(small, x, 0.0)
    # y + exp(−y) − 1 = y²/2·(1 − y/3·(1 − y/4·(…))); what is cut off is below 2/12! of it.
    series = 1.0 - y * (1.0 / 11)
    for k in tl.static_range(10, 2, -1):
        series = 1.0 - y * (1.0 / k) * series
    return tl.where(small, p * (0.5 * y * y * series), p * (x - 1.0) + q)


@triton.jit
def _header_field(pointer, row, live, STRIDE: tl.constexpr, FIELD: tl.constexpr):
    """A float32, by halves: rows of an odd number of classes start at any even address."""
    at = pointer + row * STRIDE + 2 * FIELD
    low = tl.load(at, mask=live, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)
    high = tl.load(at + 1, mask=live, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)
    return (low | (high << 16)).to(tl.float32, bitcast=True)


@triton.jit
def header_fields(pointer, row, live, STRIDE: tl.constexpr, VIEW: tl.constexpr, COMPUTE: tl.constexpr):
    """Scale and offset of one view of int8 rows: see `cache.codec.Int8`."""
    scale = _header_field(pointer, row, live, STRIDE, VIEW)
    shift = _header_field(pointer, row, live, STRIDE, 2 + VIEW)
    return scale.to(COMPUTE), shift.to(COMPUTE)


@triton.jit
def load(pointer, row, columns, inside, STRIDE: tl.constexpr, OFFSET: tl.constexpr, COMPUTE: tl.constexpr):
    return tl.load(pointer + row * STRIDE + columns + OFFSET, mask=inside, other=0).to(COMPUTE)


@triton.jit
def unit(o, a, square_o, square_a):
    """ô + â of rows whose sums of squares are given."""
    return o * tl.rsqrt(tl.where(square_o == 0.0, 1.0, square_o)) + a * tl.rsqrt(
        tl.where(square_a == 0.0, 1.0, square_a)
    )


@triton.jit
def row_factors(count, valid, batch, hard, soft, COUNTED: tl.constexpr, BLOCK: tl.constexpr = 1024):
    """The factors of one row's CE and KL, over the number of pairs if that is on the device.

    Every program counts the valid pairs, if it is them: a byte per pair, which a launch of its own costs more than.
    """
    if COUNTED or count is not None:
        if COUNTED:
            there = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, batch, BLOCK):
                at = start + tl.arange(0, BLOCK)
                there += (tl.load(valid + at, mask=at < batch, other=0) != 0).to(tl.int32)
            pairs = tl.sum(there, 0).to(tl.float32)
        else:
            pairs = tl.load(count).to(tl.float32)
        pairs = tl.where(pairs == 0.0, 1.0, pairs)  # of no pairs the loss is 0
        hard, soft = hard / pairs, soft / pairs
    return hard, soft


@triton.jit
def store_parts(parts, row, stride, mask, live, total, ce_o, ce_a, kl_o, kl_a, w, agree_o, agree_a):
    """One row of `kernels.loss.autograd.PARTS` per quantity; those of dead pairs are zero."""
    tl.store(parts + row, tl.where(live, total, 0.0), mask=mask)
    tl.store(parts + stride + row, tl.where(live, ce_o, 0.0), mask=mask)
    tl.store(parts + 2 * stride + row, tl.where(live, ce_a, 0.0), mask=mask)
    tl.store(parts + 3 * stride + row, tl.where(live, kl_o, 0.0), mask=mask)
    tl.store(parts + 4 * stride + row, tl.where(live, kl_a, 0.0), mask=mask)
    tl.store(parts + 5 * stride + row, tl.where(live, w, 0.0), mask=mask)
    tl.store(parts + 6 * stride + row, tl.where(live, agree_o, 0.0), mask=mask)
    tl.store(parts + 7 * stride + row, tl.where(live, agree_a, 0.0), mask=mask)


@triton.jit
def add_shares(shares, loss, pairs, BLOCK: tl.constexpr = 1024):
    """The loss, f32, as a float64 sum of the pairs' shares in one order."""
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, pairs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums += tl.load(shares + at, mask=at < pairs, other=0.0).to(tl.float64)
    tl.store(loss, tl.sum(sums, 0))


@triton.jit
def add_shares_last(ticket, shares, loss, pairs):
    """`add_shares` by the program that finds the others' done: the one that draws the last number of the `ticket`."""
    tl.debug_barrier()  # every thread's share is written
    if tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        add_shares(shares, loss, pairs)


@triton.jit
def whole_rows(
    z, t, is_target, inside, inverse_t, smoothing, CLASSES: tl.constexpr, POWER: tl.constexpr, SMOOTH: tl.constexpr
):
    """CE, KL, agreement (rows, 1) and their derivatives by z, softmax(z) − e_target and T times q − p."""
    z = tl.where(inside, z, _ABSENT)
    t = tl.where(inside, t, _ABSENT)
    z = z - tl.max(z, 1, keep_dims=True)
    t = t - tl.max(t, 1, keep_dims=True)
    exp_q, exps = _exps(z, inverse_t, POWER)
    exp_p = tl.exp(t * inverse_t)
    rest = tl.sum(tl.where(is_target, 0.0, exps), 1, keep_dims=True)
    z_target = tl.sum(tl.where(is_target, z, 0.0), 1, keep_dims=True)
    total = tl.sum(exps, 1, keep_dims=True)
    ce = _log_total(rest, z_target)
    hard = exps * (1.0 / total) - tl.where(is_target, 1.0, 0.0)
    if SMOOTH:  # every term ≥ 0
        mean = tl.sum(tl.where(inside, z, 0.0), 1, keep_dims=True) / CLASSES
        ce = ce - (1.0 - smoothing) * z_target - smoothing * mean
        hard = hard + smoothing * (tl.where(is_target, 1.0, 0.0) - 1.0 / CLASSES)
    else:
        ce = ce - z_target
    sum_q = tl.sum(exp_q, 1, keep_dims=True)
    sum_p = tl.sum(exp_p, 1, keep_dims=True)
    q = exp_q * (1.0 / sum_q)
    p = exp_p * (1.0 / sum_p)
    kl = tl.sum(_kl_terms(z, t, p, q, tl.log(sum_p / sum_q), inverse_t), 1, keep_dims=True)
    agree = tl.max(tl.where((z == 0.0) & (t == 0.0), 1.0, 0.0), 1, keep_dims=True)
    return ce, kl, agree, hard, q - p


@triton.jit
def _read(
    student, teacher, row, start, live, scale, shift,
    STRIDE_STUDENT: tl.constexpr, STRIDE_TEACHER: tl.constexpr, OFFSET: tl.constexpr,
    CLASSES: tl.constexpr, READ_STUDENT: tl.constexpr, READ_TEACHER: tl.constexpr,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """A tile (1, BLOCK) of student and teacher, its columns, and which of them are there."""
    columns = start + tl.arange(0, BLOCK)[None, :]
    inside = (columns < CLASSES) & live
    z = load(student, row, columns, (columns < READ_STUDENT) & live, STRIDE_STUDENT, 0, COMPUTE)
    t = load(teacher, row, columns, (columns < READ_TEACHER) & live, STRIDE_TEACHER, OFFSET, COMPUTE) * scale + shift
    return tl.where(inside, z, _ABSENT), tl.where(inside, t, _ABSENT), columns, inside


@triton.jit
def _totals(
    student, teacher, row, live, scale, shift, label, inverse_t,
    STRIDE_STUDENT: tl.constexpr, STRIDE_TEACHER: tl.constexpr, OFFSET: tl.constexpr,
    CLASSES: tl.constexpr, READ_STUDENT: tl.constexpr, READ_TEACHER: tl.constexpr,
    BLOCK: tl.constexpr, POWER: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """First pass over a view: largest logits and sums of exponentials, each (1, 1); Σ exp(z) without the target's."""
    top_z = tl.full((1, 1), _ABSENT, COMPUTE)
    top_t = tl.full((1, 1), _ABSENT, COMPUTE)
    rest = tl.zeros((1, BLOCK), COMPUTE)
    sum_q = tl.zeros((1, BLOCK), COMPUTE)
    sum_p = tl.zeros((1, BLOCK), COMPUTE)
    for start in range(0, CLASSES, BLOCK):
        z, t, columns, _ = _read(
            student, teacher, row, start, live, scale, shift,
            STRIDE_STUDENT, STRIDE_TEACHER, OFFSET, CLASSES, READ_STUDENT, READ_TEACHER, BLOCK, COMPUTE,
        )  # fmt: skip
        new_z = tl.maximum(top_z, tl.max(z, 1, keep_dims=True))
        new_t = tl.maximum(top_t, tl.max(t, 1, keep_dims=True))
        less_q, less = _exps(top_z - new_z, inverse_t, POWER)
        exp_q, exps = _exps(z - new_z, inverse_t, POWER)
        rest = rest * less + tl.where(columns == label, 0.0, exps)
        sum_q = sum_q * less_q + exp_q
        sum_p = sum_p * tl.exp((top_t - new_t) * inverse_t) + tl.exp((t - new_t) * inverse_t)
        top_z, top_t = new_z, new_t
    return (
        top_z,
        top_t,
        tl.sum(rest, 1, keep_dims=True),
        tl.sum(sum_q, 1, keep_dims=True),
        tl.sum(sum_p, 1, keep_dims=True),
    )


@triton.jit
def view(
    student, teacher, row, live, here, scale, shift, label, w, grad, inverse_t, hard, soft, grad_scale, smoothing,
    STRIDE_STUDENT: tl.constexpr, STRIDE_TEACHER: tl.constexpr, OFFSET: tl.constexpr, STRIDE_GRAD: tl.constexpr,
    CLASSES: tl.constexpr, READ_STUDENT: tl.constexpr, READ_TEACHER: tl.constexpr, WRITE: tl.constexpr,
    BLOCK: tl.constexpr, POWER: tl.constexpr, SMOOTH: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """CE, KL and agreement of one view of a row, (1, 1) each; stores its gradient unless `grad` is None."""
    # Read here and not picked from a tile: an in-place gradient takes its place later.
    z_target = tl.load(student + row * STRIDE_STUDENT + label, mask=live & (label >= 0) & (label < CLASSES), other=0.0)
    top_z, top_t, rest, sum_q, sum_p = _totals(
        student, teacher, row, live, scale, shift, label, inverse_t,
        STRIDE_STUDENT, STRIDE_TEACHER, OFFSET, CLASSES, READ_STUDENT, READ_TEACHER, BLOCK, POWER, COMPUTE,
    )  # fmt: skip
    z_target = tl.where(live, z_target.to(COMPUTE) - top_z, 0.0)
    log_total = _log_total(rest, z_target)
    by_total = 1.0 / (rest + tl.exp(z_target))
    by_q, by_p, apart = 1.0 / sum_q, 1.0 / sum_p, tl.log(sum_p / sum_q)
    kl = tl.zeros((1, BLOCK), COMPUTE)
    agree = tl.zeros((1, BLOCK), COMPUTE)
    sum_z = tl.zeros((1, BLOCK), COMPUTE)
    hard, by_t = hard * grad_scale, soft * grad_scale * inverse_t * w
    for start in range(0, CLASSES, BLOCK):
        z, t, columns, inside = _read(
            student, teacher, row, start, live, scale, shift,
            STRIDE_STUDENT, STRIDE_TEACHER, OFFSET, CLASSES, READ_STUDENT, READ_TEACHER, BLOCK, COMPUTE,
        )  # fmt: skip
        z, t = z - top_z, t - top_t
        exp_q = tl.exp(z * inverse_t)
        p, q = tl.exp(t * inverse_t) * by_p, exp_q * by_q
        kl += _kl_terms(z, t, p, q, apart, inverse_t)
        agree = tl.maximum(agree, tl.where((z == 0.0) & (t == 0.0), 1.0, 0.0))
        if SMOOTH:
            sum_z += tl.where(inside, z, 0.0)
        if grad is not None:
            is_target = tl.where(columns == label, 1.0, 0.0)
            exps = tl.exp(z) if POWER == 0 else _raised(exp_q, POWER)
            d_hard = exps * by_total - is_target
            if SMOOTH:
                d_hard += smoothing * (is_target - 1.0 / CLASSES)
            d = tl.where(inside, hard * d_hard + by_t * (q - p), 0.0).to(grad.dtype.element_ty)
            tl.store(
                grad + row * STRIDE_GRAD + columns, d, mask=(columns < CLASSES) & here, eviction_policy="evict_first"
            )
    if SMOOTH:  # every term ≥ 0
        ce = log_total - (1.0 - smoothing) * z_target - smoothing * tl.sum(sum_z, 1, keep_dims=True) / CLASSES
    else:
        ce = log_total - z_target
    return ce, tl.sum(kl, 1, keep_dims=True), tl.max(agree, 1, keep_dims=True)


@triton.jit
def cosine(
    teacher_o, teacher_a, row, live, scale_o, scale_a, shift_o, shift_a,
    STRIDE_O: tl.constexpr, STRIDE_A: tl.constexpr, OFFSET_O: tl.constexpr, OFFSET_A: tl.constexpr,
    CLASSES: tl.constexpr, READ_TEACHER: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """w (1, 1) as `reference.cosine_weight` takes it: norms first, as ½|ô + â|² does not cancel and a product does."""
    square_o = tl.zeros((1, BLOCK), COMPUTE)
    square_a = tl.zeros((1, BLOCK), COMPUTE)
    for start in range(0, CLASSES, BLOCK):
        columns = start + tl.arange(0, BLOCK)[None, :]
        inside = (columns < CLASSES) & live
        read = (columns < READ_TEACHER) & live
        o = load(teacher_o, row, columns, read, STRIDE_O, OFFSET_O, COMPUTE) * scale_o + shift_o
        a = load(teacher_a, row, columns, read, STRIDE_A, OFFSET_A, COMPUTE) * scale_a + shift_a
        square_o += tl.where(inside, o * o, 0.0)
        square_a += tl.where(inside, a * a, 0.0)
    norm_o = tl.sum(square_o, 1, keep_dims=True)
    norm_a = tl.sum(square_a, 1, keep_dims=True)
    both = tl.zeros((1, BLOCK), COMPUTE)
    for start in range(0, CLASSES, BLOCK):
        columns = start + tl.arange(0, BLOCK)[None, :]
        inside = (columns < CLASSES) & live
        read = (columns < READ_TEACHER) & live
        o = load(teacher_o, row, columns, read, STRIDE_O, OFFSET_O, COMPUTE) * scale_o + shift_o
        a = load(teacher_a, row, columns, read, STRIDE_A, OFFSET_A, COMPUTE) * scale_a + shift_a
        units = unit(o, a, norm_o, norm_a)
        both += tl.where(inside, units * units, 0.0)
    w = 0.5 * tl.sum(both, 1, keep_dims=True)
    return tl.where((norm_o == 0.0) | (norm_a == 0.0), 1.0, w)
