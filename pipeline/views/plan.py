"""Plans: which samples a loader makes next, and which of their views.

A plan is made of parts, a view and the rows wanted in it. Where parts come from is each caller's own: an epoch's order
(`pipeline.data.order.steps`), a block of a store, a random share of one.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.data.index import Index
from pipeline.views import drawing, mixing
from pipeline.views.policy import Policy

Part = tuple[int | Sequence[int] | None, np.ndarray]
"""A view and the index rows i64 (B,) wanted in it; view None is the central crop of evaluation. Of several views the
loader makes a batch each, and decodes once for all of them."""


class Request(NamedTuple):
    """What is made of B samples: M batches, for which they are decoded once."""

    rows: np.ndarray
    """Index rows i64 (B,)."""
    views: np.ndarray
    """(B, M) of dtype `pipeline.views.drawing.VIEW`; (B,) for one batch."""
    mixes: np.ndarray | None = None
    """(B, M) of dtype `pipeline.views.mixing.MIX`, if the policy does anything after the crop."""

    @property
    def read(self) -> np.ndarray:
        """Index rows i64 (W,) of all images that are wanted: the samples, then the partners of their views."""
        if self.mixes is None:
            return self.rows
        partners = self.mixes["partner"]
        return np.concatenate([self.rows, partners[partners >= 0]])

    @property
    def places(self) -> np.ndarray:
        """Where in `read` the partner of each view is, i64 (B, M); −1: it has none."""
        found = np.full(self.views.shape, -1)
        if self.mixes is not None:
            mixed = self.mixes["partner"] >= 0
            found[mixed] = len(self.rows) + np.arange(mixed.sum())
        return found


def requests(index: Index, policy: Policy, seed: int, parts: Iterable[Part]) -> Iterator[Request]:
    """A request for each of `parts`, its views drawn from `seed`."""
    for view, rows in parts:
        records, mixes = index.records[rows], None
        if view is None:
            drawn = [drawing.centre(records["height"], records["width"], policy)]
        else:
            views = [view] if isinstance(view, int) else view
            drawn = [drawing.of(records, seed, each, policy) for each in views]
            if policy.alters:
                mixes = np.stack([mixing.draw(index.records, rows, seed, each, policy) for each in views], axis=1)
        yield Request(rows, np.stack(drawn, axis=1), mixes)


def cut(view: int | Sequence[int] | None, rows: np.ndarray, size: int) -> Iterator[Part]:
    """Index rows i64 (n,) in parts of `size`, the last one smaller; of no rows one empty part."""
    for at in range(0, max(len(rows), 1), size):
        yield view, rows[at : at + size]
