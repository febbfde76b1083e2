"""IDA: soft labels made to agree with the order of the hard ones."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pipeline.training.methods.base import Method, View


@dataclass(frozen=True, kw_only=True)
class Isotonic(Method):
    """KL(m ‖ student), m the nearest distribution to the teacher's at T that does not contradict the labels: Cui, Yan,
    *Isotonic Data Augmentation for Knowledge Distillation*, IJCAI 2021.

    The label's class is to be the likeliest; of a mixed sample the larger part's, then the smaller part's. `tree` is
    the isotonic regression, least squares under that order, by sorting: O(C log C). `linear` needs no sorting and one
    pass: it also keeps the order and the sum, but is further away. The paper has such an approximation too; ours was
    made without its text.
    """

    name: ClassVar = "ida"
    needs: ClassVar = frozenset({"logits", "labels"})

    solver: Literal["tree", "linear"] = "tree"

    def term(self, view: View) -> Tensor:
        p = (view.teacher / view.temperature).softmax(1)
        labels = (view.target,)
        if view.mixed is not None:
            partner, own = view.mixed.partner_target, view.mixed.ratio >= 0.5
            labels = view.target.where(own, partner), partner.where(own, view.target)
        m = (tree if self.solver == "tree" else linear)(p, *labels)
        log_q = (view.student / view.temperature).log_softmax(1)
        return torch.where(m > 0, m * (m.clamp(min=torch.finfo(m.dtype).tiny).log() - log_q), 0.0).sum(1)


def tree(p: Tensor, first: Tensor, second: Tensor | None = None) -> Tensor:
    """The nearest m to p (B, C), by least squares, with m[first] ≥ all others; with `second`, of a mixed sample, also
    m[second] ≥ the rest. `first` and `second`: classes i64 (B,), the larger part's first; one of both: one label.

    Rows keep their sum. Under a class that must be the largest lie all others, in a star: with k of them, the largest,
    at its level, that level is the mean of the k + 1, and the right k makes it the largest. Where the second class so
    rises above the first, both share a level.
    """
    of_first = _level(p, first[:, None])
    if second is None:
        return _under(p, first, of_first)
    rest = p.scatter(1, first[:, None], -torch.inf)
    of_second = _level(rest, second[:, None])
    both = torch.stack([first, second], 1)
    shared = _level(p, both)
    own = p.gather(1, first[:, None])
    crossed = of_second > own
    low = torch.where(crossed, shared, of_second)
    found = torch.minimum(p, low).scatter(1, second[:, None], low)
    found = found.scatter(1, first[:, None], torch.where(crossed, shared, own))
    return torch.where((first == second)[:, None], _under(p, first, of_first), found)


def linear(p: Tensor, first: Tensor, second: Tensor | None = None) -> Tensor:
    """As `tree`, in one pass: a class that must be larger takes the mean of itself with all that are too large."""
    found = _pooled(p, first[:, None])
    if second is None:
        return found
    rest = torch.ones_like(p, dtype=torch.bool).scatter(1, first[:, None], False)
    own, low = p.gather(1, first[:, None]), p.gather(1, second[:, None])
    above = rest & (p >= low)
    level = (p * above).sum(1, keepdim=True) / above.sum(1, keepdim=True)
    mixed = torch.where(above, level, p)
    mixed = torch.where(level > own, _pooled(mixed, first[:, None]), mixed)
    return torch.where((first == second)[:, None], found, mixed)


def _under(p: Tensor, first: Tensor, level: Tensor) -> Tensor:
    return torch.minimum(p, level).scatter(1, first[:, None], level)


def _level(p: Tensor, tied: Tensor) -> Tensor:
    """Where the classes `tied` (B, n) come to lie, with the largest of all others pulled down to them: (B, 1)."""
    others = p.scatter(1, tied, -torch.inf).sort(1, descending=True).values
    counted = others.isfinite()
    sums = others.where(counted, 0).cumsum(1)
    own, n = p.gather(1, tied).sum(1, keepdim=True), tied.shape[1]
    means = (own + sums) / (n + torch.arange(1, p.shape[1] + 1, device=p.device))
    best = means.where(counted, -torch.inf).amax(1, keepdim=True)
    return torch.maximum(best, own / n)


def _pooled(p: Tensor, first: Tensor) -> Tensor:
    above = p >= p.gather(1, first)
    return torch.where(above, (p * above).sum(1, keepdim=True) / above.sum(1, keepdim=True), p)
