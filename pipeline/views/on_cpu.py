"""The loader's CPU half: a worker thread takes a sample from its bytes to its two crops."""

import os
import zlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from kernels import jda
from pipeline.data.decode import Undecodable, decode
from pipeline.system.cores import own
from pipeline.views.batch import AHEAD, Batch, Job, read_ahead
from pipeline.views.plan import Request


def on_cpu(job: Job, plan: Iterable[Request]) -> Generator[Batch, None, None]:
    """As `pipeline.views.loader.Loader.batches`."""
    threads = job.threads
    workers = ThreadPoolExecutor(threads, thread_name_prefix="work", initializer=partial(_settle, cores(threads)))
    under_way: deque[tuple[_Drawing, list[Future]]] = deque()
    requests = read_ahead(job, plan, 0)
    try:
        for request, reads in requests:
            drawing = _Drawing(job, *request, reads)
            # The positions are shared: whoever is free takes the next sample.
            samples = iter(range(len(request[0])))
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

    def __init__(self, job: Job, rows: np.ndarray, views: np.ndarray, reads: list[Future]):
        self.job, self.rows, self.views, self.reads = job, rows, views, reads
        size, count = job.policy.base.size, views.shape[1]
        shape = (1 + job.pairs, len(rows), size, size, 3)
        pinned = torch.cuda.is_available()
        self.images = [torch.empty(shape, dtype=torch.uint8, pin_memory=pinned) for _ in range(count)]
        self.checks = np.zeros((count, len(rows), 1 + job.pairs), np.uint32)

    def draw(self, samples: Iterator[int]) -> None:
        """Make the crops of the samples that `samples` hands out."""
        index, policy, skipped = self.job.index, self.job.policy, self.job.skipped
        rows, reads, crops = self.rows, self.reads, [images.numpy() for images in self.images]
        program = jda.program_of(policy.table)
        together = len(reads[0].result()) if reads else 1
        records = index.records[rows]
        sizes = list(zip(records["height"].tolist(), records["width"].tolist(), strict=True))
        for i in samples:
            part, at = divmod(i, together)
            data, reads[part].result()[at] = reads[part].result()[at], None  # the bytes are not needed any more
            if data is None:
                continue
            try:
                image = decode(data)
            except Undecodable as error:
                skipped.add(int(rows[i]), str(index.bad(rows[i], f"cannot be decoded: {error}")))
                continue
            if image.shape[:2] != sizes[i]:  # the boxes were drawn for that size, and the kernel does not look
                skipped.add(int(rows[i]), str(index.bad(rows[i], f"not of the indexed size: {image.shape[:2]}")))
                continue
            for view, pixels, checks in zip(self.views[i], crops, self.checks, strict=True):
                jda.pair(image, program, view, policy.base.pad, pixels, i)
                if self.job.digests:
                    checks[i] = [zlib.crc32(crop) for crop in pixels[:, i]]

    def batches(self) -> Iterator[Batch]:
        """What was drawn, view by view, less the skipped samples."""
        rows, checks, skipped, kept = self.rows, self.checks, self.job.skipped, None
        if skipped.causes and len(kept := [i for i, row in enumerate(rows) if row not in skipped]) < len(rows):
            rows, checks = rows[kept], checks[:, kept]
        labels = torch.from_numpy(self.job.index.records["label"][rows].astype(np.int64))
        for images, digests in zip(self.images, checks, strict=True):
            drawn = images if len(rows) == images.shape[1] else images[:, kept]
            yield Batch(rows, labels, drawn, digests if self.job.digests else None)
