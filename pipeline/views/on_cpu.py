"""The loader's CPU half: a worker thread takes a sample from its bytes to its two crops."""

import os
import zlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import repeat

import numpy as np
import torch

from kernels import jda
from pipeline.data.decode import Undecodable, decode
from pipeline.system.cores import own
from pipeline.views.batch import AHEAD, Batch, Job, batch_of, read_ahead
from pipeline.views.plan import Request


def on_cpu(job: Job, plan: Iterable[Request]) -> Generator[Batch, None, None]:
    """As `pipeline.views.loader.Loader.batches`."""
    threads = job.threads
    workers = ThreadPoolExecutor(threads, thread_name_prefix="work", initializer=partial(_settle, cores(threads)))
    under_way: deque[tuple[_Drawing, list[Future]]] = deque()
    requests = read_ahead(job, plan, 0)
    try:
        for request, reads in requests:
            drawing = _Drawing(job, request, reads)
            # The positions are shared: whoever is free takes the next sample.
            samples = iter(range(len(request.rows)))
            under_way.append((drawing, [workers.submit(drawing.draw, samples) for _ in range(threads)]))
            if len(under_way) > AHEAD:
                yield from _finished(*under_way.popleft())
        while under_way:
            yield from _finished(*under_way.popleft())
    finally:
        workers.shutdown(cancel_futures=True)
        requests.close()


def cores(threads: int) -> Iterator[int]:
    """A core of its own for each of `threads` threads, as far as this process has so many; no core otherwise."""
    mine = own()[:threads]
    return iter(mine if len(mine) == threads else ())


def _settle(free: Iterator[int]) -> None:
    """Keep this thread, and DALI's that it starts, on one core: they take turns, and share its cache.

    Left alone, a scheduler that likes to wake a thread where its waker runs can gather all of them on one core: on two
    idle cores 490 pairs/s instead of 940.
    """
    if (core := next(free, None)) is not None:
        os.sched_setaffinity(0, {core})


def _finished(drawing: "_Drawing", workers: list[Future]) -> Iterator[Batch]:
    for worker in workers:
        worker.result()
    return drawing.batches()


class _Drawing:
    """The batches of a request while threads draw them."""

    def __init__(self, job: Job, request: Request, reads: list[Future]):
        self.job, self.request, self.reads, self.read = job, request, reads, request.read
        self.places = None if request.mixes is None else request.places
        size, (samples, count) = job.policy.base.size, request.views.shape
        shape = (1 + job.pairs, samples, size, size, 3)
        pinned = torch.cuda.is_available()
        self.images = [torch.empty(shape, dtype=torch.uint8, pin_memory=pinned) for _ in range(count)]
        self.checks = np.zeros((count, samples, 1 + job.pairs), np.uint32)
        records = job.index.records[self.read]
        self.sizes = list(zip(records["height"].tolist(), records["width"].tolist(), strict=True))
        self.program = jda.program_of(job.policy.table)

    def draw(self, samples: Iterator[int]) -> None:
        """Make the crops of the samples that `samples` hands out."""
        policy, crops = self.job.policy, [images.numpy() for images in self.images]
        other = np.empty((2, 1, *crops[0].shape[2:]), np.uint8) if self.places is not None else None
        for i in samples:
            if (image := self._decoded(i)) is None:
                continue
            for view, pixels in zip(self.request.views[i], crops, strict=True):
                jda.pair(image, self.program, view, policy.base.pad, pixels, i)
            del image  # a partner's takes its place
            for number, (pixels, checks) in enumerate(zip(crops, self.checks, strict=True)):
                if other is not None and not self._mix(i, number, pixels[1, i], other):
                    continue
                if self.job.digests:
                    checks[i] = [zlib.crc32(crop) for crop in pixels[:, i]]

    def _decoded(self, place: int) -> np.ndarray | None:
        """The image at a place of `read`, u8 (H, W, 3); None if it is skipped."""
        index, skipped, row = self.job.index, self.job.skipped, self.read[place]
        part, at = divmod(place, len(self.reads[0].result()))
        data, self.reads[part].result()[at] = self.reads[part].result()[at], None  # the bytes are not needed any more
        if data is None:
            return None
        try:
            image = decode(data)
        except Undecodable as error:
            skipped.add(int(row), index.bad(row, f"cannot be decoded: {error}"))
            return None
        if image.shape[:2] != self.sizes[place]:  # the boxes were drawn for that size, and the kernel does not look
            skipped.add(int(row), index.bad(row, f"not of the indexed size: {image.shape[:2]}"))
            return None
        return image

    def _mix(self, i: int, number: int, own: np.ndarray, other: np.ndarray) -> bool:
        """Finish an augmented view `own`, with room for an `other` pair; False if its partner is skipped."""
        assert self.request.mixes is not None and self.places is not None
        mix, place = self.request.mixes[i, number], int(self.places[i, number])
        if place >= 0:
            if (partner := self._decoded(place)) is None:
                return False
            jda.pair(partner, self.program, mix["view"], self.job.policy.base.pad, other, 0)
        jda.mix(own, other[1, 0] if place >= 0 else None, mix)
        return True

    def batches(self) -> Iterator[Batch]:
        """What was drawn, view by view, less the skipped samples and those of skipped partners."""
        all_rows, mixes, skipped = self.request.rows, self.request.mixes, self.job.skipped
        for number, (images, checks) in enumerate(zip(self.images, self.checks, strict=True)):
            rows, drawn = all_rows, None if mixes is None else mixes[:, number]
            if skipped.causes:
                partners = repeat(-1) if drawn is None else drawn["partner"].tolist()
                pairs = enumerate(zip(rows.tolist(), partners, strict=False))
                kept = [i for i, (row, partner) in pairs if row not in skipped and partner not in skipped]
                if len(kept) < len(rows):
                    rows, checks, images = rows[kept], checks[kept], images[:, kept]
                    drawn = None if drawn is None else drawn[kept]
            yield batch_of(self.job, rows, images, checks if self.job.digests else None, drawn)
