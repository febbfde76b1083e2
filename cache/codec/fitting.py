"""Fitting the `subspace` code to a teacher: directions, steps and entropy models for a budget of KL."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from cache.codec import entropy
from cache.codec.base import require_encodable
from cache.codec.fidelity import TEMPERATURE, divergences
from cache.codec.subspace import MAX_DIMS, Subspace, turned
from cache.errors import UserError

MIN_PAIRS = 64

_NEGLIGIBLE = 1e-6  # of the mean variance of a logit: directions below it are rounding noise of the teacher
_ERRORS, _MARGIN = 3, 0.02  # below the budget by so many standard errors of the KL, or at most by so large a share
_TOLERANCE = 0.001
_ROUNDS = 5
_MISSED = 1.05
# Both views have the noise of the sum and that of the difference, for KL alike. Students of both views average some of
# the latter: with equal weights a real network's sums had 0.55 of the noise, and its students 5 % more of KL than by
# noise that views do not share. With these its sums have half.
_SHARED = 1.15, 0.85
_MEASURED = 256  # fewer held-out pairs are each measured with several dithers
_BYTE, _NIBBLE = 127.0, 7.5  # what a coefficient may need, in steps, of a whole byte and of half a one
_JOINT_MARGIN = entropy.TRELLIS_DITHER / 2 + 2
_HEADROOM = 1.15  # on the largest coefficient seen
_WIDE_MULTIPLE = 16
_STATES = 256  # of the trellis


def held_out(pairs: int) -> int:
    """Of `pairs` pairs the first so many are fitted to; the others measure."""
    return pairs - pairs // 4


def require_budget(kl: float) -> None:
    """Raise UserError unless it is a positive number of nats."""
    if not 0 < kl < math.inf:
        raise UserError("the KL budget", found=kl, expected="a positive number of nats", fix="try 0.05")


def fit(logits: np.ndarray, kl: float, temperature: float = TEMPERATURE) -> Subspace:
    """The code whose KL at `temperature` is `kl` nats on held-out pairs, of logits f32 (n, 2, C) in random order.

    Raises UserError for a budget that is not positive or not reached, or fewer than `MIN_PAIRS` pairs.
    """
    require_budget(kl)
    require_pairs(len(logits), "use --codec int8")
    require_encodable(logits, logits.shape[2])

    vectors = _centred(logits)

    def cost(code: Subspace, part: np.ndarray, dither_keys: np.ndarray) -> np.ndarray:
        decoded = code.decode(code.encode(logits[part], dither_keys), dither_keys)
        return divergences(vectors[part], decoded, temperature).mean(axis=1)

    return search(vectors, lambda part: _directions(logits[part], temperature), cost, kl, "use --codec int8")


def require_pairs(pairs: int, fix: str) -> None:
    """Raise UserError for fewer than `MIN_PAIRS`."""
    if pairs < MIN_PAIRS:
        raise UserError("too few pairs to fit a code", found=pairs, expected=f"at least {MIN_PAIRS}", fix=fix)


def search(
    vectors: np.ndarray,
    find: Callable[[slice], "Directions"],
    cost: Callable[[Subspace, np.ndarray, np.ndarray], np.ndarray],
    budget: float,
    fix: str,
) -> Subspace:
    """The code of vectors f64 (n, 2, C), in random order, whose noise costs `budget` on held-out pairs.

    `find` gives the directions of some pairs. `cost` gives the nats f64 (n,) that a code's noise costs pairs of these
    numbers i64 (n,) and dither keys u64 (n,), each. `fix` is said if the budget is not reached.
    """
    cut = held_out(len(vectors))
    held = np.tile(np.arange(cut, len(vectors)), -(-_MEASURED // (len(vectors) - cut)))
    dither_keys = np.arange(len(held), dtype=np.uint64)
    part = find(slice(cut))
    moments = _moments(_coefficients(vectors[cut:], part))
    nominal, tried = budget, []
    for _ in range(_ROUNDS):
        each = cost(_code(part, moments, nominal), held, dither_keys).reshape(-1, len(vectors) - cut).mean(axis=0)
        found, error = float(each.mean()), float(each.std()) / math.sqrt(len(each))
        aim = budget * (1 - min(_ERRORS * error / max(found, 1e-300), _MARGIN))
        off = abs(found / aim - 1)
        tried.append((found > _MISSED * budget, off, found, nominal))
        if found <= 0 or off < _TOLERANCE:
            break
        nominal *= aim / found
    # Of few pairs the KL has jumps, over which the rounds may go to and fro: the best of them counts, not the last.
    missed, _, found, nominal = min(tried)
    if missed:
        raise UserError(
            "no subspace code keeps these logits within the KL budget",
            found=f"{found:.3g} nats",
            expected=f"at most {budget:g}",
            fix=fix,
        )
    # The more pairs, the better the directions: 4,096 vectors for 512 of them cost a byte less than 3,072. The moments
    # stay those of pairs that the directions were not fitted to, rank by rank: in the fitted pairs themselves the last
    # of 1000 directions have half the variance that they have in others.
    whole, known = find(slice(None)), moments.shape[1]
    beyond = _moments(_coefficients(vectors, replace(whole, basis=whole.basis[known:])))
    return _code(whole, np.hstack([moments[:, : len(whole.basis)], beyond]), nominal)


@dataclass(frozen=True)
class Directions:
    mean: np.ndarray
    """f64 (C,) of the vectors: centred logits."""
    basis: np.ndarray
    """f64 (d, C), orthonormal, by falling variance."""
    reach: np.ndarray
    """f64 (2, d), largest coefficient of half the sums and half the differences of the vectors they were found in."""
    felt: np.ndarray
    """f64 (d,), nats that noise of variance 1 along each costs; see `sensitivity`."""


def principal(vectors: np.ndarray, felt: Callable[[np.ndarray], np.ndarray]) -> Directions:
    """Of vectors f64 (n, 2, C); `felt` tells of directions f64 (d, C) what noise along them costs."""
    length = vectors.shape[2]
    mean = vectors.mean(axis=(0, 1))
    flat = (vectors - mean).reshape(-1, length)
    if len(flat) < length:  # the same directions from the smaller matrix of products
        variance, found = np.linalg.eigh(flat @ flat.T / len(flat))
        basis = found.T @ flat
        basis /= np.maximum(np.linalg.norm(basis, axis=1, keepdims=True), 1e-300)
    else:
        variance, found = np.linalg.eigh(flat.T @ flat / len(flat))
        basis = found.T
    kept = np.flatnonzero(variance > _NEGLIGIBLE * max(variance.sum() / length, 1e-12))[::-1][:MAX_DIMS]
    basis = basis[kept] if len(kept) else np.eye(1, length) - 1 / length
    along = turned((flat @ basis.T).reshape(len(vectors), 2, -1)) / 2
    return Directions(mean, basis, np.abs(along).max(axis=0), felt(basis))


def _directions(logits: np.ndarray, temperature: float) -> Directions:
    return principal(_centred(logits), lambda basis: sensitivity(logits, basis, temperature))


def _centred(logits: np.ndarray) -> np.ndarray:
    centred = logits.astype(np.float64)
    centred -= centred.mean(axis=2, keepdims=True)
    return centred


def _coefficients(vectors: np.ndarray, found: Directions) -> np.ndarray:
    """f64 (n, 2, d) of half the sums and half the differences of vectors f64 (n, 2, C)."""
    return turned((vectors - found.mean) @ found.basis.T) / 2


def _moments(coefficients: np.ndarray) -> np.ndarray:
    """f64 (3, d): mean squares of the sums' and of the differences' coefficients, and the mean of their product."""
    sums, differences = coefficients.swapaxes(0, 1)
    return np.stack([(sums**2).mean(0), (differences**2).mean(0), (sums * differences).mean(0)])


def sensitivity(logits: np.ndarray, basis: np.ndarray, temperature: float) -> np.ndarray:
    """g f64 (d,): noise of variance v along direction i adds g_i v to KL at T, to second order in the noise.

    KL ≈ Var_p(e) / 2T² with e the error and p the teacher's probabilities at T.
    """
    flat = logits.reshape(-1, logits.shape[2]).astype(np.float64) / temperature
    p = np.exp(flat - flat.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    variance = p.mean(axis=0) @ (basis**2).T - ((p @ basis.T) ** 2).mean(axis=0)
    return np.maximum(variance, 1e-12) / (2 * temperature**2)


@dataclass(frozen=True)
class _Choices:
    """Ways to code a normal coefficient, one per entry: alone first, then those on the trellis."""

    ratio: np.ndarray
    """Its spread in steps."""
    rate: np.ndarray
    """Bits that it takes."""
    noise: np.ndarray
    """Variance of its error, in steps squared."""
    beta: np.ndarray
    """Share of the dither to subtract."""
    alone: int
    """Number of entries without the trellis."""


@cache
def _choices() -> _Choices:
    """Alone, the rate is I(x; x + u), and beta minimises the variance of q - beta u - x: with f the fractional part of
    x it is 6 E[f (1 - f)]. On the trellis, whose cells hold two steps, it is h(x + e) - 1 with e the error, both
    taken for normal."""
    ratios = np.exp(np.linspace(math.log(0.004), math.log(64.0), 240))
    z = np.linspace(-8, 8, 2001)
    density = np.exp(-z * z / 2)
    density /= density.sum()
    rates, betas = [], []
    for r in ratios:
        # The density of x + u is flat but for 8 spreads on either side of its edges.
        edge = np.linspace(-8 * r, 8 * r, 1601)
        y = np.unique(np.concatenate([edge - 0.5, edge + 0.5]))
        f = np.clip(_normal((y + 0.5) / r) - _normal((y - 0.5) / r), 1e-300, 1)
        rates.append(np.trapezoid(-f * np.log2(f), y))
        part = np.abs(z * r) % 1
        betas.append(min(6 * (density * part * (1 - part)).sum(), 1.0))
    beta, error = np.array(betas), entropy.TRELLIS_NOISE[_STATES]
    joint = np.log2(2 * math.pi * math.e * (ratios**2 + error)) / 2 - 1
    return _Choices(
        ratio=np.tile(ratios, 2),
        rate=np.concatenate([rates, joint]),
        noise=np.concatenate([(1 - (1 - beta) ** 2) / 12, np.full(len(beta), error)]),
        beta=np.concatenate([beta, np.full(len(beta), entropy.TRELLIS_DITHER)]),
        alone=len(beta),
    )


def noise(code: Subspace) -> np.ndarray:
    """f64 (2, d): variances of the errors of a code's coefficients, in steps squared."""
    beta = np.minimum(code.of_both("beta") / entropy.BETA_UNIT, 1)
    return np.where(code.joint, entropy.TRELLIS_NOISE[code.states], (1 - (1 - beta) ** 2) / 12)


