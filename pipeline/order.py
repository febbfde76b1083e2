"""The order of an epoch: (seed, epoch) -> rows, and (step, rank, world) -> the rows of one step.

The permutation knows nothing of batch size, rank or world size, so a run resumes from (epoch, step) alone and sees
every sample exactly once per epoch whatever machine it continues on.
"""

import numpy as np

from pipeline.philox import philox

_DOMAIN = 0x0DE5  # counter word that keeps orders apart from views


def permutation(seed: int, epoch: int, rows: np.ndarray) -> np.ndarray:
    """`rows` i64 (N,) in the order of `epoch`: sorted by a random 64-bit word each, ties by position."""
    words = philox((np.arange(len(rows)), 0, epoch, _DOMAIN), seed)
    return rows[np.argsort(words[:, :2].copy().view("<u8")[:, 0], kind="stable")]


def steps_per_epoch(samples: int, batch: int) -> int:
    """Steps of one epoch with a global batch of `batch` samples; the last one may be smaller."""
    return -(-samples // batch)


def rows_of_step(order: np.ndarray, step: int, batch: int, rank: int = 0, world: int = 1) -> np.ndarray:
    """The rows i64 that `rank` handles in `step`: an equal share of the global batch, within one sample."""
    return np.array_split(order[step * batch : (step + 1) * batch], world)[rank]
