"""Distillation losses in plain PyTorch: the specification that every kernel is tested against.

Works in any floating dtype and on any device; in float64 its autograd is the oracle. Source of Cosine Confidence
Distillation: Li, Shao, Qiu, Song, *What Role Does Data Augmentation Play in Knowledge Distillation?*, ACCV 2022.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def cosine_weight(teacher_o: Tensor, teacher_a: Tensor) -> Tensor:
    """w = 1 + cos(teacher_o, teacher_a) of the raw logits, (B, C) and (B, C) -> (B,), in [0, 2].

    No softmax, temperature or centring: the cosine is not invariant to a shift of the logits. A row that is all
    zero has no direction; its cosine counts as 0, so w = 1.
    """
    # 1 + cos = ½·|ô + â|² for unit vectors, a sum that does not cancel when the two rows are opposed.
    weight = (F.normalize(teacher_o, dim=1) + F.normalize(teacher_a, dim=1)).square().sum(1) / 2
    return torch.where(teacher_o.any(1) & teacher_a.any(1), weight, 1.0)


def coefficients(temperature: float, alpha: float, kd_weight: float) -> tuple[float, float]:
    """The factors of the hard and the soft term in the loss.

    The soft term carries T², so that its gradient keeps its size when the temperature changes (Hinton et al. 2015).
    """
    return kd_weight * alpha, kd_weight * (1 - alpha) * temperature**2


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(softmax(teacher/T) ‖ softmax(student/T)) in nats, (B, C) and (B, C) -> (B,).

    A class whose teacher probability is 0 adds 0, whatever the logits.
    """
    log_p = F.log_softmax(teacher / temperature, dim=1)
    log_q = F.log_softmax(student / temperature, dim=1)
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(1)


