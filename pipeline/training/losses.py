"""Distillation losses beside KD and CCD, which have kernels: one soft term per view, and what combines them.

A soft term is `soft(student, teacher, target, temperature, weight) -> per-sample values (B,)`: logits (B, C) float32 or
float64, `target` integer (B,), `weight` (B,) how much each sample counts. Only DIST needs `weight`, as it compares
whole batches; so the values stay per sample, and views, weights, missing labels and T² are the business of `loss`
alone. None has T² in it. All are differentiable in `student`, and invariant to a shift of each row of `teacher` (all
that a store need not keep) and of `student` (so that each row of the gradient sums to 0).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import reference

Soft = Callable[..., Tensor]


def dist(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: float,
    weight: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
) -> Tensor:
    """beta · inter + gamma · intra, no unit, each in [0, 2] on the mean: DIST (Huang et al., NeurIPS 2022).

    With q, p = softmax(·/T) of student and teacher and r Pearson's correlation: inter is 1 − r of row i of q and p
    (over classes), intra the mean over classes of 1 − r of a column of q and p (over the batch). Since r is the mean
    of a product of z-scores, sample i's share of intra is 1 − mean_c ẑ_ic·t̂_ic: not a loss by itself (it can be
    negative), but the weighted mean of these is intra, its moments weighted alike. Samples of weight 0 so leave no
    trace. Where either side does not vary, r = 0.

    The paper's correlation; the released code adds 1e-8 to the product of norms, which fades out classes that nobody
    in the batch believes in. The defaults are that code's, which has T = 1 and adds the term to 1 · CE.
    """
    q, p = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
    batch = (weight / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny))[:, None]
    rows = 1 / q.shape[1]
    inter = 1 - (reference.zscores(q, 1, rows) * reference.zscores(p, 1, rows)).mean(1)
    intra = 1 - (reference.zscores(q, 0, batch) * reference.zscores(p, 0, batch)).mean(1)
    return beta * inter + gamma * intra


def _of_rows(term: Callable[..., Tensor]) -> Soft:
    """A soft term that no other row of the batch counts for."""

    def soft(student, teacher, target, temperature, weight, **options):
        return term(student, teacher, target, temperature, **options)

    return soft


SOFT: dict[str, Soft] = {
    "kd": _of_rows(reference.SOFT["kd"]),
    "dkd": _of_rows(reference.SOFT["dkd"]),
    "dist": dist,
    "standardised": _of_rows(reference.SOFT["standardised"]),
}
"""By --loss. `ccd`, with w given or fixed, is kd with `weight` on the augmented view."""


def loss(
    name: str,
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    weight: Tensor | float = 1.0,
    *,
    temperature: float,
    alpha: float,
    kd_weight: float,
    label_smoothing: float = 0.0,
    valid: Tensor | None = None,
    count: Tensor | float | None = None,
    **options: float,
) -> Tensor:
    """`reference.ccd_loss` with another soft term than KL -> scalar, differentiable in `student`.

        hard = mean of CE over all 2B rows
        soft = ½ · (mean_i soft_o,i + mean_i w_i · soft_a,i)
        loss = kd_weight · (alpha · hard + (1 − alpha) · T² · soft)

    `student`: logits (2, B, C), the original views and the augmented ones; `teacher`: (B, 2, C), as a store decodes
    them; `target`: integer (B,). `name`: of `SOFT`; `options` go to that term. `weight`: w (B,) or one for all.
    `valid`: bool, pairs (B,) or views (2, B) that count; what stands in the others, NaN too, touches neither loss nor
    gradient, and they are not part of DIST's batch. `count`: the number of pairs, or half that of views, that means
    divide by; None: those that count.
    """
    teacher, ones = teacher.detach(), torch.ones_like(student[..., 0])
    weight = weight.detach().to(ones.dtype) if isinstance(weight, Tensor) else ones[1] * weight
    weight = torch.stack([ones[0], weight])
    if valid is not None:
        valid = valid.expand_as(ones)
        student, teacher = student.where(valid[..., None], 0), teacher.where(valid.T[..., None], 0)
        target, ones, weight = target.where(valid.any(0), 0), ones.where(valid, 0), weight.where(valid, 0)
    if count is None:
        count = ones.sum().clamp(min=1) / 2
    hard = soft = student.new_zeros(())
    for z, t, one, w in zip(student, teacher.unbind(1), ones, weight, strict=True):
        hard = hard + (one * reference.cross_entropy(z, target, label_smoothing)).sum()
        soft = soft + (w * SOFT[name](z, t, target, temperature, w, **options)).sum()
    hard_factor, soft_factor = reference.coefficients(temperature, alpha, kd_weight)
    return (hard_factor * hard + soft_factor * soft) / (2 * count)
