"""The forms of the loss's terms, for the kernels of short and of long rows. `kernels.reference` is the specification.

Exponentials are of base 2: e_q = exp2(z·c + shift) with c = log2(e)/T and shift = −top·c, e_p likewise of the teacher,
and e_h of the student at T = 1, which is e_q squared 0, 1 or 2 times at T = 1, 2 and 4. Sums S_h, S_q, S_p of them:

    plain   CE = ln2·(log2 S_h − h),  h the exponent of the target      KL = ln2·(Σ e_p·(t2 − z2) / S_p + log2(S_q/S_p))
    exact   CE = log1p(rest of S_h) where the target is the largest     KL = Σ p·(x + exp(−x) − 1),  x = log p − log q

The plain form is wrong by an amount, not a share: up to 2e-6 in a row's CE and 5e-7 in its KL (2^-22 of one above 2)
on a GPU, whose exp2 is off by 2^-22. The exact one sums only terms ≥ 0, and an error of a sum drops out of it, its
derivative being Σ (p − q) = 0; it costs as much again. Both have the same gradient.

Other methods are these forms on other rows, or need one more sum, the `level`, before the gradient:

    dkd            the row without its target, whose own element and factors are scalars: `decoupled`
    reverse        level = Σ q·(z2 − t2), and the gradient is q·(z2 − t2 − level)
    jsd            level = Σ q·log2(q/m) with m = (p + q)/2, and the gradient is ½·q·(log2(q/m) − level)
    standardised   1/T and the teacher's scale take the rows' deviations; level = Σ (q − p)·z2 is the student's own
"""

# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportAssignmentType=false
# (Triton's annotations are those of Python, not of the language inside @triton.jit.)

import triton
import triton.language as tl

# Stands for −inf: exp2 gives 0, and the product with a probability of 0 is 0 instead of NaN.
ABSENT = tl.constexpr(-1e30)
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)

METHODS = ("kd", "dkd", "reverse", "jsd", "standardised")
"""A kernel's `METHOD` is the index of its name; from reverse on they have a level."""
KD, DKD, REVERSE, JSD, STANDARDISED = (tl.constexpr(number) for number in range(len(METHODS)))


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
def softplus(x):
    return tl.maximum(x, 0.0) + log1p(tl.exp2(-tl.abs(x) * LOG2_E))


@triton.jit
def sigmoid(x):
    less = tl.exp2(-tl.abs(x) * LOG2_E)
    return tl.where(x > 0, 1.0, less) / (1.0 + less)


@triton.jit
def log_ratio(z, t, top_z, top_t, inverse_t, scale, apart):
    """x = log p − log q; `scale` is that of the teacher's logits.

    Differences first: of nearly equal rows the exponents' own roundings would be all that is left.
    """
    x = ((t - top_t) * scale - (z - top_z)) * inverse_t + apart
    return tl.where(x > ABSENT, x, ABSENT)  # also where the teacher's logit is −inf: p = 0 gives 0 and not 0·−inf


@triton.jit
def exact_kl(x, p, q):
    """p·(x + exp(−x) − 1) with x = log p − log q and exp(−x) = q/p."""
    small = tl.abs(x) < 0.5
    y = tl.where(small, x, 0.0)
    # y + exp(−y) − 1 = y²/2·(1 − y/3·(1 − y/4·(…))); what is cut off is below 2^-26 of it.
    series = 1.0 - y * (1.0 / 9)
    for k in tl.static_range(8, 2, -1):
        series = 1.0 - y * (1.0 / k) * series
    return tl.where(small, p * (0.5 * y * y * series), p * (x - 1.0) + q)


@triton.jit
def against_mean(exponent, by, both):
    """log2(q/m) of q = by·2^exponent and m = both/2, where `both` is the sum of q and p; finite where it is nothing."""
    return tl.maximum(exponent, ABSENT) + (1.0 + tl.log2(by)) - tl.log2(tl.maximum(both, 1e-37))


@triton.jit
def exact_jsd(x, p, q):
    """½·(p·log(p/m) + q·log(q/m)) = m·D(r), r = (p − q)/(p + q) = tanh(x/2)."""
    small = tl.abs(x) < 0.5
    y = tl.where(small, 0.5 * x, 0.0)
    y2 = y * y
    r = y * (1.0 - y2 * (1.0 / 3 - y2 * (2.0 / 15 - y2 * (17.0 / 315 - y2 * (62.0 / 2835)))))
    # D = r²/2 + r⁴/12 + … + r^2k/(2k·(2k − 1)) + …; what is cut off is below 2^-26 of it.
    r2 = r * r
    series = 1.0 / 132 + 0.0 * r2
    for k in tl.static_range(5, 0, -1):
        series = series * r2 + 1.0 / (2 * k * (2 * k - 1))
    by = 2.0 / tl.maximum(p + q, 1e-37)
    far = 0.5 * LN_2 * (p * tl.log2(tl.maximum(by * p, 1e-37)) + q * tl.log2(tl.maximum(by * q, 1e-37)))
    return tl.where(small, 0.5 * (p + q) * r2 * series, far)


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
def apart_by(z2, t2):
    """z2 − t2; where the teacher's logit is −inf a number whose product with 0 is 0."""
    return tl.minimum(z2 - t2, -ABSENT)


