"""The loss of a batch of pairs of views by any method, in plain PyTorch: what combines its terms with the hard loss."""

import torch
from torch import Tensor, nn

from kernels import reference
from kernels.reference import Mixed
from pipeline.system import ranks
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
    energy: Tensor | None = None,
    kept: nn.Module | None = None,
    mixed: Mixed | None = None,
) -> Tensor:
    """`reference.ccd_loss` with another soft term than KL -> scalar, differentiable in `student`; or its hard and its
    soft part (2,), if the method takes their gradients apart.

        hard = mean of CE over all 2B rows
        soft = ½ · (mean_i soft_o,i + mean_i w_i · soft_a,i)
        loss = kd_weight · (alpha · hard + (1 − alpha) · T² · soft)

    `student`: logits (2, B, C); `teacher`: (B, 2, C), see `cache.codec.base` for the order of both; `target`:
    integer (B,). `weight`: w (B,) or one for all. `valid`: bool, pairs (B,) or views (2, B) that count; what stands
    in the others, NaN too, touches neither loss nor gradient, and they are not part of a batch that a method compares.
    `count`: the number of pairs, or half that of views, that means divide by; None: those that count.
    `energy`: (B, 2), and `kept`, as `View` has them. `mixed`: the augmented views' other labels, if there are any.
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
    for z, one in zip(student, ones, strict=True):
        hard = hard + (one * reference.cross_entropy(z, target, label_smoothing)).sum()
    if mixed is not None:
        hard = hard + (ones[1] * reference.beyond_own(student[1], target, mixed, label_smoothing)).sum()
    if kept is not None:
        method.observe(kept, ranks.total(hard.detach() / (2 * count * ranks.world())))
    for view, (z, t, w) in enumerate(zip(student, teacher.unbind(1), weight, strict=True)):
        of_view = None if energy is None else energy[:, view]
        seen = View(
            student=z,
            teacher=t,
            target=target,
            weight=w,
            temperature=temperature,
            mixed=mixed if view else None,
            energy=of_view,
            kept=kept,
        )
        soft = soft + (w * method.term(seen)).sum()
    hard_factor, soft_factor = reference.coefficients(temperature, alpha, kd_weight)
    hard, soft = hard_factor * hard, soft_factor * soft
    return (torch.stack([hard, soft]) if method.apart else hard + soft) / (2 * count)
