"""SimKD: the student ends in the teacher's classifier."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from cache.codec import Features
from pipeline.config.ranges import Count
from pipeline.networks.features import Head, Learner, Reusing
from pipeline.training.methods.features import FeatureMethod, FeatureView


@dataclass(frozen=True, kw_only=True)
class SimKD(FeatureMethod):
    """Mean square of P(s) − t, and no label: Chen et al., *Knowledge Distillation with the Reused Teacher Classifier*,
    CVPR 2022.

    P is the authors' projector of three layers with F / factor channels between them. Theirs is for maps; of pooled
    features its middle layer sees a single pixel, and it ends without ReLU, as other teachers' features may be
    negative. The weights exported are the student's, P's and the teacher's classifier's.
    """

    name: ClassVar = "simkd"
    hard: ClassVar = False

    factor: Count = 2

    def learner(self, body: nn.Module, width: int, code: Features) -> Learner:
        return Reusing(body, width, max(code.width // self.factor, 1), Head(*code.head))

    def imitate(self, learner: Learner, view: FeatureView) -> Tensor:
        return (view.student - view.teacher).square().mean(1)
