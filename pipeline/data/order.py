"""The order of a run: (seed, epoch) -> rows, cut into steps, and those into the shares of ranks.

The permutation knows nothing of batch size, rank or world size, so a run resumes from (epoch, step) alone and sees
every sample exactly once per epoch whatever machine it continues on.
"""

from collections.abc import Iterator

import numpy as np

from cache.errors import UserError
from cache.philox import philox

_SAMPLES, _SHARDS = 0x0DE5, 0x0DE6  # counter words that keep orders apart from views


def permutation(
    seed: int, epoch: int, rows: np.ndarray, shards: np.ndarray | None = None, window: int = 0
) -> np.ndarray:
    """`rows` i64 (N,) in the order of `epoch`: sorted by a random 64-bit word each, ties by position; i64 (N,).

    With a `window`, the shards are put in a random order, so many at a time are a window, and rows are shuffled
    within their window only: storage then reads few shards at once, each nearly whole. `shards` (N,) is the shard of
    each row.
    """
    words = _words(len(rows), seed, epoch, _SAMPLES)
    if not window or shards is None:
        return rows[np.argsort(words, kind="stable")]
    rank = np.argsort(np.argsort(_words(int(shards.max(initial=0)) + 1, seed, epoch, _SHARDS), kind="stable"))
    return rows[np.lexsort((words, rank[shards] // window))]


def _words(count: int, seed: int, epoch: int, purpose: int) -> np.ndarray:
    """Random words u64 (count,)."""
    return philox((np.arange(count), 0, epoch, purpose), seed)[:, :2].copy().view("<u8")[:, 0]


def steps_per_epoch(samples: int, batch: int, least: int = 1) -> int:
    """Steps of one epoch with a global batch of `batch` samples.

    The last one may be smaller, but not below `least` samples: so few join the one before.
    """
    steps = -(-samples // batch)
    return steps - (steps > 1 and samples - (steps - 1) * batch < least)


def steps(
    seed: int,
    rows: np.ndarray,
    batch: int,
    epochs: int,
    start: tuple[int, int] = (0, 0),
    *,
    shards: np.ndarray | None = None,
    window: int = 0,
    rank: int = 0,
    world: int = 1,
    least: int = 1,
) -> Iterator[tuple[int, np.ndarray]]:
    """(epoch, the rows i64 that `rank` handles) of every step from `start`, an (epoch, step), to the last epoch's end.

    `batch` is the global one; a rank's share of it is equal to within one sample. `shards` and `window` as in
    `permutation`, `least` as in `steps_per_epoch`.
    """
    first_epoch, step = start
    count = steps_per_epoch(len(rows), batch, least)
    for epoch in range(first_epoch, epochs):
        order = permutation(seed, epoch, rows, shards, window)
        for at in range(step, count):
            stop = (at + 1) * batch if at + 1 < count else len(order)
            yield epoch, np.array_split(order[at * batch : stop], world)[rank]
        step = 0


def few_shot(rows: np.ndarray, labels: np.ndarray, share: float) -> np.ndarray:
    """A share of each class's rows, at least one, drawn with seed 0 (claim d of the paper); i64, sorted.

    `rows` i64 (N,) and their `labels`. A larger share contains a smaller one. Raises UserError unless it is in (0, 1].
    """
    if not 0 < share <= 1:
        raise UserError("--few-shot out of range", found=share, expected="a share in (0, 1]")
    if share == 1:
        return rows
    shuffled = np.random.default_rng(0).permutation(len(rows))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels)
    place = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)  # of a sample in its class
    return np.sort(rows[by_class[place < np.maximum(np.rint(share * counts), 1)[labels[by_class]]]])
