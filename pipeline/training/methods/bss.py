"""BSS: samples at the teacher's decision boundaries, made by its gradient."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from pipeline.config.ranges import Count, NotNegative, Part, Positive, Range
from pipeline.training.methods.kd import KnowledgeDistillation


@dataclass(frozen=True, kw_only=True)
class BoundarySamples(KnowledgeDistillation):
    """KD, also on samples that support a decision boundary.

    Heo et al., *Knowledge Distillation with Adversarial Samples Supporting Decision Boundary*, AAAI 2019.

    Of the original views that the teacher knows the first `samples` are moved, in `steps` steps, to where the teacher
    is as ready to say another class k, drawn by its own softmax at T: x ← x − rate · (L + ε) ∇L / |∇L|², L the logit
    of the label less that of k, as far as `reach` in each pixel. Their term counts `factor` times, less by a third more
    than the share of the run that is over. The numbers are from memory of the released code, which also asks that the
    student knows the sample, and keeps only samples that have come near the boundary.
    """

    name: ClassVar = "bss"
    needs: ClassVar = frozenset({"logits", "labels", "two classes", "attack"})

    samples: Count = 64
    """Of a batch, at most."""
    steps: Annotated[int, Range(1, 100)] = 10
    rate: Part = 0.3
    reach: Positive = 16.0
    """Levels of 255 that a pixel may change by."""
    factor: NotNegative = 2.0

    def weight(self, progress: float) -> float:
        return self.factor * max(1 - 4 / 3 * progress, 0.0)

    def invent(self, images: Tensor, target: Tensor, answer: Callable[[Tensor], Tensor], temperature: float) -> Tensor:
        with torch.no_grad():
            said = answer(images)
            known = (said.argmax(1) == target).nonzero()[: self.samples, 0]
            images, target, said = images[known], target[known], said[known]
            others = (said / temperature).softmax(1).scatter(1, target[:, None], 0).clamp(min=1e-12)
            others = others.scatter(1, target[:, None], 0)
            wanted = others.multinomial(1)[:, 0] if len(known) else target
        return to_boundary(images, target, wanted, answer, self.steps, self.rate, self.reach)


def to_boundary(
    images: Tensor,
    target: Tensor,
    wanted: Tensor,
    answer: Callable[[Tensor], Tensor],
    steps: int,
    rate: float,
    reach: float,
    beyond: float = 0.01,
) -> Tensor:
    """Images f32 (M, S, S, 3) moved until `answer` is as ready for the class `wanted` as for `target`, both (M,)."""
    moved = images
    for _ in range(steps if len(images) else 0):
        moved = moved.detach().requires_grad_()
        logits = answer(moved)
        gap = (logits.gather(1, target[:, None]) - logits.gather(1, wanted[:, None]))[:, 0]
        (slope,) = torch.autograd.grad(gap.sum(), moved)
        size = slope.flatten(1).square().sum(1).clamp(min=1e-12)
        far = rate * (gap.detach() + beyond) / size
        moved = moved.detach() - far[:, None, None, None] * slope
        moved = torch.minimum(torch.maximum(moved, images - reach), images + reach).clamp(0, 255)
    return moved
