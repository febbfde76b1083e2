"""DIST: correlations instead of KL."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kernels import reference
from pipeline.config.ranges import NotNegative
from pipeline.training.methods.base import Method, View


@dataclass(frozen=True, kw_only=True)
class Dist(Method):
    """beta · inter + gamma · intra, no unit, each in [0, 2] on the mean: DIST (Huang et al., NeurIPS 2022).

    With q, p = softmax(·/T) of student and teacher and r Pearson's correlation: inter is 1 − r of row i of q and p
    (over classes), intra the mean over classes of 1 − r of a column of q and p (over the batch). Since r is the mean
    of a product of z-scores, sample i's share of intra is 1 − mean_c ẑ_ic·t̂_ic: not a loss by itself (it can be
    negative), but the weighted mean of these is intra, its moments weighted alike. Samples of weight 0 so leave no
    trace. Where either side does not vary, r = 0.

    The paper's correlation; the released code adds 1e-8 to the product of norms, which fades out classes that nobody
    in the batch believes in. The defaults are that code's, which has T = 1 and adds the term to 1 · CE.
    """

    name: ClassVar = "dist"

    beta: NotNegative = 1.0
    """Of the relation between classes."""
    gamma: NotNegative = 1.0
    """Of the relation within a class."""

    def term(self, view: View) -> Tensor:
        weight, temperature = view.weight, view.temperature
        q, p = (view.student / temperature).softmax(1), (view.teacher / temperature).softmax(1)
        batch = (weight / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny))[:, None]
        rows = 1 / q.shape[1]
        inter = 1 - (reference.zscores(q, 1, rows) * reference.zscores(p, 1, rows)).mean(1)
        intra = 1 - (reference.zscores(q, 0, batch) * reference.zscores(p, 0, batch)).mean(1)
        return self.beta * inter + self.gamma * intra
