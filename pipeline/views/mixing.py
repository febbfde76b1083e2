"""Mixed views: Mixup, CutMix and random erasing of augmented views, the same whenever they are asked for.

What happens to a view is a pure function of (store seed, key hash, view number, policy). Whom it is mixed with is one
of (store seed, view number, row) and of which rows of the index are good. Batch, rank, world and the start of a run
play no part. As in `pipeline.views.drawing` all arithmetic is on integers; tables of Beta come from `decimal`, which
rounds alike on every platform.
"""

import decimal
from functools import cache
from math import isqrt

import numpy as np

from cache.philox import below, philox
from pipeline.views import drawing
from pipeline.views.drawing import ATTEMPTS, VIEW, ratio_table, rounded_root
from pipeline.views.policy import Erase, Mix, Policy

MIX = np.dtype(
    [
        ("partner", "<i8"),
        ("view", VIEW),
        ("share", "<i4"),
        ("patch", "<i4", 4),
        ("ratio", "<f4"),
        ("erase", "<i4", 4),
        ("value", "u1"),
    ]
)
"""What happens to an augmented view after its crop. `partner`: index row of the other sample, −1 for none, and its own
augmented `view` of that number; it makes no original one. `share`: weight of the view's own pixels outside of `patch`,
in units of 1/256; `patch`: the box (top, left, height, width) that is the partner's. `ratio`: the share of the view's
own label. `erase`: a box of `value`. Boxes of height 0 are none."""

UNIT = 256
"""λ of a pixel is a multiple of 1/256."""

# Fourth counter words; see `pipeline.views.drawing`.
_MIX, _ERASE, _PARTNER = 0x400, 0x500, 0x600
_ROUNDS = 6


def draw(records: np.ndarray, rows: np.ndarray, seed: int, view: int, policy: Policy) -> np.ndarray:
    """What view `view` of index rows i64 (B,) has done to it: (B,) of dtype `MIX`. `records` are all of the index."""
    out = np.zeros(len(rows), MIX)
    key_hash = records["key_hash"][rows]
    out["partner"], out["share"], out["ratio"] = -1, UNIT, 1.0
    if policy.mix:
        _mix(out, drawing.words(seed, key_hash, view, _MIX, 2), policy.mix, policy.base.size)
        mixed = np.flatnonzero(out["ratio"] < 1)
        other = partners(rows[mixed], seed, view, records["status"])
        out["partner"][mixed] = other
        out["view"][mixed] = drawing.of(records[other], seed, view, policy)
        out["view"]["box"][:, 0] = 0
        alone = np.flatnonzero(out["partner"] == rows)  # mixed with itself
        out["partner"][alone], out["ratio"][alone] = -1, 1.0
    if policy.erase:
        out["value"] = policy.erase.value
        drawn = drawing.words(seed, key_hash, view, _ERASE, 1 + ATTEMPTS)
        out["erase"] = _erased(drawn, policy.erase, policy.base.size)
    return out


def named(mix: np.void) -> tuple[str, ...]:
    """What happens to a view after its crop, for people."""
    found = []
    if mix["partner"] >= 0:
        kind = "cutmix" if mix["patch"][2] else "mixup"
        found.append(f"{kind}, {1 - mix['ratio']:.0%} of row {mix['partner']}")
    return (*found, "erase") if mix["erase"][2] else tuple(found)


