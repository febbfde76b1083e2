"""Differences of settings within a seed: what they are on average, and whether chance could make them."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from bench.claims.studies import Contrast, Setting

# Student's t of 1 to 19 degrees, 97.5 %.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_T95 += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093)


def sign_flip_p(differences: Iterable[float]) -> float:
    """Two-sided p of the exact sign-flip test of mean 0: Fisher's randomisation test for pairs."""
    values = np.asarray(list(differences), np.float64)
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    # Sums that differ by rounding alone are one.
    return float(np.mean(np.abs(sums) >= abs(values.sum()) - 1e-9 * np.abs(values).sum()))


def compared(contrast: Contrast, results: Mapping[Setting, list[dict]], measure: str = "top1") -> dict:
    """Mean, standard error, 95 % interval by Student's t, and p of a contrast of top-1 in points, or of another
    measure in its unit, over the seeds that all its settings have."""
    seeds = [
        sum(sign * value for sign, value in zip((s for _, s in contrast), each, strict=True))
        for each in zip(*(_values(results[which], measure) for which, _ in contrast), strict=False)
    ]
    mean, se, interval = _estimate(seeds)
    return {"mean": mean, "se": se, "interval": interval, "p": sign_flip_p(seeds), "seeds": seeds}


def arm(results: list[dict]) -> dict:
    """Mean and standard deviation of what students came to; where a teacher judged them, its KL too, and intervals."""
    judged = "kl" in results[0]
    found = {}
    for name in ("top1", "cross_entropy", *["kl"] * judged):
        values = _values(results, name)
        found[name] = {"mean": statistics.mean(values), "sd": _deviation(values), "seeds": values}
        if judged:
            found[name]["interval"] = _estimate(values)[2]
    return found


def _values(results: list[dict], measure: str) -> list[float]:
    if measure == "top1":
        return [100 * result["top1"] for result in results]
    return [result[{"cross_entropy": "loss"}.get(measure, measure)] for result in results]


def _estimate(values: Sequence[float]) -> tuple[float, float | None, list[float] | None]:
    """Mean, its standard error, and its 95 % interval by Student's t; of one value the mean alone."""
    mean, sd = statistics.mean(values), _deviation(values)
    if sd is None:
        return mean, None, None
    se = sd / math.sqrt(len(values))
    half = se * _T95[len(values) - 2]
    return mean, se, [mean - half, mean + half]


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
