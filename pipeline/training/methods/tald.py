"""TALD: the teacher's answers all around a sample, where they change most."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from pipeline.config.ranges import Count, NotNegative, Positive, Range
from pipeline.training.methods.kd import KnowledgeDistillation


@dataclass(frozen=True, kw_only=True)
class AdversarialLocal(KnowledgeDistillation):
    """KD, also on adversarial examples of the teacher.

    Nguyen-Duc et al., *Adversarial Local Distribution Regularization for Knowledge Distillation*, WACV 2023.

    Of the first `samples` original views `particles` each begin anywhere within `reach` and climb the teacher's
    cross-entropy with the label by `steps` steps of `rate` levels along the gradient's sign, within the ball. Student
    and teacher are compared there, `factor` times. Of the paper only the abstract was to be had: its distribution over
    the ball is here one of independent particles, and all numbers are ours.
    """

    name: ClassVar = "tald"
    needs: ClassVar = frozenset({"logits", "labels", "attack"})

    samples: Count = 32
    """Of a batch, at most."""
    particles: Annotated[int, Range(1, 16)] = 2
    steps: Annotated[int, Range(1, 100)] = 4
    rate: Positive = 2.0
    """Levels of 255 that a step changes a pixel by."""
    reach: Positive = 8.0
    """Levels of 255 that a pixel may change by."""
    factor: NotNegative = 1.0

    def weight(self, progress: float) -> float:
        return self.factor

    def invent(self, images: Tensor, target: Tensor, answer: Callable[[Tensor], Tensor], temperature: float) -> Tensor:
        centre = images[: self.samples].repeat(self.particles, 1, 1, 1)
        start = centre + self.reach * (2 * torch.rand_like(centre) - 1)
        return climbed(
            centre, start, target[: self.samples].repeat(self.particles), answer, self.steps, self.rate, self.reach
        )


def climbed(
    centre: Tensor,
    start: Tensor,
    target: Tensor,
    answer: Callable[[Tensor], Tensor],
    steps: int,
    rate: float,
    reach: float,
) -> Tensor:
    """Images f32 (M, S, S, 3) from `start` to where the cross-entropy of `answer` with `target` (M,) is larger."""

    def within(moved: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(moved, centre - reach), centre + reach).clamp(0, 255)

    moved = within(start)
    for _ in range(steps if len(centre) else 0):
        moved = moved.detach().requires_grad_()
        hard = torch.nn.functional.cross_entropy(answer(moved), target, reduction="sum")
        (slope,) = torch.autograd.grad(hard, moved)
        moved = within(moved.detach() + rate * slope.sign())
    return moved
