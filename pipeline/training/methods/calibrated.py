"""A student's temperature that is fitted to the labels: the calibration of LPQLD."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.training.methods.base import Method, View

_WIDEST, _HALVINGS = 64.0, 26
"""How many times smaller or larger than T the student's may be; it is found to 2.5e-7 of itself, whose effect on the
loss, being least there, is of its square."""


@dataclass(frozen=True, kw_only=True)
class Calibrated(Method):
    """KL(softmax(t / T) ‖ softmax(z / S)), S the temperature of the student that makes its mean over the batch least.

    After *Soft Label Pruning and Quantization for Large-Scale Dataset Distillation* (LPQLD; Xiao, He, TPAMI 2026),
    whose calibrated alignment of student and teacher looks for that S. Its code looks at a list of them once an epoch;
    here S is exact, of each batch, and as the mean is least there its derivative has no part from S. So the size of the
    student's logits is free, and the gradient orthogonal to them. Its annealing of the teacher's T is not here.
    """

    name: ClassVar = "calibrated"

    def term(self, view: View) -> Tensor:
        log_p = (view.teacher / view.temperature).log_softmax(1)
        with torch.no_grad():
            scale = _fitted(view.student.detach(), log_p.exp(), view.weight, view.temperature)
        log_q = (view.student * scale).log_softmax(1)
        return torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q)).sum(1)


def _fitted(student: Tensor, p: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """1 / S, a scalar: the derivative of the mean KL in it grows with it, and is 0 where it is least."""
    student = student - student.mean(1, keepdim=True)
    wanted = (weight * (p * student).sum(1)).sum()
    centre = torch.full_like(wanted, -torch.tensor(temperature).log().item())
    low, high = centre - torch.tensor(_WIDEST).log().item(), centre + torch.tensor(_WIDEST).log().item()
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        said = (weight * ((student * middle.exp()).softmax(1) * student).sum(1)).sum()
        low, high = torch.where(said < wanted, middle, low), torch.where(said < wanted, high, middle)
    return ((low + high) / 2).exp()
