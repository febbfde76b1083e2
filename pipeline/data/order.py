"""The order of a run: (seed, epoch) -> rows, cut into steps, and those into the shares of ranks.

The permutation knows nothing of batch size, rank or world size, so a run resumes from (epoch, step) alone and sees
every sample exactly once per epoch whatever machine it continues on.
"""

from collections.abc import Iterator

import numpy as np

from cache.errors import UserError
from cache.philox import philox

_SAMPLES, _SHARDS = 0x0DE5, 0x0DE6  # counter words that keep orders apart from views


Rows = np.ndarray | range
"""i64 (N,) ascending; a range where no row is missing, so that 100 million of them take no memory."""


def permutation(seed: int, epoch: int, rows: Rows, bounds: np.ndarray | None = None, window: int = 0) -> np.ndarray:
    """`rows` in the order of `epoch`: sorted by a random 64-bit word each, ties by position; i64 (N,).

    With a `window`, the shards are put in a random order, so many at a time are a window, and rows are shuffled
    within their window only: storage then reads few shards at once, each nearly whole. `bounds` as `shard_bounds`
    gives them.
    """
    return np.concatenate([np.empty(0, np.int64), *_windows(seed, epoch, rows, bounds, window)])


def shard_bounds(shards: np.ndarray, rows: Rows) -> np.ndarray:
    """i64 (S + 1,): the position in `rows` of each shard's first row, and their number N.

    `shards` (index rows,) is the shard of each row, ascending; of a mapped array little is read: every shard's end is
    found by bisection.
    """
    count = int(shards[rows[-1]]) + 1 if len(rows) else 0
    low, high = np.zeros(count, np.int64), np.full(count, len(rows))
    while (low < high).any():
        middle = np.minimum((low + high) // 2, len(rows) - 1)
        before = (shards[_taken(rows, middle)] < np.arange(count)) & (low < high)
        low, high = np.where(before, middle + 1, low), np.where(before, high, np.minimum(high, middle))
    return np.append(low, len(rows))


def _windows(
    seed: int, epoch: int, rows: Rows, bounds: np.ndarray | None, window: int, skip: int = 0
) -> Iterator[np.ndarray]:
    """The order's windows, one after the other, without its first `skip` rows."""
    if not window or bounds is None:
        bounds, window = np.array([0, len(rows)]), 1
    order = np.argsort(_words(np.arange(len(bounds) - 1), seed, epoch, _SHARDS), kind="stable")
    for at in range(0, len(order), window):
        shards = np.sort(order[at : at + window])
        size = int((bounds[shards + 1] - bounds[shards]).sum())
        if skip < size:
            positions = np.concatenate([np.arange(*bounds[shard : shard + 2].tolist()) for shard in shards])
            words = _words(positions, seed, epoch, _SAMPLES)
            yield _taken(rows, positions[np.argsort(words, kind="stable")[skip:]])
        skip = max(skip - size, 0)


def _taken(rows: Rows, positions: np.ndarray) -> np.ndarray:
    return positions + rows.start if isinstance(rows, range) else rows[positions]


def _words(positions: np.ndarray, seed: int, epoch: int, purpose: int) -> np.ndarray:
    """Random words u64 (n,)."""
    return philox((positions, 0, epoch, purpose), seed)[:, :2].copy().view("<u8")[:, 0]


def steps_per_epoch(samples: int, batch: int, least: int = 1) -> int:
    """Steps of one epoch with a global batch of `batch` samples.

    The last one may be smaller, but not below `least` samples: so few join the one before.
    """
    steps = -(-samples // batch)
    return steps - (steps > 1 and samples - (steps - 1) * batch < least)


def steps(
    seed: int,
    rows: Rows,
    batch: int,
    epochs: int,
    start: tuple[int, int] = (0, 0),
    *,
    bounds: np.ndarray | None = None,
    window: int = 0,
    rank: int = 0,
    world: int = 1,
    least: int = 1,
) -> Iterator[tuple[int, np.ndarray]]:
    """(epoch, the rows i64 that `rank` handles) of every step from `start`, an (epoch, step), to the last epoch's end.

    `batch` is the global one; a rank's share of it is equal to within one sample. `bounds` and `window` as in
    `permutation`, `least` as in `steps_per_epoch`. With a window no more of an order is made than is asked for.
    """
    first_epoch, step = start
    count = steps_per_epoch(len(rows), batch, least)
    for epoch in range(first_epoch, epochs):
        windows = _windows(seed, epoch, rows, bounds, window, step * batch)
        order = np.empty(0, np.int64)
        for at in range(step, count):
            size = batch if at + 1 < count else len(rows) - at * batch
            while len(order) < size:
                order = np.concatenate([order, next(windows)])
            yield epoch, np.array_split(order[:size], world)[rank]
            order = order[size:]
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
