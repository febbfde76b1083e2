"""The loss of a batch of pairs of views by any method, in plain PyTorch: what combines its terms with the hard loss."""

import torch
from torch import Tensor

from kernels import reference
from pipeline.training.methods.base import Method, View


def loss(
    method: Method,
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
) -> Tensor:
    """`reference.ccd_loss` with another soft term than KL -> scalar, differentiable in `student`.

        hard = mean of CE over all 2B rows
        soft = ½ · (mean_i soft_o,i + mean_i w_i · soft_a,i)
        loss = kd_weight · (alpha · hard + (1 − alpha) · T² · soft)

    `student`: logits (2, B, C), the original views and the augmented ones; `teacher`: (B, 2, C), as a store decodes
    them; `target`: integer (B,). `weight`: w (B,) or one for all. `valid`: bool, pairs (B,) or views (2, B) that count;
    what stands in the others, NaN too, touches neither loss nor gradient, and they are not part of a batch that a
    method compares. `count`: the number of pairs, or half that of views, that means divide by; None: those that count.
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
        view = View(student=z, teacher=t, target=target, weight=w, temperature=temperature)
        hard = hard + (one * reference.cross_entropy(z, target, label_smoothing)).sum()
        soft = soft + (w * method.term(view)).sum()
    hard_factor, soft_factor = reference.coefficients(temperature, alpha, kd_weight)
    return (hard_factor * hard + soft_factor * soft) / (2 * count)
