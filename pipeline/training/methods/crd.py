"""CRD: a student's view is to be told by its teacher's features among those of others."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from cache.codec import Features
from pipeline.config.ranges import Count, NotNegative, Positive
from pipeline.networks.features import Learner
from pipeline.training.methods.features import FeatureMethod, FeatureView


class Embeddings(nn.Module):
    """Student and teacher on one sphere: features (n, ·) -> (n, `size`), of length 1."""

    def __init__(self, width: int, teacher_width: int, size: int):
        super().__init__()
        self.student, self.teacher = nn.Linear(width, size), nn.Linear(teacher_width, size)

    def forward(self, features: Tensor) -> Tensor:
        return normalize(self.student(features))

    def of_teacher(self, features: Tensor) -> Tensor:
        return normalize(self.teacher(features))


@dataclass(frozen=True, kw_only=True)
class Contrastive(FeatureMethod):
    """−log of e^(s·t/τ) over the sum of it and of e^(s·n/τ) of all negatives n, which are of other classes: Tian et
    al., *Contrastive Representation Distillation*, ICLR 2020; sizes, τ and beta are theirs.

    Their memory bank of embeddings, which lag behind, is the store: negatives are the teacher's features of views
    drawn from the epoch's labels at each step, embedded as of now, and shared by the batch. The estimator is InfoNCE
    (van den Oord et al., 2018) in the place of their NCE, whose constant is guessed from the first batch. Only the
    student's view is compared with many; their second term, a teacher's view with the student's of the past, is left
    out.
    """

    name: ClassVar = "crd"

    beta: NotNegative = 0.8
    size: Count = 128
    """Of the embeddings."""
    tau: Positive = 0.07
    negatives: Count = 16384
    """Views drawn at each step, both of each sample."""

    @property
    def drawn(self) -> int:
        return self.negatives

    def learner(self, body: nn.Module, width: int, code: Features) -> Learner:
        return Learner(body, Embeddings(width, code.width, self.size))

    def imitate(self, learner: Learner, view: FeatureView) -> Tensor:
        assert isinstance(learner.beside, Embeddings) and view.others is not None and view.differ is not None
        own = (view.student * learner.beside.of_teacher(view.teacher)).sum(1, keepdim=True)
        others = view.student @ learner.beside.of_teacher(view.others).T
        among = torch.cat([own, others.masked_fill(~view.differ, -torch.inf)], dim=1) / self.tau
        return among.logsumexp(1) - among[:, 0]
