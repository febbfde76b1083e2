"""The loader: index rows and views in, pairs of uint8 crops out.

    shards -> readers (threads) -> workers (threads): DALI decode -> pair kernel -> batch

A worker takes one sample from its bytes to its two crops, so that the decoded image is still in its core's cache when
the pair kernel reads it. Several batches are under way at once. What identifies a sample is its place in the plan,
never the order in which threads happen to work; batches leave in the order in which they were asked for.
"""

import os
import queue
import threading
import zlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from kernels import jda
from pipeline.decode import Undecodable, as_rgb, decode
from pipeline.index import BadSample, Index
from pipeline.policy import Policy
from pipeline.skipped import Skipped

Request = tuple[np.ndarray, np.ndarray]
"""One batch of a plan: index rows i64 (B,) and their views (B,), a record array of `pipeline.views.VIEW`."""

AHEAD = 3  # batches under way beside the one that is finished next
_TOGETHER = 8  # samples
_READERS, _REMOTE_READERS = 4, 64  # a remote read waits some 50 ms, and costs no core while it waits


@dataclass(frozen=True)
class Batch:
    rows: np.ndarray
    """Index rows i64 (B,), those of the request less the skipped ones."""
    labels: torch.Tensor
    """i64 (B,)."""
    images: torch.Tensor
    """u8 (2, B, S, S, 3): original views, then augmented ones; (1, B, S, S, 3) for evaluation."""
    digests: np.ndarray | None
    """CRC-32 of each view's pixels, u32 (B, 2), if asked for."""

    def part(self, at: np.ndarray) -> "Batch":
        """The samples at some places."""
        places = torch.from_numpy(at)
        digests = None if self.digests is None else self.digests[at]
        return Batch(self.rows[at], self.labels[places], self.images[:, places.to(self.images.device)], digests)

    @property
    def original(self) -> torch.Tensor:
        return self.images[0]

    @property
    def augmented(self) -> torch.Tensor:
        return self.images[1]


def load(
    index: Index,
    plan: Iterable[Request],
    policy: Policy,
    *,
    threads: int,
    decoder: str = "cpu",
    pairs: bool = True,
    digests: bool = False,
    skipped: Skipped | None = None,
) -> Iterator[Batch]:
    """Yield one `Batch` per request of `plan`, in its order, working ahead in the background.

    `threads` decode and make views. `decoder` is one of `pipeline.decode.identity`; with a GPU's the views are made
    there too, and `images` stay on it. `pairs=False` makes only the first view. A sample that cannot be read or decoded
    is entered in `skipped` and left out of its batch, which may become empty. Raises UserError if that happens to more
    samples than `skipped` allows.
    """
    ready: queue.Queue = queue.Queue(maxsize=2)
    stopped = threading.Event()

    def put(item) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def produce() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)  # a thread starts out on the first GPU
            arguments = index, plan, policy, threads, pairs, digests, skipped or Skipped(index)
            if decoder == "cpu":
                run = _on_cpu(*arguments)
            else:
                from pipeline.loader_gpu import on_gpu  # it needs this module, and Triton

                run = on_gpu(decoder, *arguments)
            with closing(run) as batches:
                for batch in batches:
                    if not put(batch):
                        return
            put(None)
        except BaseException as error:  # whatever it is, the consumer must see it
            put(error)

    thread = threading.Thread(target=produce, name="loader", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()


def _on_cpu(index, plan, policy, threads, pairs, digests, skipped) -> Generator[Batch, None, None]:
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


def read_ahead(
    index: Index, plan: Iterable[Request], skipped: Skipped, ahead: int
) -> Generator[tuple[Request, list[Future]], None, None]:
    """Requests with the futures of their bytes, None for a skipped sample; `ahead` more requests are being read.

    Every future but the last is of as many samples. Local ones are read several at a time, as a future costs as much
    as a read.
    """
    threads, together = (_REMOTE_READERS, 1) if index.remote else (_READERS, _TOGETHER)
    readers = ThreadPoolExecutor(threads, thread_name_prefix="read")
    waiting: deque[tuple[Request, list[Future]]] = deque()
    try:
        for request in plan:
            rows = request[0].tolist()
            parts = [rows[at : at + together] for at in range(0, len(rows), together)]
            waiting.append((request, [readers.submit(_read, index, part, skipped) for part in parts]))
            if len(waiting) > ahead:
                yield waiting.popleft()
        yield from waiting
        readers.shutdown(wait=False)  # what was yielded is still wanted
    except BaseException:
        readers.shutdown(wait=False, cancel_futures=True)
        raise


def _read(index: Index, rows: list[int], skipped: Skipped) -> list[bytes | None]:
    found: list[bytes | None] = []
    for row in rows:
        data = None
        if row not in skipped:
            try:
                data = index.read(row)
            except BadSample as error:
                skipped.add(row, str(error))
        found.append(as_rgb(data) if data and index.records["cmyk"][row] else data)
    return found


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
