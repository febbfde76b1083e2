"""DYTKD: a temperature that moves with the loss."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from kernels import reference
from pipeline.config import TrainStudent
from pipeline.config.ranges import NotNegative, Positive, Share
from pipeline.training.methods.base import Method, View


class Kept(nn.Module):
    """The temperature of now."""

    temperature: Tensor

    def __init__(self, temperature: float):
        super().__init__()
        self.register_buffer("temperature", torch.tensor(temperature))


@dataclass(frozen=True, kw_only=True)
class MovingTemperature(Method):
    """T² · KL at a T that grows while the hard loss is large and falls while it is small (github.com/wln130221/DYTKD).

    It begins at --temperature (the authors' is 3). Before each batch it is multiplied by 1 + rise if the batch's mean
    cross-entropy is above `high`, by 1 − fall if that lies between `low` and `lower`. The defaults are the released
    code's, which takes 0.3 · CE + 0.7 · this. That code moves T but leaves its loss at 3; here T is the loss's, as its
    text says. It has no bounds; `least` and `most` are ours.
    """

    name: ClassVar = "dytkd"
    needs: ClassVar = frozenset({"logits", "labels"})

    high: NotNegative = 3.5
    """Nats of cross-entropy above which T grows."""
    rise: Share = 0.1
    lower: NotNegative = 0.08
    """Nats of cross-entropy below which T falls."""
    low: NotNegative = 0.04
    """Nats of cross-entropy down to which it does."""
    fall: Share = 0.09
    least: Positive = 1.0
    most: Positive = 16.0

    def keeps(self, config: TrainStudent) -> Kept:
        return Kept(config.temperature)

    def observe(self, kept: nn.Module, hard: Tensor) -> None:
        assert isinstance(kept, Kept)
        grown, fallen = hard > self.high, (hard > self.low) & (hard < self.lower)
        factor = 1 + self.rise * grown.float() - self.fall * fallen.float()
        kept.temperature.mul_(factor).clamp_(self.least, self.most)

    def term(self, view: View) -> Tensor:
        kept = view.kept
        moved = kept.temperature.to(view.student.dtype) if isinstance(kept, Kept) else view.temperature
        return (moved / view.temperature) ** 2 * reference.kl_divergence(
            view.student / moved, view.teacher / moved, 1.0
        )
