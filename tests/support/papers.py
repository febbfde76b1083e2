"""The soft terms of the losses as their papers write them, with loops and NumPy, and made-up logits to try them on."""

import math
import statistics

import numpy as np
import torch
from scipy.optimize import nnls

from pipeline.training.methods import METHODS, View, loss

NAMES = ["kd", "dkd", "dist", "standardised"]
"""The terms that are alike in what they hold; the others have tests of their own."""


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def views(batch: int, classes: int, seed: int = 0):
    """Student (B, C), teacher (B, C), target (B,) and weight (B,), which is positive."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (batch,), generator=generator)
    weight = torch.rand(batch, generator=generator, dtype=torch.float64) + 0.1
    return *logits(2, batch, classes, seed=seed), target, weight


def pairs(batch: int, classes: int, seed: int = 0):
    """Student (2, B, C), teacher (B, 2, C), target and weight as of `views`."""
    *_, target, weight = views(batch, classes, seed)
    return logits(2, batch, classes, seed=seed), logits(batch, 2, classes, seed=seed + 1), target, weight


def with_gradient(function, student, *arguments, **options):
    student = student.detach().clone().requires_grad_()
    value = function(student, *arguments, **options)
    return value.detach(), *torch.autograd.grad(value.sum(), student)


def term(name, student, teacher, target, temperature, weight, **options):
    """A method's soft term of one view."""
    view = View(student=student, teacher=teacher, target=target, weight=weight, temperature=temperature)
    return METHODS[name](**options).term(view)


def combined(name, student, *arguments, **options):
    return with_gradient(
        lambda z, *rest, **more: loss(METHODS[name](), z, *rest, **more), student, *arguments, **options
    )


# The papers' formulas: lists of floats, probabilities as they stand, no care for extremes


def softmax(row, temperature=1.0):
    powers = [math.exp(value / temperature) for value in row]
    return [power / math.fsum(powers) for power in powers]


def divergence(p, q):
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def paper_kd(z, t, target, temperature, weight):
    return [divergence(softmax(b, temperature), softmax(a, temperature)) for a, b in zip(z, t, strict=True)]


def paper_dkd(z, t, target, temperature, weight, alpha=1.0, beta=8.0):
    values = []
    for a, b, y in zip(z, t, target, strict=True):
        q, p = softmax(a, temperature), softmax(b, temperature)
        rest_q, rest_p = (math.fsum(row[:y] + row[y + 1 :]) for row in (q, p))
        tckd = divergence([p[y], rest_p], [q[y], rest_q])
        hat_q, hat_p = ([row[c] / rest for c in range(len(row)) if c != y] for row, rest in ((q, rest_q), (p, rest_p)))
        values.append(alpha * tckd + beta * divergence(hat_p, hat_q))
    return values


def paper_standardised(z, t, target, temperature, weight):
    def zscore(row):
        return [(value - statistics.fmean(row)) / statistics.pstdev(row) for value in row]

    return paper_kd([zscore(row) for row in z], [zscore(row) for row in t], target, temperature, weight)


def paper_dist(z, t, target, temperature, weight, beta=1.0, gamma=1.0):
    """The loss of the batch, which is the weighted mean of what `dist` returns."""
    q, p = ([softmax(row, temperature) for row in rows] for rows in (z, t))
    inter = np.average([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)], weights=weight)
    intra = []
    for a, b in zip(zip(*q, strict=True), zip(*p, strict=True), strict=True):
        cov = np.cov(a, b, aweights=weight, ddof=0) if len(a) > 1 else np.zeros((2, 2))
        intra.append(1 - cov[0, 1] / math.sqrt(cov[0, 0] * cov[1, 1]) if cov[0, 0] * cov[1, 1] else 1.0)
    return beta * inter + gamma * statistics.fmean(intra)


def paper_reverse(z, t, target, temperature, weight):
    return [divergence(softmax(a, temperature), softmax(b, temperature)) for a, b in zip(z, t, strict=True)]


def paper_jsd(z, t, target, temperature, weight):
    rows = [(softmax(a, temperature), softmax(b, temperature)) for a, b in zip(z, t, strict=True)]
    means = [[(x + y) / 2 for x, y in zip(q, p, strict=True)] for q, p in rows]
    return [(divergence(p, m) + divergence(q, m)) / 2 for (q, p), m in zip(rows, means, strict=True)]


PER_SAMPLE = {"kd": paper_kd, "dkd": paper_dkd, "standardised": paper_standardised}


def paper_mean(name, z, t, target, temperature, weight, **options) -> float:
    """Weighted mean over the batch."""
    if name == "dist":
        return paper_dist(z, t, target, temperature, weight, **options)
    return float(np.average(PER_SAMPLE[name](z, t, target, temperature, weight, **options), weights=weight))


def lists(*tensors):
    return [tensor.tolist() for tensor in tensors]


def isotonic(p, first, second=None):
    """The nearest vector to p under pairs of `above ≥ below`, by the dual's non-negative least squares."""
    second = None if second == first else second
    others = [c for c in range(len(p)) if c not in (first, second)]
    above = [(first, second)] if second is not None else []
    above += [(first if second is None else second, c) for c in others]
    steps = np.zeros((len(above), len(p)))
    for row, (high, low) in enumerate(above):
        steps[row, high], steps[row, low] = 1, -1
    return p + steps.T @ nnls(steps.T, -p)[0] if above else p
