"""KL of softened outputs, and what Cosine Confidence Distillation makes of it by weighing the augmented views."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kernels import reference
from pipeline.training.methods.base import Method, View


@dataclass(frozen=True, kw_only=True)
class KnowledgeDistillation(Method):
    """KL(teacher ‖ student) at T, w ≡ 1: Hinton et al., *Distilling the Knowledge in a Neural Network*, 2015."""

    name: ClassVar = "kd"
    kernel: ClassVar = "kd"

    def term(self, view: View) -> Tensor:
        return reference.kl_divergence(view.student, view.teacher, view.temperature)


@dataclass(frozen=True, kw_only=True)
class CosineConfidence(KnowledgeDistillation):
    """KD whose augmented views weigh w = 1 + cos of the teacher's raw logits for both views: Li et al., ACCV 2022."""

    name: ClassVar = "ccd"
    needs: ClassVar = frozenset({"logits", "agreement"})


@dataclass(frozen=True, kw_only=True)
class MeanConfidence(KnowledgeDistillation):
    """KD whose augmented views all weigh the mean of w over the epoch's labels: the fair control of CCD."""

    name: ClassVar = "ccd-mean"
    needs: ClassVar = frozenset({"logits", "mean agreement"})
