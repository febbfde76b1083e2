"""The loader's CPU half: a worker thread takes a sample from its bytes to its two crops."""

import os
import zlib
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from kernels import jda
from pipeline.data.decode import Undecodable, decode
from pipeline.data.index import Index
from pipeline.data.skipped import Skipped
from pipeline.views.batch import AHEAD, Batch, read_ahead


def on_cpu(index, plan, policy, threads, pairs, digests, skipped) -> Generator[Batch, None, None]:
    workers = ThreadPoolExecutor(threads, thread_name_prefix="work", initializer=partial(_settle, cores(threads)))
    under_way: deque[tuple[np.ndarray, torch.Tensor, np.ndarray, list[Future]]] = deque()
    requests = read_ahead(index, plan, skipped, 0)
    try:
        for (rows, views), reads in requests:
            shape = (1 + pairs, len(rows), policy.base.size, policy.base.size, 3)
            images = torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
            checks = np.zeros((len(rows), 1 + pairs), np.uint32)
            draw = partial(_draw, index, rows, views, reads, policy, images.numpy(), checks, digests, skipped)
            # The positions are shared: whoever is free takes the next sample.
            samples = iter(range(len(rows)))
            under_way.append((rows, images, checks, [workers.submit(draw, samples) for _ in range(threads)]))
            if len(under_way) > AHEAD:
                yield _finish(index, *under_way.popleft(), skipped, digests)
        while under_way:
            yield _finish(index, *under_way.popleft(), skipped, digests)
    finally:
        workers.shutdown(cancel_futures=True)
        requests.close()


def cores(threads: int) -> Iterator[int]:
    """A core of its own for each of `threads` threads, as far as this process has so many; no core otherwise.

    Ranks of one machine (LOCAL_RANK of LOCAL_WORLD_SIZE) take disjoint ones.
    """
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    mine = sorted(os.sched_getaffinity(0))[rank * threads : (rank + 1) * threads]
    return iter(mine if len(mine) == threads else ())


def _settle(free: Iterator[int]) -> None:
    """Keep this thread, and DALI's that it starts, on one core: they take turns, and share its cache.

    Left alone, a scheduler that likes to wake a thread where its waker runs can gather all of them on one core: on two
    idle cores 490 pairs/s instead of 940.
    """
    if (core := next(free, None)) is not None:
        os.sched_setaffinity(0, {core})


def _draw(index, rows, views, reads, policy, pixels, checks, digests, skipped, samples: Iterator[int]) -> None:
    """Make the crops of the samples that `samples` hands out."""
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
        jda.pair(image, program, views[i], policy.base.pad, pixels, i)
        if digests:
            checks[i] = [zlib.crc32(view) for view in pixels[:, i]]


def _finish(index: Index, rows, images, checks, drawing: list[Future], skipped: Skipped, digests) -> Batch:
    for future in drawing:
        future.result()
    if skipped.causes and len(kept := [i for i, row in enumerate(rows) if row not in skipped]) < len(rows):
        rows, images, checks = rows[kept], images[:, kept], checks[kept]
    labels = torch.from_numpy(index.records["label"][rows].astype(np.int64))
    return Batch(rows, labels, images, checks if digests else None)
