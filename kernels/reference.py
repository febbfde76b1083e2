"""Cosine Confidence Distillation in plain PyTorch: the specification that every kernel is tested against.

Works in any floating dtype and on any device; in float64 its autograd is the oracle. Source of the formulas: Li,
Shao, Qiu, Song, *What Role Does Data Augmentation Play in Knowledge Distillation?*, ACCV 2022.
"""

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


def cross_entropy(student: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """−Σ_c y_c log softmax(student)_c in nats, (B, C) and integer (B,) -> (B,); y is (1 − ε) e_target + ε/C."""
    log_q = F.log_softmax(student, dim=1)
    picked = log_q.gather(1, target.long()[:, None]).squeeze(1)
    return -(1 - label_smoothing) * picked - (label_smoothing * log_q.mean(1) if label_smoothing else 0)


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    target: Tensor | None = None,
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """T² · KL, mean over all rows of logits (..., C) -> scalar; with `target` (...) alpha · CE + (1 − alpha) · that."""
    student, teacher = student.flatten(0, -2), teacher.detach().flatten(0, -2)
    soft = temperature**2 * kl_divergence(student, teacher, temperature).mean()
    if target is None:
        return soft
    return alpha * cross_entropy(student, target.flatten(), label_smoothing).mean() + (1 - alpha) * soft


class Parts(NamedTuple):
    """What a loss is made of, per pair, (B,) each; zero where there is no label."""

    ce_o: Tensor
    ce_a: Tensor
    kl_o: Tensor
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
    parts = Parts(
        cross_entropy(student_o, target, label_smoothing),
        cross_entropy(student_a, target, label_smoothing),
        kl_divergence(student_o, teacher_o, temperature),
        kl_divergence(student_a, teacher_a, temperature),
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
) -> Tensor:
    """Loss of a batch of pairs of views, `o` original and `a` augmented -> scalar, differentiable in `student_*`.

        hard = mean of CE over all 2B rows
        soft = ½ · (mean_i KL_o,i + mean_i w_i · KL_a,i)
        loss = kd_weight · (alpha · hard + (1 − alpha) · T² · soft)

    `student_*`, `teacher_*`: logits (B, C); `target`: integer (B,). `weight`: w (B,) or one for all; None takes
    `cosine_weight(teacher_o, teacher_a)`, 1 makes it plain distillation (KD). `valid`: bool (B,), pairs that count.
    `count`: the number of pairs that means divide by; None: those that count.
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
    )
    if count is None:
        count = len(target) if valid is None else valid.sum().clamp(min=1)
    hard = (parts.ce_o + parts.ce_a).sum() / (2 * count)
    soft = (parts.kl_o + parts.w * parts.kl_a).sum() / (2 * count)
    hard_factor, soft_factor = coefficients(temperature, alpha, kd_weight)
    return hard_factor * hard + soft_factor * soft
