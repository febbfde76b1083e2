"""Cosine Confidence Distillation in plain PyTorch: the specification that every kernel is tested against.

Works in any floating dtype and on any device; in float64 its autograd is the oracle. Source of the formulas: Li,
Shao, Qiu, Song, *What Role Does Data Augmentation Play in Knowledge Distillation?*, ACCV 2022.
"""

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


def cross_entropy(student: Tensor, target: Tensor) -> Tensor:
    """−log softmax(student)[target] in nats, (B, C) and integer (B,) -> (B,)."""
    return -F.log_softmax(student, dim=1).gather(1, target.long()[:, None]).squeeze(1)


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
    weight: Tensor | None = None,
) -> Tensor:
    """Loss of a batch of pairs of views, `o` original and `a` augmented -> scalar, differentiable in `student_*`.

        hard = mean of CE over all 2B rows
        soft = ½ · (mean_i KL_o,i + mean_i w_i · KL_a,i)
        loss = kd_weight · (alpha · hard + (1 − alpha) · T² · soft)

    `student_*`, `teacher_*`: logits (B, C); `target`: integer (B,). `weight`: w (B,); None takes
    `cosine_weight(teacher_o, teacher_a)`, ones make it plain distillation (KD).
    """
    teacher_o, teacher_a = teacher_o.detach(), teacher_a.detach()
    if weight is None:
        weight = cosine_weight(teacher_o, teacher_a)
    hard = (cross_entropy(student_o, target) + cross_entropy(student_a, target)).mean() / 2
    kl_o = kl_divergence(student_o, teacher_o, temperature)
    kl_a = kl_divergence(student_a, teacher_a, temperature)
    soft = (kl_o + weight.detach() * kl_a).mean() / 2
    hard_factor, soft_factor = coefficients(temperature, alpha, kd_weight)
    return hard_factor * hard + soft_factor * soft