@triton.jit
def level_terms(z2, t2, e_q, e_p, by_q, by_p, METHOD: tl.constexpr):
    """What the level is summed from, for the methods that have one."""
    if METHOD == REVERSE:
        return e_q * by_q * apart_by(z2, t2)
    if METHOD == JSD:
        return e_q * by_q * against_mean(z2, by_q, e_q * by_q + e_p * by_p)
    return (e_q * by_q - e_p * by_p) * z2


@triton.jit
def divergence_terms(
    z, t, z2, t2, e_q, e_p, by_q, by_p, top_z, top_t, inverse_t, scale, apart,
    METHOD: tl.constexpr, REPORT: tl.constexpr,
):  # fmt: skip
    """What `divergence` is summed from."""
    if REPORT == 2:
        x, p, q = log_ratio(z, t, top_z, top_t, inverse_t, scale, apart), e_p * by_p, e_q * by_q
        if METHOD == REVERSE:
            return exact_kl(-x, q, p)
        if METHOD == JSD:
            return exact_jsd(x, p, q)
        return exact_kl(x, p, q)
    if METHOD == JSD:
        return e_p * by_p * against_mean(t2, by_p, e_q * by_q + e_p * by_p)
    return e_p * tl.maximum(t2 - z2, ABSENT)  # where the teacher's logit is −inf 0, not 0·−inf


@triton.jit
def divergence(total, level, sum_q, sum_p, by_q, by_p, METHOD: tl.constexpr, REPORT: tl.constexpr):
    """A row's divergence, in nats."""
    if REPORT == 2:
        return total
    if METHOD == REVERSE:
        return LN_2 * (level + tl.log2(sum_p * by_q))
    if METHOD == JSD:
        return 0.5 * LN_2 * (total + level)
    return LN_2 * (total * by_p + tl.log2(sum_q * by_p))


@triton.jit
def gradient(
    z2, t2, e_h, e_q, e_p, a, b, d, even, level, middle, along, by_q, by_p, inside,
    METHOD: tl.constexpr, HARD: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """By the student's logits, but for the target's own part; zero where there is no class."""
    if METHOD == REVERSE:
        g = b * e_q * (apart_by(z2, t2) - level) - even
    elif METHOD == JSD:
        g = b * e_q * (against_mean(z2, by_q, e_q * by_q + e_p * by_p) - level) - even
    elif SMOOTH:
        g = b * e_q - (d * e_p + even)
    else:
        g = b * e_q - d * e_p
    if METHOD == STANDARDISED:
        g -= along * (z2 - middle)
    if HARD:
        g = a * e_h + g
    if SMOOTH or METHOD == STANDARDISED:
        g = tl.where(inside, g, 0.0)
    return g


@triton.jit
def inverse_deviation(square, mean, scale, CLASSES: tl.constexpr):
    """1/σ of a row's logits, `scale` each, by the sum of squared distances from their mean, and whether they vary.

    As `reference.zscores`: values that are equal up to rounding are only centred.
    """
    EPSILON: tl.constexpr = 2.0**-23 if square.dtype == tl.float32 else 2.0**-52
    LEAST: tl.constexpr = 2.0**-63 if square.dtype == tl.float32 else 2.0**-511  # a variance
    variance, mean = square * (scale * scale / CLASSES), mean * scale
    varies = variance > (16 * EPSILON * mean) * (16 * EPSILON * mean) + LEAST
    return tl.where(varies, tl.rsqrt(tl.where(varies, variance, 1.0)), 1.0), varies


@triton.jit
def decoupled(h_y, q_y, p_y, sum_h, sum_q, sum_p):
    """Of a target and the sums of the others, by exponents of base 2: CE, its probability that is missing, TCKD in
    nats, and q_y − p_y. Odds, so that nothing is lost beside a target that is sure.
    """
    odds_h, odds_q = (h_y - tl.log2(sum_h)) * LN_2, (q_y - tl.log2(sum_q)) * LN_2
    odds_p = (p_y - tl.log2(sum_p)) * LN_2
    q, not_q, p, not_p = sigmoid(odds_q), sigmoid(-odds_q), sigmoid(odds_p), sigmoid(-odds_p)
    tckd = exact_kl(softplus(-odds_q) - softplus(-odds_p), p, q)
    tckd += exact_kl(softplus(odds_q) - softplus(odds_p), not_p, not_q)
    return softplus(-odds_h), sigmoid(-odds_h), tckd, q * not_p - not_q * p
