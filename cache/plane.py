"""One view's labels of all samples in memory: what the student gathers from, step by step."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from cache.store import Store


@dataclass(frozen=True, eq=False)
class Plane:
    view: int
    encoded: np.ndarray
    """u8 (N, row_bytes), for the store's codec to decode."""
    weight: np.ndarray
    """f32 (N,), w = 1 + cos of the pair's raw logits; NaN where the teacher skipped the sample."""
    digest: np.ndarray
    """u32 (N, 2), CRC-32 of the pixels the teacher saw, original and augmented."""
    good: np.ndarray
    """bool (N,); a quarantined sample has no labels."""

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Encoded pairs u8 (B, row_bytes) and weights f32 (B,) of index rows i64 (B,)."""
        assert self.good[rows].all(), "a quarantined sample has no labels"
        return self.encoded[rows], self.weight[rows]


def planes(store: "Store", views: Iterable[int]) -> Iterator[Plane]:
    """The planes of `views`, in order; while one is in use the next one loads in the background.

    A view that follows itself is not read again. What `Store.load_plane` raises surfaces when its plane is due.
    """
    remaining = iter(views)
    view = next(remaining, None)
    plane: Plane | None = None
    ahead: Future[Plane] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="plane") as pool:
        while view is not None:
            if plane is None or plane.view != view:
                plane = (ahead or pool.submit(store.load_plane, view)).result()
            following = next(remaining, None)
            ahead = None if following in (None, view) else pool.submit(store.load_plane, following)
            yield plane
            view = following
