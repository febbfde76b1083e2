"""The planes of a run's epochs, in memory or mapped: what the student gathers from, step by step."""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from cache.errors import UserError
from cache.store import shared
from cache.store.blocks import Store
from cache.store.plane import Plane
from cache.store.shared import Share


def planes(
    store: Store,
    views: Iterable[int],
    *,
    mode: Literal["memory", "mmap"] = "memory",
    folder: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    share: Share | None = None,
) -> Iterator[Plane]:
    """The planes of `views`, in order; while one is in use the next one loads in the background.

    A view that follows itself is not read again. With mode "mmap" the codes are in an unnamed file in `folder`
    (default: where temporary files go), which the system pages, so that a plane may be larger than memory. With `share`
    the processes that it names hold one plane together, of which each unpacks its part: in shared memory, or, with mode
    "mmap" or for want of room there, in a file in `folder`. `progress` is called, by other threads, as by
    `Store.load_plane`, whose errors surface when their plane is due.
    """
    if mode not in ("memory", "mmap"):
        raise UserError("unknown mode of planes", found=repr(mode), expected="memory or mmap")
    if share and (mode == "mmap" or not shared.room(store, share)):
        share = replace(share, folder=Path(folder or tempfile.gettempdir()))
    remaining = iter(views)
    view = next(remaining, None)
    plane: Plane | None = None
    ahead: Future[Plane] | None = None

    def load(view: int, workers: int) -> Plane:
        if share:
            return shared.load(store, view, share, progress, workers)
        out = _mapped((store.manifest.samples, store.codec.row_bytes), folder) if mode == "mmap" else None
        return store.load_plane(view, out, progress, workers)

    # The first plane is waited for. The next ones leave the cores to those who decode images.
    every = max(store.workers, len(os.sched_getaffinity(0)) // (share.world if share else 1))
    with ThreadPoolExecutor(1, thread_name_prefix="plane") as pool:
        while view is not None:
            if plane is None or plane.view != view:
                plane = (ahead or pool.submit(load, view, every)).result()
            following = next(remaining, None)
            ahead = None if following in (None, view) else pool.submit(load, following, store.workers)
            yield plane
            view = following


def _mapped(shape: tuple[int, int], folder: str | Path | None) -> np.ndarray:
    """u8 of `shape` in a file without a name, which is gone with the array."""
    size = shape[0] * shape[1]
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a hole that finds the disk full later would be a SIGBUS
            return np.asarray(np.memmap(file, np.uint8, "r+", shape=shape))
    except OSError as error:
        raise shared.no_room(folder or tempfile.gettempdir(), size, error) from error
