"""Every sample once per epoch, whatever the machine; the order is a function of (seed, epoch) alone."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache import UserError
from pipeline.data import order

SEEDS, EPOCHS = st.integers(0, 2**64 - 1), st.integers(0, 1000)


def bounds(rows: np.ndarray, shards: np.ndarray) -> np.ndarray:
    return np.searchsorted(shards, np.arange(shards[-1] + 2 if len(rows) else 1))


@st.composite
def data_sets(draw) -> tuple[np.ndarray, np.ndarray]:
    """Good rows of an index, with gaps where samples are quarantined, and the shard of each."""
    count = draw(st.integers(1, 400))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = np.flatnonzero(rng.random(2 * count) < 0.7)
    shards = np.sort(rng.integers(0, draw(st.integers(1, 40)), len(rows)))
    return rows, shards


@settings(max_examples=25, deadline=None)
@given(SEEDS, data_sets(), st.integers(1, 50), st.integers(1, 5), st.integers(0, 20), st.data())
def test_every_sample_once_per_epoch_in_one_order_for_all_worlds(seed, data_set, batch, world, window, data):
    """Ranks take equal steps; their shares side by side are the order of one rank; a resumed run takes the rest."""
    rows, shards = data_set
    options = {"bounds": bounds(rows, shards), "window": window}
    alone = list(order.steps(seed, rows, batch, 3, **options))
    per_epoch = order.steps_per_epoch(len(rows), batch)
    assert [epoch for epoch, _ in alone] == [epoch for epoch in range(3) for _ in range(per_epoch)]
    for epoch in range(3):
        seen = [part for at, part in alone if at == epoch]
        if seen:
            np.testing.assert_array_equal(np.sort(np.concatenate(seen)), rows)

    ranks = [list(order.steps(seed, rows, batch, 3, **options, rank=rank, world=world)) for rank in range(world)]
    assert {len(steps) for steps in ranks} == {len(alone)}
    for (epoch, whole), *shares in zip(alone, *ranks, strict=True):
        assert {at for at, _ in shares} == {epoch}
        np.testing.assert_array_equal(np.concatenate([part for _, part in shares]), whole)
        sizes = [len(part) for _, part in shares]
        assert max(sizes) - min(sizes) <= 1

    done = data.draw(st.integers(0, len(alone)))
    start = divmod(done, per_epoch) if per_epoch else (0, 0)
    rest = list(order.steps(seed, rows, batch, 3, start, **options))
    assert len(rest) == len(alone) - done
    for (epoch, part), (expected_epoch, expected) in zip(rest, alone[done:], strict=True):
        assert epoch == expected_epoch
        np.testing.assert_array_equal(part, expected)


@settings(max_examples=100, deadline=None)
@given(SEEDS, EPOCHS, data_sets(), st.integers(1, 20))
def test_a_window_reads_few_shards_at_a_time(seed, epoch, data_set, window):
    """Shards come in groups of `window`, each wholly before the next."""
    rows, shards = data_set
    where = dict(zip(rows.tolist(), shards.tolist(), strict=True))
    taken = [where[row] for row in order.permutation(seed, epoch, rows, bounds(rows, shards), window).tolist()]
    last = {shard: at for at, shard in enumerate(taken)}
    first = {shard: at for at, shard in reversed(list(enumerate(taken)))}
    for at in range(len(taken)):
        assert sum(first[shard] <= at <= last[shard] for shard in first) <= window


def test_orders_differ_between_epochs_seeds_and_windows():
    rows = np.arange(1000)
    orders = [
        order.permutation(seed, epoch, rows, np.arange(0, 1001, 50), window)
        for seed in (0, 1)
        for epoch in (0, 1)
        for window in (0, 3, 7)
    ]
    for i, one in enumerate(orders):
        assert (one == rows).mean() < 0.02
        assert all((one == other).mean() < 0.03 for other in orders[:i])


def test_a_window_of_all_shards_shuffles_everything():
    rows = np.arange(1000)
    np.testing.assert_array_equal(
        order.permutation(5, 1, rows, np.arange(0, 1001, 50), 20), order.permutation(5, 1, rows)
    )


@pytest.mark.parametrize("window", [0, 2])
def test_orders_are_the_same_for_ever(window):
    rows = np.arange(8)
    expected = {0: [4, 3, 2, 7, 5, 1, 0, 6], 2: [4, 3, 2, 5, 7, 1, 0, 6]}[window]
    assert order.permutation(7, 3, rows, np.arange(0, 9, 2), window).tolist() == expected
    assert order.permutation(7, 3, range(8), np.arange(0, 9, 2), window).tolist() == expected


@settings(max_examples=100, deadline=None)
@given(data_sets())
def test_bounds_of_shards_are_found_in_rows_with_gaps(data_set):
    rows, shards = data_set
    of_all = np.zeros(rows[-1] + 1 if len(rows) else 0, np.int64)
    of_all[rows] = shards
    np.maximum.accumulate(of_all, out=of_all)
    expected = np.searchsorted(shards, np.arange(shards[-1] + 2 if len(shards) else 1))
    np.testing.assert_array_equal(order.shard_bounds(of_all, rows), expected)


def test_a_windowed_epoch_of_100_million_rows_starts_in_little_memory():
    """A window of 64 shards of 4,096 rows is sorted at a time; the order of all would take 800 MB."""
    samples, batch = 100_000_000, 4096
    bounds = np.append(np.arange(0, samples, 4096), samples)
    tracemalloc.start()
    steps = order.steps(0, range(samples), batch, 1, (0, 20_000), bounds=bounds, window=64)
    epoch, rows = next(steps)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert epoch == 0 and len(set(rows.tolist())) == batch and rows.min() >= 0 and rows.max() < samples
    assert len(np.unique(rows // 4096)) <= 2 * 64
    assert peak < 60e6


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_few_shot_takes_its_share_of_every_class(share):
    rng = np.random.default_rng(3)
    rows, labels = np.arange(0, 3000, 3), rng.choice(10, 1000, p=np.arange(1, 11) / 55)
    few = order.few_shot(rows, labels, share)
    assert set(few) <= set(rows) and len(set(few)) == len(few)
    for label in range(10):
        assert np.isin(few, rows[labels == label]).sum() == max(round(share * (labels == label).sum()), 1)
    more = order.few_shot(rows, labels, min(share + 0.25, 1.0))
    assert set(few) <= set(more)  # a smaller share is a part of a larger one
    np.testing.assert_array_equal(order.few_shot(rows, labels, share), few)


def test_few_shot_leaves_every_class_a_sample_and_refuses_no_share():
    labels = np.repeat([0, 1], [100, 1])
    assert set(labels[order.few_shot(np.arange(101), labels, 0.01)]) == {0, 1}
    np.testing.assert_array_equal(order.few_shot(np.arange(101), labels, 1), np.arange(101))
    for share in (0, -1, 1.5, float("nan")):
        with pytest.raises(UserError, match="--few-shot out of range"):
            order.few_shot(np.arange(101), labels, share)
