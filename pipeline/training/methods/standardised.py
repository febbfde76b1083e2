"""Logit standardisation: KL of z-scores."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kernels import reference
from pipeline.training.methods.base import Method, View


@dataclass(frozen=True, kw_only=True)
class Standardised(Method):
    """`kernels.reference.standardised`: Sun et al., *Logit Standardization in Knowledge Distillation*, CVPR 2024."""

    name: ClassVar = "standardised"
    kernel: ClassVar = "standardised"

    def term(self, view: View) -> Tensor:
        return reference.standardised(view.student, view.teacher, view.temperature)