def jensen_shannon(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """½·KL(p ‖ m) + ½·KL(q ‖ m) in nats, (B, C) and (B, C) -> (B,), in [0, ln 2]; q, p = softmax(·/T) of student and
    teacher, m = (p + q)/2. Generalised by Agarwal et al., ICLR 2024, whose beta is ½ here."""
    log_p, log_q = F.log_softmax(teacher / temperature, dim=1), F.log_softmax(student / temperature, dim=1)
    # −inf of both is no more than −inf of the mean.
    log_m = torch.logaddexp(log_p.clamp(min=-1e30), log_q.clamp(min=-1e30)) - math.log(2)
    terms = [torch.where(log == -torch.inf, 0.0, log.exp() * (log - log_m)) for log in (log_p, log_q)]
    return (terms[0] + terms[1]).sum(1) / 2


def decoupled(
    student: Tensor, teacher: Tensor, target: Tensor, temperature: float, alpha: float = 1.0, beta: float = 8.0
) -> Tensor:
    """alpha · TCKD + beta · NCKD in nats: Decoupled Knowledge Distillation (Zhao et al., CVPR 2022). C ≥ 2.

    TCKD is the divergence between [p_y, 1 − p_y] of teacher and student, NCKD that between their distributions over
    the other classes, softmax at T without y; KD is TCKD + (1 − p_y) · NCKD, p_y of the teacher. The defaults are those
    of the authors' code for CIFAR-100, at T = 4 (for some pairs it takes a smaller beta: 2 for R56→R20, 6 for
    W40-2→W16-2); for ImageNet it takes beta = 0.5, T = 1. It adds the term to 1 · CE, as alpha = 0.5 and kd_weight = 2
    of `ccd_loss` do, and fades it in over 20 epochs (ImageNet: 1), as --kd-warmup-epochs does.
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
    return alpha * kl_divergence(binary_q, binary_p, 1.0) + beta * kl_divergence(rest_q, rest_p, 1.0)


def standardised(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL of z-scores of each row's logits, in nats: Logit Standardization (Sun et al., CVPR 2024).

    Also invariant to a positive factor on either row, so only T says how soft the labels are. The variance is a mean
    over C (the released code divides by C − 1). The gradient grows as the student's deviation shrinks.
    The authors' CIFAR-100 runs take T = 2 and 0.1 · CE + 9 · T² · this: kd_weight = 9.1, alpha = 0.1/9.1 of `ccd_loss`.
    """
    each = 1 / student.shape[1]
    return kl_divergence(zscores(student, 1, each), zscores(teacher, 1, each), temperature)


def zscores(values: Tensor, dim: int, share: Tensor | float) -> Tensor:
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


SOFT: dict[str, Callable[..., Tensor]] = {
    "kd": lambda student, teacher, target, temperature: kl_divergence(student, teacher, temperature),
    "reverse": lambda student, teacher, target, temperature: kl_divergence(teacher, student, temperature),
    "jsd": lambda student, teacher, target, temperature: jensen_shannon(student, teacher, temperature),
    "dkd": decoupled,
    "standardised": lambda student, teacher, target, temperature: standardised(student, teacher, temperature),
}
"""A row's soft term by method: logits (B, C) and (B, C), target (B,), T, and for dkd alpha and beta -> (B,), in nats,
without T²."""


def cross_entropy(student: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """−Σ_c y_c log softmax(student)_c in nats, (B, C) and integer (B,) -> (B,); y is (1 − ε) e_target + ε/C."""
    log_q = F.log_softmax(student, dim=1)
    picked = log_q.gather(1, target.long()[:, None]).squeeze(1)
    return -(1 - label_smoothing) * picked - (label_smoothing * log_q.mean(1) if label_smoothing else 0)


class Mixed(NamedTuple):
    """Whose labels mixed samples have beside their own, as of Mixup (Zhang et al., ICLR 2018) and CutMix (Yun et al.,
    ICCV 2019)."""

    partner_target: Tensor
    """Integer (B,); the sample's own where it is not mixed."""
    ratio: Tensor
    """Float (B,), in [0, 1]: the share of the sample's own label."""


def beyond_own(student: Tensor, target: Tensor, mixed: Mixed, label_smoothing: float = 0.0) -> Tensor:
    """What ratio · CE(target) + (1 − ratio) · CE(partner) has beyond CE(target), logits (B, C) -> (B,).

    As CE is logsumexp less the target's logit, that is (1 − ratio) times the difference of two logits, times 1 − ε.
    """
    own, other = (student.gather(1, each.long()[:, None])[:, 0] for each in (target, mixed.partner_target))
    return (1 - label_smoothing) * (1 - mixed.ratio.to(student.dtype)) * (own - other)


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    target: Tensor | None = None,
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
    method: str = "kd",
    dkd: tuple[float, float] = (1.0, 8.0),
) -> Tensor:
    """T² · soft, mean over all rows of logits (..., C) -> scalar; with `target` (...) alpha · CE + (1 − alpha) · that.

    `method`: of `SOFT`; dkd, with its alpha and beta in `dkd`, needs a target.
    """
    student, teacher = student.flatten(0, -2), teacher.detach().flatten(0, -2)
    target = None if target is None else target.flatten()
    factors = dkd if method == "dkd" else ()
    soft = temperature**2 * SOFT[method](student, teacher, target, temperature, *factors).mean()
    if target is None:
        return soft
    return alpha * cross_entropy(student, target, label_smoothing).mean() + (1 - alpha) * soft


class Parts(NamedTuple):
    """What a loss is made of, per pair, (B,) each; zero where there is no label."""

    ce_o: Tensor
    ce_a: Tensor
    kl_o: Tensor
    """The soft term, which is a KL unless another method was asked for."""
    kl_a: Tensor
    w: Tensor
    agree_o: Tensor
    """1 where a class is the largest of both student and teacher, else 0."""
    agree_a: Tensor


def ccd_parts(
    student_o: Tensor,
    student_a: Tensor,
    teacher_o: Tensor,
    teacher_a: Tensor,
    target: Tensor,
    *,
    temperature: float,
    weight: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    valid: Tensor | None = None,
    method: str = "kd",
    dkd: tuple[float, float] = (1.0, 8.0),
) -> Parts:
    """The terms of `ccd_loss`, differentiable in `student_*`; arguments as there."""
    teacher_o, teacher_a = teacher_o.detach(), teacher_a.detach()
    if valid is not None:  # what stands in rows without labels, NaN too, must not reach a gradient
        student_o, student_a, teacher_o, teacher_a = (
            torch.where(valid[:, None], row, 0) for row in (student_o, student_a, teacher_o, teacher_a)
        )
        target = torch.where(valid, target, 0)
    if weight is None:
        weight = cosine_weight(teacher_o, teacher_a)
    elif not isinstance(weight, Tensor):
        weight = torch.full_like(student_o[:, 0], weight)
    agree = [
        ((z == z.amax(1, keepdim=True)) & (t == t.amax(1, keepdim=True))).any(1)
        for z, t in ((student_o, teacher_o), (student_a, teacher_a))
    ]
    factors = dkd if method == "dkd" else ()
    parts = Parts(
        cross_entropy(student_o, target, label_smoothing),
        cross_entropy(student_a, target, label_smoothing),
        SOFT[method](student_o, teacher_o, target, temperature, *factors),
        SOFT[method](student_a, teacher_a, target, temperature, *factors),
        weight.detach(),
        *(same.to(student_o.dtype) for same in agree),
    )
    return parts if valid is None else Parts(*(torch.where(valid, part, 0) for part in parts))


def ccd_loss(
    student_o: Tensor,
    student_a: Tensor,
    teacher_o: Tensor,
    teacher_a: Tensor,
    target: Tensor,
    *,
    temperature: float,
    alpha: float,
    kd_weight: float,
    weight: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    valid: Tensor | None = None,
    count: Tensor | float | None = None,
    method: str = "kd",
    dkd: tuple[float, float] = (1.0, 8.0),
) -> Tensor:
    """Loss of a batch of pairs of views, `o` original and `a` augmented -> scalar, differentiable in `student_*`.

        hard = mean of CE over all 2B rows
        soft = ½ · (mean_i KL_o,i + mean_i w_i · KL_a,i)
        loss = kd_weight · (alpha · hard + (1 − alpha) · T² · soft)

    `student_*`, `teacher_*`: logits (B, C); `target`: integer (B,). `weight`: w (B,) or one for all; None takes
    `cosine_weight(teacher_o, teacher_a)`, 1 makes it plain distillation (KD). `valid`: bool (B,), pairs that count.
    `count`: the number of pairs that means divide by; None: those that count. `method`: what stands for KL, of `SOFT`,
    with alpha and beta of dkd in `dkd`.
    """
    parts = ccd_parts(
        student_o,
        student_a,
        teacher_o,
        teacher_a,
        target,
        temperature=temperature,
        weight=weight,
        label_smoothing=label_smoothing,
        valid=valid,
        method=method,
        dkd=dkd,
    )
    if count is None:
        count = len(target) if valid is None else valid.sum().clamp(min=1)
    hard = (parts.ce_o + parts.ce_a).sum() / (2 * count)
    soft = (parts.kl_o + parts.w * parts.kl_a).sum() / (2 * count)
    hard_factor, soft_factor = coefficients(temperature, alpha, kd_weight)
    return hard_factor * hard + soft_factor * soft
