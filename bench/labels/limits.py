"""What no unbiased code of a teacher's directions can do without: a bound for `cache.codec.subspace`.

A normal variable of variance s that is told without bias (the mean of what is decoded is the truth, whatever it is) and
with errors of variance n takes at least ½ log2(1 + s/n) bits: the linear estimate of it from what was decoded errs by
s n / (s + n) on average, and no estimate may err by less than the bits allow (Shannon's rate-distortion function). The
bound adds this up over the directions and over the two uncorrelated mixtures of a pair's views along each, with errors
shared out at the least rate for the same KL as the code's. It says nothing about codes that see more than the second
moments along these directions.
"""

import numpy as np

from cache.codec import fitting
from cache.codec.fidelity import TEMPERATURE


def least_bytes(logits: np.ndarray, kl: float, temperature: float = TEMPERATURE) -> float:
    """Bytes per vector of a teacher with these logits f32 (n, 2, C), for noise of `kl` nats to second order."""
    cut = fitting.held_out(len(logits))
    found = fitting._directions(logits[:cut], temperature)
    moments = fitting._moments(fitting._coefficients(logits[cut:], found))
    return least_bits(moments, found.felt, kl) / 16


def least_bits(moments: np.ndarray, felt: np.ndarray, kl: float) -> float:
    """Of a pair. `moments` f64 (3, d) as `cache.codec.fitting` has them; noise of variance v along a direction of half
    the sum or half the difference costs `felt` (d,) times v nats of a vector."""
    sums, differences, both = moments
    middle, apart = (sums + differences) / 2, np.hypot((sums - differences) / 2, both)
    variance = np.maximum(np.concatenate([middle + apart, middle - apart]), 1e-12)[:, None]
    noise = np.exp(np.linspace(np.log(1e-4), np.log(1e4), 1200)) * variance
    bits, cost = np.log2(1 + variance / noise) / 2, np.tile(felt, 2)[:, None] * noise
    low, high, rows = 1e-12, 1e15, np.arange(len(variance))  # bits per nat, by bisection
    best = np.zeros(len(variance), np.int64)
    for _ in range(100):
        price = np.sqrt(low * high)
        best = (bits + price * cost).argmin(axis=1)
        low, high = (price, high) if cost[rows, best].sum() > kl else (low, price)
    return float(bits[rows, best].sum())
