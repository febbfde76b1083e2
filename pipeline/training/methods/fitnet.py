"""FitNet: the student's features, projected, are to be the teacher's."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from cache.codec import Features
from pipeline.config.ranges import NotNegative
from pipeline.networks.features import Learner
from pipeline.training.methods.features import FeatureMethod, FeatureView


@dataclass(frozen=True, kw_only=True)
class FitNet(FeatureMethod):
    """Mean square of W s + b − t, or 1 − its cosine: Romero et al., *FitNets: Hints for Thin Deep Nets*, ICLR 2015.

    The hint is the last one, the pooled features, and is learned together with the labels, as in RepDistiller (Tian et
    al., ICLR 2020), from which beta is.
    """

    name: ClassVar = "fitnet"

    beta: NotNegative = 100.0
    distance: Literal["mse", "cosine"] = "mse"

    def learner(self, body: nn.Module, width: int, code: Features) -> Learner:
        return Learner(body, nn.Linear(width, code.width))

    def imitate(self, learner: Learner, view: FeatureView) -> Tensor:
        if self.distance == "cosine":
            return 1 - cosine_similarity(view.student, view.teacher, dim=1)
        return (view.student - view.teacher).square().mean(1)
