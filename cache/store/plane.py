"""One view's labels of all samples."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Plane:
    view: int
    codes: np.ndarray
    """u8 (N, row_bytes), for the store's codec to decode."""
    weight: np.ndarray
    """f32 (N,), w = 1 + cos of the pair's raw logits; NaN where the teacher skipped the sample."""
    digest: np.ndarray
    """u32 (N,), `cache.pair_digest` of the CRC-32s of the pixels that the teacher saw."""
    good: np.ndarray
    """bool (N,); a quarantined sample has no labels."""
    energy: np.ndarray | None = None
    """f32 (N, 2), −logsumexp of the teacher's raw logits, original and augmented, where the store keeps it."""

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes u8 (B, row_bytes) and weights f32 (B,) of index rows i64 (B,)."""
        assert self.good[rows].all(), "a quarantined sample has no labels"
        return self.codes[rows], self.weight[rows]
