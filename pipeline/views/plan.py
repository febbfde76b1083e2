"""Plans: which samples a loader makes next, and which of their views.

A plan is made of parts, a view and the rows wanted in it. Where parts come from is each caller's own: an epoch's order
(`pipeline.data.order.steps`), a block of a store, a random share of one.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from pipeline.data.index import Index
from pipeline.views import drawing
from pipeline.views.policy import Policy

Part = tuple[int | Sequence[int] | None, np.ndarray]
"""A view and the index rows i64 (B,) wanted in it; view None is the central crop of evaluation. Of several views the
loader makes a batch each, and decodes once for all of them."""

Request = tuple[np.ndarray, np.ndarray]
"""Index rows i64 (B,) and their views (B, M) of dtype `pipeline.views.drawing.VIEW`, for M batches; (B,) for one."""


def requests(index: Index, policy: Policy, seed: int, parts: Iterable[Part]) -> Iterator[Request]:
    """A request for each of `parts`, its views drawn from `seed`."""
    for view, rows in parts:
        records = index.records[rows]
        if view is None:
            drawn = [drawing.centre(records["height"], records["width"], policy)]
        else:
            drawn = [drawing.of(records, seed, each, policy) for each in ([view] if isinstance(view, int) else view)]
        yield rows, np.stack(drawn, axis=1)


def cut(view: int | Sequence[int] | None, rows: np.ndarray, size: int) -> Iterator[Part]:
    """Index rows i64 (n,) in parts of `size`, the last one smaller; of no rows one empty part."""
    for at in range(0, max(len(rows), 1), size):
        yield view, rows[at : at + size]
