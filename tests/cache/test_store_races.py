"""Several that make a store, or write one block, at once: in the end one of them has."""

import threading

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.stores import BLOCKED, assert_exact, content, fill, make

import cache
from cache import UserError
from cache.store.objects import Files


@pytest.mark.parametrize("differing", ["seed", "samples", "nothing"])
def test_of_many_that_create_at_once_one_wins(tmp_path, differing):
    for attempt in range(10):
        path, start, outcomes = tmp_path / str(attempt), threading.Barrier(4), []

        def create(number: int, path=path, start=start, outcomes=outcomes) -> None:
            changes = {"seed": {"seed": number}, "samples": {"samples": 30 + number}, "nothing": {}}[differing]
            start.wait()
            try:
                outcomes.append(make(path, **changes).manifest)
            except UserError as error:
                outcomes.append(str(error))

        threads = [threading.Thread(target=create, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = (made for made in outcomes if not isinstance(made, str))
        assert all("exists" in made for made in outcomes if isinstance(made, str))
        assert fill(cache.open(path)).manifest == winner
        assert_exact(cache.open(path), 1)


@pytest.mark.parametrize("puts", range(len(BLOCKED) + 1))
def test_a_job_that_dies_writes_no_block_of_another_away(tmp_path, monkeypatch, puts):
    """Both compute the same block, the other commits it first, and this one is cut short after so many objects."""
    store, left = fill(make(tmp_path / "s")), iter(range(puts))

    def put(*_) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Files, "_put", put)
        with pytest.raises(KeyboardInterrupt):
            store.write_block(0, 1, *content(store, 0, 1))
    assert store.missing_blocks() == []
    assert_exact(store, 0)


@given(turns=st.lists(st.booleans(), max_size=24))
@example(turns=[True] * 2 + [False] * 5 + [True] * 3)
@settings(max_examples=40, deadline=None)
def test_of_jobs_that_write_other_labels_at_once_one_wins(turns, tmp_path_factory):
    """Two write a block, object by object in any order; it is whole, and all of it is one's."""
    store = make(tmp_path_factory.mktemp("race") / "s")
    pairs, weight, digest, fidelity = content(store, 0, 1)
    labels = {True: (pairs, weight, digest, fidelity), False: (pairs[::-1], weight[::-1], digest[::-1], fidelity)}
    writing, left, put, moved = {True, False}, list(turns), Files._put, threading.Condition()

    def in_turn(*arguments) -> None:
        me = threading.current_thread().name == "True"
        with moved:
            moved.wait_for(lambda: not left or left[0] == me or len(writing) == 1)
            put(*arguments)
            del left[:1]
            moved.notify_all()

    def write(me: bool) -> None:
        try:
            store.write_block(0, 1, *labels[me])
        finally:
            with moved:
                writing.remove(me)
                moved.notify_all()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Files, "_put", in_turn)
        jobs = [threading.Thread(target=write, args=(me,), name=str(me)) for me in labels]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
    found = store.read_block(0, 1)
    assert any(all(map(np.array_equal, found, mine)) for mine in labels.values())
