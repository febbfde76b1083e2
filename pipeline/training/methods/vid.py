"""VID: a Gaussian of the teacher's features, given the student's."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from cache.codec import Features
from pipeline.config.ranges import Positive
from pipeline.networks.features import Learner
from pipeline.training.methods.features import FeatureMethod, FeatureView

_LEAST = 1e-5


class Gaussian(nn.Module):
    """The mean, of features (n, width) -> (n, F), and a variance per feature, the same for all samples."""

    def __init__(self, width: int, out: int, variance: float):
        super().__init__()
        layers = nn.Linear(width, out), nn.ReLU(), nn.Linear(out, out), nn.ReLU(), nn.Linear(out, out)
        self.mean = nn.Sequential(*layers)
        self.scale = nn.Parameter(torch.full((out,), math.log(math.expm1(variance - _LEAST))))

    def forward(self, features: Tensor) -> Tensor:
        return self.mean(features)

    @property
    def variance(self) -> Tensor:
        return softplus(self.scale) + _LEAST


@dataclass(frozen=True, kw_only=True)
class Variational(FeatureMethod):
    """½ mean_c ((μ_c(s) − t_c)² / σ²_c + log σ²_c), a bound on mutual information up to a constant: Ahn et al.,
    *Variational Information Distillation for Knowledge Transfer*, CVPR 2019.

    μ, the first variance and beta as in RepDistiller, of pooled features. It may be negative.
    """

    name: ClassVar = "vid"

    variance: Positive = 5.0
    """σ² to begin with."""

    def learner(self, body: nn.Module, width: int, code: Features) -> Learner:
        return Learner(body, Gaussian(width, code.width, self.variance))

    def imitate(self, learner: Learner, view: FeatureView) -> Tensor:
        assert isinstance(learner.beside, Gaussian)
        variance = learner.beside.variance
        return ((view.student - view.teacher).square() / variance + variance.log()).mean(1) / 2
