"""Energy-KD: a temperature for what the teacher is sure of, and another for what it is not."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from kernels import reference
from pipeline.config.ranges import Part, Range
from pipeline.training.methods.base import Method, View


@dataclass(frozen=True, kw_only=True)
class Energy(Method):
    """T_i² · KL at T_i: warm · T for the samples of the lowest energy, cold · T for those of the highest, else T.

    Energy-KD (Kim et al., *Maximizing Discrimination Capability of Knowledge Distillation with Energy Function*,
    Knowledge-Based Systems 2024). A view's energy is −logsumexp of the teacher's raw logits; `share` of the epoch's
    views are of low energy, which the teacher is sure of, and as many of high. Of the paper only the abstract was to be
    had: that low energy takes the higher temperature is its, the three defaults are ours.
    """

    name: ClassVar = "energy"
    needs: ClassVar = frozenset({"logits", "energy"})

    share: Annotated[float, Range(0, 0.5)] = 0.3
    """Of the views that count as of low energy, and of high."""
    warm: Annotated[float, Range(1, 16)] = 1.5
    """Times T, for low energy."""
    cold: Part = 0.5
    """Times T, for high energy."""

    def term(self, view: View) -> Tensor:
        assert view.energy is not None
        one = view.energy.new_ones(())
        times = one.where(view.energy >= self.share, one * self.warm).where(view.energy < 1 - self.share, self.cold)
        z, t = (logits / (times[:, None] * view.temperature) for logits in (view.student, view.teacher))
        return times**2 * reference.kl_divergence(z, t, 1.0)
