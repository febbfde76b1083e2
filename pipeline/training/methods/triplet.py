"""Triplet loss: nearer to one's own teacher output than to what the student says of another class."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.config.ranges import NotNegative
from pipeline.training.methods.base import Method, View


@dataclass(frozen=True, kw_only=True)
class Triplet(Method):
    """max(0, |t_i − z_i| − |t_i − z_j| + margin), z_j the student's output for an image of another class: Oki et al.,
    *Triplet Loss for Knowledge Distillation*, IJCNN 2020.

    The defaults are the released code's, which adds `factor` times this to CE: alpha = 0.5 and kd_weight = 2 do. There
    is no temperature in it, so the T² of the loss is taken back. The authors draw j from the whole data set; here it is
    the next sample of the batch, which is in random order, that has another class. Where there is none the sample has
    no loss. Distances are of centred logits, as stores and softmax know them.
    """

    name: ClassVar = "triplet"
    needs: ClassVar = frozenset({"logits", "labels", "two classes"})

    margin: NotNegative = 5.0
    """Between the distances, in units of logits."""
    factor: NotNegative = 2.0

    def term(self, view: View) -> Tensor:
        z, t = (logits - logits.mean(1, keepdim=True) for logits in (view.student, view.teacher))
        rows = torch.arange(len(z), device=z.device)
        following = (rows[:, None] + rows[1:]) % len(z)  # (B, B − 1), the batch from each sample on
        other = (view.target[following] != view.target[:, None]) & (view.weight[following] > 0)
        at = following.gather(1, other.long().argmax(1, keepdim=True))[:, 0] if len(z) > 1 else rows
        near, far = _distance(t, z), _distance(t, z[at])
        return self.factor / view.temperature**2 * (near - far + self.margin).clamp(min=0).where(other.any(1), 0)


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """Of rows; where they meet it has no direction, and its derivative counts as 0."""
    squared = (one - other).square().sum(1)
    met = squared <= torch.finfo(squared.dtype).tiny
    return squared.where(~met, 1).sqrt().where(~met, 0)