def partners(rows: np.ndarray, seed: int, view: int, status: np.ndarray) -> np.ndarray:
    """The rows i64 (B,) that rows are mixed with in a view: a permutation of the good ones among `status` (N,).

    A Feistel network over a × b ≥ N places, a and b next to √N (Black and Rogaway, *Ciphers with Arbitrary Finite
    Domains*, CT-RSA 2002), each round a word of Philox. Whoever lands beyond N or on a quarantined row walks on, which
    keeps it a permutation; so there is no array of N. A quarantined row may be its own partner.
    """
    samples = len(status)
    a = isqrt(samples - 1) + 1 if samples > 1 else 1
    b = -(-samples // a)

    def step(at: np.ndarray) -> np.ndarray:
        left, right = np.divmod(at, b)
        for number in range(0, _ROUNDS, 2):
            left = (left + below(philox((right, number, view, _PARTNER), seed)[:, 0], a)) % a
            right = (right + below(philox((left, number + 1, view, _PARTNER), seed)[:, 0], b)) % b
        return left * b + right

    found, walking = step(rows), np.arange(len(rows))
    while len(walking := walking[_beyond(found[walking], status) & (found[walking] != rows[walking])]):
        found[walking] = step(found[walking])
    return found


def _beyond(at: np.ndarray, status: np.ndarray) -> np.ndarray:
    return (at >= len(status)) | (status[np.minimum(at, len(status) - 1)] != 0)


def _mix(out: np.ndarray, words: np.ndarray, mix: Mix, size: int) -> None:
    """Enter share, patch and ratio from words u32 (B, 8)."""
    mixed = words[:, 0] < np.uint64(round(mix.probability * 2**32))
    cut = mixed & bool(mix.cutmix_alpha)
    if mix.mixup_alpha:
        cut &= words[:, 1] < np.uint64(round(mix.switch_probability * 2**32))
        blended = mixed & ~cut
        out["share"][blended] = _share(words[blended, 2], mix.mixup_alpha)
        out["ratio"][blended] = out["share"][blended] / UNIT
    if cut.any():
        box = _patch(_share(words[cut, 2], mix.cutmix_alpha), words[cut, 4:6], size)
        out["patch"][cut] = box
        out["ratio"][cut] = (size * size - box[:, 2] * box[:, 3]) / (size * size)


def _share(words: np.ndarray, alpha: float) -> np.ndarray:
    """λ of Beta(alpha, alpha) to the nearest 1/256, from random words u32: i64 in [0, 256]."""
    return np.searchsorted(beta_table(alpha), words.astype(np.uint64), side="right")


@cache
def beta_table(alpha: float) -> np.ndarray:
    """P(λ < (k + ½)/256) in units of 2⁻³², rounded, for k from 0 to 255, λ of Beta(alpha, alpha): u64 (256,).

    With g(x) = xᵃ Σ_n (1 − a)_n / n! · xⁿ / (a + n), the incomplete beta function, it is ½ g(x)/g(½) up to x = ½, and
    symmetric about it. 60 decimal digits and 256 terms of at most 2⁻ⁿ leave no doubt about the last bit.
    """
    with decimal.localcontext(decimal.Context(prec=60, rounding=decimal.ROUND_HALF_EVEN)):
        a = decimal.Decimal(alpha)
        terms, factor = [], decimal.Decimal(1)
        for n in range(256):
            terms.append(factor / (a + n))
            factor = factor * (n + 1 - a) / (n + 1)

        def incomplete(x: decimal.Decimal) -> decimal.Decimal:
            total = decimal.Decimal(0)
            for term in reversed(terms):
                total = total * x + term
            return (a * x.ln()).exp() * total

        whole = incomplete(decimal.Decimal("0.5"))
        lower = [
            int((2**31 * incomplete(decimal.Decimal(2 * k + 1) / (2 * UNIT)) / whole).to_integral_value())
            for k in range(UNIT // 2)
        ]
    return np.array([*lower, *(2**32 - value for value in reversed(lower))], np.uint64)


def _patch(share: np.ndarray, words: np.ndarray, size: int) -> np.ndarray:
    """timm's `rand_bbox`: a square of 1 − λ of the area, its side rounded down, about a random pixel and cut at the
    edges; i64 (B, 4)."""
    side = np.sqrt((size * size * (UNIT - share) // UNIT).astype(np.float64)).astype(np.int64)
    centre = below(words, size)
    low = np.maximum(centre - side[:, None] // 2, 0)
    high = np.minimum(centre + (side[:, None] + 1) // 2, size)
    return np.concatenate([low, high - low], axis=1)


def _erased(words: np.ndarray, erase: Erase, size: int) -> np.ndarray:
    """torchvision RandomErasing.get_params: the first of ten boxes that is smaller than the view either way; (B, 4)."""
    erased = words[:, 0] < np.uint64(round(erase.probability * 2**32))
    tries = words[:, 4:].reshape(len(words), ATTEMPTS, 4)
    ratios, inverses = ratio_table(erase.ratio)
    low, high = (round(share * 2**24) for share in erase.scale)
    area = size * size * (low + below(tries[..., 0], high - low + 1)) >> 24
    pick = tries[..., 1] >> np.uint32(22)
    h, w = rounded_root(area, ratios[pick]), rounded_root(area, inverses[pick])
    fits = (h > 0) & (h < size) & (w > 0) & (w < size)
    top, left = (below(tries[..., 2 + k], np.maximum(size - side + 1, 1)) for k, side in enumerate((h, w)))
    boxes = np.stack([top, left, h, w], axis=-1)
    chosen = np.take_along_axis(boxes, np.argmax(fits, axis=1)[:, None, None], axis=1)[:, 0]
    return np.where((erased & fits.any(axis=1))[:, None], chosen, 0)
