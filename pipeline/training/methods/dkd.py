"""DKD: the target and the other classes apart."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from kernels import reference
from pipeline.config.ranges import NotNegative
from pipeline.training.methods.base import Method, View


@dataclass(frozen=True, kw_only=True)
class Decoupled(Method):
    """`kernels.reference.decoupled`: Zhao et al., *Decoupled Knowledge Distillation*, CVPR 2022."""

    name: ClassVar = "dkd"
    needs: ClassVar = frozenset({"logits", "labels", "two classes"})
    kernel: ClassVar = "dkd"

    alpha: NotNegative = 1.0
    """Of the target's term."""
    beta: NotNegative = 8.0
    """Of the others' term; for ImageNet the authors take 0.5, at T = 1."""

    @property
    def for_kernel(self) -> dict[str, Any]:
        return {"dkd": (self.alpha, self.beta)}

    def term(self, view: View) -> Tensor:
        return reference.decoupled(view.student, view.teacher, view.target, view.temperature, self.alpha, self.beta)
