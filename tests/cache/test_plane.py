"""Planes: what a store holds of one view, loaded ahead of its use, in memory or mapped."""

import gc
import os
import threading
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from support.stores import SAMPLES, content, fill, make, status

import cache
from cache import Plane, UserError


class Planes:
    """Stands in for a store: notes what is loaded, and can hold up or fail a load."""

    def __init__(self, held: int | None = None, broken: int | None = None):
        self.loads: list[int] = []
        self.threads: list[int] = []
        self.workers = 4
        self.started, self.release = threading.Event(), threading.Event()
        self.held, self.broken = held, broken

    def load_plane(self, view: int, out=None, progress=None, workers=None) -> Plane:
        self.loads.append(view)
        self.threads.append(workers)
        if view == self.held:
            self.started.set()
            assert self.release.wait(300)
        if view == self.broken:
            raise UserError(f"view {view} is broken")
        nothing = np.zeros(0)
        return Plane(view, nothing, nothing, nothing, nothing)


def test_planes_come_in_order_and_are_not_read_twice_running():
    store = Planes()
    assert [plane.view for plane in cache.planes(store, iter([0, 0, 1, 2, 2, 2, 0]))] == [0, 0, 1, 2, 2, 2, 0]
    assert store.loads == [0, 1, 2, 0]
    assert list(cache.planes(store, [])) == []


def test_one_view_is_read_once_for_endless_epochs():
    store = Planes()
    planes = cache.planes(store, (epoch % 1 for epoch in count()))
    assert len({id(next(planes)) for _ in range(5)}) == 1
    planes.close()
    assert store.loads == [0]


def test_the_next_plane_loads_while_one_is_in_use():
    store = Planes(held=1)
    planes = cache.planes(store, [0, 1])
    assert next(planes).view == 0  # although view 1 cannot be had yet
    assert store.started.wait(300)
    store.release.set()
    assert next(planes).view == 1


def test_a_plane_that_is_waited_for_has_all_cores(monkeypatch):
    for cores, first in ((64, 64), (2, 4)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        store = Planes()
        assert [plane.view for plane in cache.planes(store, [3, 3, 5, 1])] == [3, 3, 5, 1]
        assert store.threads == [first, 4, 4]


def test_an_error_surfaces_when_its_plane_is_due():
    planes = cache.planes(Planes(broken=1), [0, 1, 2])
    assert next(planes).view == 0
    with pytest.raises(UserError, match="view 1 is broken"):
        next(planes)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> cache.Store:
    return fill(make(tmp_path_factory.mktemp("planes") / "s"))


def expected(store: cache.Store, view: int) -> list[np.ndarray]:
    return [np.concatenate(parts) for parts in zip(*(content(store, view, b)[:3] for b in range(3)), strict=True)]


@pytest.mark.parametrize("mode", ["memory", "mmap"])
def test_gather_gives_the_rows_and_refuses_quarantined_ones(store, tmp_path, mode):
    for plane in cache.planes(store, [1, 0], mode=mode, folder=tmp_path):
        pairs, weight, digest = expected(store, plane.view)
        rows = np.array([49, 0, 25, 0, 23])
        encoded, w = plane.gather(rows)
        np.testing.assert_array_equal(encoded, pairs[rows])
        np.testing.assert_array_equal(w, weight[rows])
        np.testing.assert_array_equal(plane.digest, digest)
        np.testing.assert_array_equal(plane.good, status() == 0)
        assert type(encoded) is type(plane.codes) is np.ndarray
        with pytest.raises(AssertionError, match="quarantined"):
            plane.gather(np.array([0, 3]))


def mapped_files(folder: Path) -> list[str]:
    """Of this process, with the files that have no name any more."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]


def test_mapped_planes_are_in_a_file_that_goes_with_them(store, tmp_path):
    planes = cache.planes(store, [0, 1, 0], mode="mmap", folder=tmp_path)
    plane = next(planes)
    assert plane.codes.shape == (SAMPLES, 26) and plane.codes.dtype == np.uint8
    assert mapped_files(tmp_path) and os.listdir(tmp_path) == []
    assert [following.view for following in planes] == [1, 0]
    np.testing.assert_array_equal(plane.codes, expected(store, 0)[0])  # of the first, still in use
    del plane, planes
    gc.collect()
    assert mapped_files(tmp_path) == []


def test_a_folder_without_room_for_a_plane_is_refused(store, tmp_path, monkeypatch):
    """The room is taken before anything is mapped: a file with holes on a full disk would kill the process."""
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "none"):
        with pytest.raises(UserError, match=rf"cannot map a plane in {folder}; found .*1,300 bytes wanted.*fix: "):
            next(cache.planes(store, [0], mode="mmap", folder=folder))

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"found No space left on device \(1,300 bytes wanted\)"):
        next(cache.planes(store, [0], mode="mmap", folder=tmp_path))


def test_progress_is_told_of_every_load(store):
    seen = []
    list(cache.planes(store, [0, 1], progress=lambda *done: seen.append(done)))
    assert seen == [(1, 3), (2, 3), (3, 3)] * 2


def test_an_unknown_mode_is_refused(store):
    with pytest.raises(UserError, match="unknown mode of planes; found 'gpu', expected memory or mmap"):
        next(cache.planes(store, [0], mode="gpu"))  # type: ignore[arg-type]


def test_a_plane_that_memory_cannot_hold_is_refused(store, monkeypatch):
    def empty(*_):
        raise MemoryError

    monkeypatch.setattr(np, "empty", empty)
    with pytest.raises(UserError, match=r"no memory for a plane of store .*; found 1,300 bytes wanted; fix: map"):
        store.load_plane(0)
