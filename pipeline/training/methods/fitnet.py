"""FitNet: the student's features, projected, are to be the teacher's."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from cache.codec import Features
from pipeline.config.ranges import NotNegative
from pipeline.networks.features import Learner, Pointwise
from pipeline.training.methods.features import FeatureMethod, FeatureView


@dataclass(frozen=True, kw_only=True)
class FitNet(FeatureMethod):
    """Mean square of r(s) − t, or 1 − their cosine: Romero et al., *FitNets: Hints for Thin Deep Nets*, ICLR 2015.

    r is linear, with batch norm. The hint is the last one, the pooled features, and is learned together with the
    labels, as in RepDistiller (Tian et al., ICLR 2020), from which beta is; r ends in ReLU there, which other teachers'
    features may not suit.
    """

    name: ClassVar = "fitnet"

    beta: NotNegative = 100.0
    distance: Literal["mse", "cosine"] = "mse"

    def learner(self, body: nn.Module, width: int, code: Features) -> Learner:
        return Learner(body, Pointwise(nn.Conv2d(width, code.width, 1, bias=False), nn.BatchNorm2d(code.width)))

    def imitate(self, learner: Learner, view: FeatureView) -> Tensor:
        if self.distance == "cosine":
            return 1 - cosine_similarity(view.student, view.teacher, dim=1)
        return (view.student - view.teacher).square().mean(1)
