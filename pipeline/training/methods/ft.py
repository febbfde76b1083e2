"""FT: the factors of the teacher's features."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from cache.codec import Features
from pipeline.config.ranges import NotNegative, Part
from pipeline.networks.features import Learner
from pipeline.training.methods.features import FeatureMethod, FeatureView


class Factors(nn.Module):
    """The student's translator, features (n, width) -> (n, k), and the teacher's paraphraser."""

    mean: Tensor
    directions: Tensor

    def __init__(self, width: int, mean: np.ndarray, directions: np.ndarray):
        """`mean` f32 (F,), `directions` f32 (k, F)."""
        super().__init__()
        size = len(directions)
        self.translator = nn.Sequential(
            nn.Linear(width, width), nn.LeakyReLU(0.1), nn.Linear(width, size), nn.LeakyReLU(0.1), nn.Linear(size, size)
        )
        self.register_buffer("mean", torch.from_numpy(mean))
        self.register_buffer("directions", torch.from_numpy(directions))

    def forward(self, features: Tensor) -> Tensor:
        return self.translator(features)

    def of_teacher(self, features: Tensor) -> Tensor:
        return (features - self.mean) @ self.directions.T


@dataclass(frozen=True, kw_only=True)
class FactorTransfer(FeatureMethod):
    """Mean over factors of |s / ‖s‖ − t / ‖t‖|: Kim et al., *Paraphrasing Complex Network: Network Compression via
    Factor Transfer*, NeurIPS 2018; beta, p = 1 and the share of factors are theirs.

    Their paraphraser is an autoencoder of maps, trained before. Of pooled features a linear one's optimum is known: the
    principal directions, which the store's code has; t are the coefficients along those of most variance.
    """

    name: ClassVar = "ft"

    beta: NotNegative = 500.0
    share: Part = 0.5
    """Of factors in features."""

    def learner(self, body: nn.Module, width: int, code: Features) -> Learner:
        size = max(round(self.share * code.width), 1)
        return Learner(body, Factors(width, *code.principal(size)))

    def imitate(self, learner: Learner, view: FeatureView) -> Tensor:
        assert isinstance(learner.beside, Factors)
        return (normalize(view.student) - normalize(learner.beside.of_teacher(view.teacher))).abs().mean(1)
