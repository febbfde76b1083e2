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


def compared(contrast: Contrast, results: Mapping[Setting, list[dict]]) -> dict:
    """Mean, standard error, 95 % interval by Student's t, and p of a contrast of top-1 in points, over the seeds that
    all its settings have."""
    seeds = [
        sum(sign * top1 for sign, top1 in zip((s for _, s in contrast), each, strict=True))
        for each in zip(*(_top1(results[which]) for which, _ in contrast), strict=False)
    ]
    sd = _deviation(seeds)
    se = None if sd is None else sd / math.sqrt(len(seeds))
    mean = statistics.mean(seeds)
    half = None if se is None else se * _T95[len(seeds) - 2]
    interval = None if half is None else [mean - half, mean + half]
    return {"mean": mean, "se": se, "interval": interval, "p": sign_flip_p(seeds), "seeds": seeds}


def arm(results: list[dict]) -> dict:
    found = {}
    for name, values in (("top1", _top1(results)), ("cross_entropy", [result["loss"] for result in results])):
        found[name] = {"mean": statistics.mean(values), "sd": _deviation(values), "seeds": values}
    return found


def _top1(results: list[dict]) -> list[float]:
    return [100 * result["top1"] for result in results]


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