def variance(code: Subspace) -> np.ndarray:
    """f64 (2, d): variances of a code's coefficients, in steps squared, as its models have them."""
    model = np.square(code.array("spread") / entropy.UNIT)
    first, rest = np.maximum(model - noise(code) * code.joint, 0) if code.looks_ahead else model
    return np.stack([first, rest + np.square(code.array("gain") / entropy.GAIN_UNIT) * (first + noise(code)[0])])


def _normal(x: np.ndarray) -> np.ndarray:
    """The normal distribution function, to 1e-7."""
    grid, values = _normal_table()
    return np.interp(x, grid, values)


@cache
def _normal_table() -> tuple[np.ndarray, np.ndarray]:
    grid = np.linspace(-9, 9, 9001)
    return grid, np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in grid])


def _allocate(spread: np.ndarray, felt: np.ndarray, kl: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, beta and error variance in steps squared, f64 (n,), of least total rate, for noise of `kl` nats."""
    choices = _choices()
    low, high = 1e-12, 1e15  # bits per nat, by bisection
    best = np.zeros(len(spread), np.int64)
    for _ in range(100):
        price = math.sqrt(low * high)
        cost = felt[:, None] * choices.noise * (spread[:, None] / choices.ratio) ** 2
        best = (choices.rate + price * cost).argmin(axis=1)
        total = cost[np.arange(len(spread)), best].sum()
        low, high = (price, high) if total > kl else (low, price)
    # The choice is one of a grid's ratios; what is left of the budget scales all steps alike.
    step = spread / choices.ratio[best] * math.sqrt(kl / total)
    return step, choices.beta[best], choices.noise[best]


def _code(found: Directions, moments: np.ndarray, kl: float) -> Subspace:
    """The code of those directions whose noise is `kl` nats to second order; `moments` f64 (3, d)."""
    # Of views that never differ in those pairs: others may.
    spread = np.sqrt(np.maximum(moments[:2], _NEGLIGIBLE * moments[:2].sum(axis=0) + 1e-24))
    felt = np.outer(_SHARED, found.felt).ravel()
    step, beta, noise = (chosen.reshape(2, -1) for chosen in _allocate(spread.ravel(), felt, kl))
    margin = np.where(beta > 1, _JOINT_MARGIN, 0.5)  # dither and error
    # A byte spans fewer spreads of a coefficient on the trellis, at the same noise.
    joint = (beta > 1) & (found.reach * _HEADROOM / step + margin <= _BYTE)
    joint[1] &= joint[0]  # so that in one order both lead
    alone = (beta > 1) & ~joint
    step, beta = np.where(alone, step * np.sqrt(12 * noise), step), np.where(alone, 1.0, beta)
    noise, margin = np.where(alone, 1 / 12, noise), np.where(alone, 0.5, margin)
    step = np.maximum(step, found.reach * _HEADROOM / (_BYTE - margin))  # clipping is a bias, a coarse step some noise
    need = (found.reach * _HEADROOM / step + margin).max(axis=0)
    order = np.lexsort((-need, ~joint[1], ~joint[0]))
    basis, step, beta, noise = found.basis[order], step[:, order], beta[:, order], noise[:, order]
    wide = int(np.flatnonzero(np.append(True, need[order] > _NIBBLE))[-1])
    wide = min(-(-wide // _WIDE_MULTIPLE) * _WIDE_MULTIPLE, len(order))

    sums, differences, both = moments[:, order] / [step[0] ** 2, step[1] ** 2, step[0] * step[1]]
    gain = np.clip(both / (sums + noise[0]), -7.9, 7.9)
    rest = np.maximum(differences - gain * (2 * both - gain * (sums + noise[0])), 0)
    # On the trellis models are of what is decoded, errors and all; off it, of intervals of what is coded.
    variance = np.array([sums, rest]) + noise * (beta > 1)
    peak = np.abs(basis).max(axis=1)
    return Subspace(
        version=4,
        classes=basis.shape[1],
        dims=len(order),
        trellis=(int(joint[0].sum()), int(joint[1].sum())),
        wide=wide,
        mean=found.mean.astype("<f4").tobytes(),
        basis=np.rint(basis / peak[:, None] * 127).astype("i1").tobytes(),
        scale=(step * peak / 127).astype("<f4").tobytes(),
        beta=np.rint(beta * entropy.BETA_UNIT).astype("<u2").tobytes(),
        spread=np.clip(np.rint(entropy.UNIT * np.sqrt(variance)), 1, 1 << 20).astype("<i4").tobytes(),
        gain=np.rint(gain * entropy.GAIN_UNIT).astype("<i2").tobytes(),
    )
