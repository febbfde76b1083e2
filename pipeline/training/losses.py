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


def kd(student: Tensor, teacher: Tensor, target: Tensor, temperature: float, weight: Tensor) -> Tensor:
    """KL(softmax(teacher/T) ‖ softmax(student/T)) in nats (Hinton, Vinyals, Dean, 2015)."""
    return reference.kl_divergence(student, teacher, temperature)


def dkd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: float,
    weight: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """alpha · TCKD + beta · NCKD in nats: Decoupled Knowledge Distillation (Zhao et al., CVPR 2022).

    TCKD is the divergence between [p_y, 1 − p_y] of teacher and student, NCKD that between their distributions over
    the other classes, softmax at T without y; KD is TCKD + (1 − p_y) · NCKD, p_y of the teacher. The defaults are those
    of the authors' code for CIFAR-100, at T = 4 (for some pairs it takes a smaller beta: 2 for R56→R20, 6 for
    W40-2→W16-2); for ImageNet it takes beta = 0.5, T = 1. It adds the term to 1 · CE, as alpha = 0.5 and kd_weight = 2
    of `loss` do, and fades it in over 20 epochs (ImageNet: 1), as --kd-warmup-epochs does.
    """
    own = target.long()[:, None]
    others = torch.arange(student.shape[1] - 1, device=student.device)
    others = others + (others >= own)  # (B, C − 1): gathered, so that nothing is −inf and no 1 − p is formed

    def split(logits: Tensor) -> tuple[Tensor, Tensor]:
        rest = logits.gather(1, others)
        largest = rest.detach().amax(1, keepdim=True)  # logsumexp rounds to the size of its result
        one, rest = (logits.gather(1, own) - largest) / temperature, (rest - largest) / temperature
        return torch.cat([one, rest.logsumexp(1, keepdim=True)], dim=1), rest

    (binary_q, rest_q), (binary_p, rest_p) = split(student), split(teacher)
    tckd = reference.kl_divergence(binary_q, binary_p, 1.0)
    return alpha * tckd + beta * reference.kl_divergence(rest_q, rest_p, 1.0)


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
    inter = 1 - (_zscores(q, 1, rows) * _zscores(p, 1, rows)).mean(1)
    intra = 1 - (_zscores(q, 0, batch) * _zscores(p, 0, batch)).mean(1)
    return beta * inter + gamma * intra


def standardised(student: Tensor, teacher: Tensor, target: Tensor, temperature: float, weight: Tensor) -> Tensor:
    """KD of z-scores of each sample's logits, in nats: Logit Standardization (Sun et al., CVPR 2024).

    Also invariant to a positive factor on either row, so only T says how soft the labels are. The variance is a mean
    over C (the released code divides by C − 1). The gradient grows as the student's deviation shrinks.
    The authors' CIFAR-100 runs take T = 2 and 0.1 · CE + 9 · T² · this: kd_weight = 9.1, alpha = 0.1/9.1 of `loss`.
    """
    each = 1 / student.shape[1]
    return reference.kl_divergence(_zscores(student, 1, each), _zscores(teacher, 1, each), temperature)


SOFT: dict[str, Soft] = {"kd": kd, "dkd": dkd, "dist": dist, "standardised": standardised}
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


def _zscores(values: Tensor, dim: int, share: Tensor | float) -> Tensor:
    """Values less their mean, over their standard deviation, where each has a `share` that sums to 1 along `dim`.

    Values that are equal up to rounding have no direction, and so no derivative of one: they are only centred. So are
    those whose variance, to the power −3/2 of its derivative, would leave the dtype's range (float32: 1e-19).
    """
    mean = (share * values).sum(dim, keepdim=True)
    centred = values - mean
    variance = (share * centred.square()).sum(dim, keepdim=True)
    info = torch.finfo(values.dtype)
    flat = variance <= (16 * info.eps * mean).square() + info.tiny**0.5
    return centred * variance.where(~flat, 1).rsqrt()
