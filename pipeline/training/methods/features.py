"""What methods have in common that compare a student's pooled features with the teacher's, as a store keeps them."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from cache.codec import Features
from pipeline.config.ranges import NotNegative
from pipeline.networks.features import Learner
from pipeline.training.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class FeatureView:
    """What a term compares: n views, in float32 or float64."""

    student: Tensor
    """(n, ·), what the method's learner makes of the student's features."""
    teacher: Tensor
    """Features (n, F)."""
    others: Tensor | None = None
    """Features (K, F) of views drawn from the epoch's labels."""
    differ: Tensor | None = None
    """Bool (n, K): whether these are of another class; of another sample, where there are no labels."""


@dataclass(frozen=True, kw_only=True)
class FeatureMethod(Method):
    """kd_weight · (alpha · CE + (1 − alpha) · (beta · term + kd · T² · KL)), means over all views, w ≡ 1.

    By default that is CE + beta · term, as the authors have it. Nothing but the store answers for the teacher.
    """

    needs: ClassVar = frozenset({"logits", "features"})
    hard: ClassVar = True
    """Whether labels count: else the loss is beta · term + kd · T² · KL."""

    beta: NotNegative = 1.0
    """Of the term."""
    kd: NotNegative = 0.0
    """Of KL(teacher ‖ student) at T, times T²."""

    @property
    def drawn(self) -> int:
        """How many other views' features the term takes."""
        return 0

    @abstractmethod
    def learner(self, body: nn.Module, width: int, code: Features) -> Learner:
        """The student, which has `width` features, with what learns beside it; initialised by the global generator."""

    @abstractmethod
    def imitate(self, learner: Learner, view: FeatureView) -> Tensor:
        """The soft loss of each view (n,)."""
