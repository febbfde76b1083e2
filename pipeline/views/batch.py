"""A batch made, what all batches of a loader share, and the bytes read ahead of them."""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from kernels.reference import Mixed
from pipeline.data.decode import Undecodable, as_rgb
from pipeline.data.index import BadSample, Index
from pipeline.data.skipped import Skipped
from pipeline.system import device as devices
from pipeline.views.plan import Request
from pipeline.views.policy import Policy

AHEAD = 3  # batches under way beside the one that is finished next
_TOGETHER = 8  # samples
_READERS, _REMOTE_READERS = 4, 64  # a remote read waits some 50 ms, and costs no core while it waits


@dataclass(frozen=True)
class Job:
    """What is made of the requests of a plan, and by how many threads."""

    index: Index
    policy: Policy
    threads: int
    skipped: Skipped
    pairs: bool
    """Whether there are augmented views."""
    digests: bool


@dataclass(frozen=True)
class Batch:
    rows: np.ndarray
    """Index rows i64 (B,), those of the request less the skipped ones."""
    labels: torch.Tensor
    """i64 (B,)."""
    images: torch.Tensor
    """u8 (2, B, S, S, 3), see `cache.codec.base` for the order; (1, B, S, S, 3) for evaluation."""
    digests: np.ndarray | None
    """CRC-32 of each view's pixels, u32 (B, 2), if asked for."""
    mixed: Mixed | None = None
    """Whose labels the augmented views have as well, on the host, if the policy mixes."""

    def part(self, at: np.ndarray) -> "Batch":
        """The samples at some places."""
        digests = None if self.digests is None else self.digests[at]
        images, places = self.images[:, devices.put(at, self.images.device)], torch.from_numpy(at)
        mixed = self.mixed and Mixed(*(each[places] for each in self.mixed))
        return Batch(self.rows[at], self.labels[places], images, digests, mixed)

    @property
    def original(self) -> torch.Tensor:
        return self.images[0]

    @property
    def augmented(self) -> torch.Tensor:
        return self.images[1]


def batch_of(
    job: Job, rows: np.ndarray, images: torch.Tensor, digests: np.ndarray | None, mixes: np.ndarray | None
) -> Batch:
    """The batch of index rows whose views are made, `mixes` (B,) as they were drawn."""
    labels = job.index.records["label"]
    own, mixed = labels[rows].astype(np.int64), None
    if mixes is not None and job.policy.mix:
        partner = mixes["partner"]
        others = np.where(partner < 0, own, labels[partner])
        mixed = Mixed(torch.from_numpy(others), torch.from_numpy(mixes["ratio"].copy()))
    return Batch(rows, torch.from_numpy(own), images, digests, mixed)


def read_ahead(job: Job, plan: Iterable[Request], ahead: int) -> Generator[tuple[Request, list[Future]], None, None]:
    """Requests, their views (B, M), with the futures of the bytes they read; `ahead` more requests are being read.

    The bytes of a skipped sample are None.

    Every future but the last is of as many samples. Local ones are read several at a time, as a future costs as much
    as a read.
    """
    threads, together = (_REMOTE_READERS, 1) if job.index.remote else (_READERS, _TOGETHER)
    readers = ThreadPoolExecutor(threads, thread_name_prefix="read")
    waiting: deque[tuple[Request, list[Future]]] = deque()
    try:
        for item in plan:
            rows, views, mixes = Request(*item)
            views = views if views.ndim == 2 else views[:, None]
            request = Request(rows, views, mixes if job.pairs else None)
            numbers = request.read.tolist()
            parts = [numbers[at : at + together] for at in range(0, len(numbers), together)]
            waiting.append((request, [readers.submit(_read, job.index, part, job.skipped) for part in parts]))
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
                data = as_rgb(data) if index.records["cmyk"][row] else data
            except BadSample as error:
                skipped.add(row, error)
            except Undecodable as error:
                data = None
                skipped.add(row, index.bad(row, f"cannot be decoded: {error}"))
        found.append(data)
    return found
