"""The loader's GPU half: DALI decodes batches there, Triton kernels make the views, pixels never leave the device.

    request k+2    its bytes are being read
    request k+1    fed to DALI, which decodes it in the background
    request k      decoded; its kernels are planned and launched on the loader's stream
    request k-1    its views are made and copied, other threads digest them; then it is handed out

The same code runs over DALI's CPU decoder and Triton's interpreter (TRITON_INTERPRET=1), which is how it is tested
where there is no GPU. What differs is in `Cuda` and `Host`: where memory lies, and in what order work is done.
"""

import os
import zlib
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache import UserError
from kernels import jda
from kernels.jda.gpu import mixing
from kernels.jda.gpu import pairs as jda_gpu
from pipeline.data import dali
from pipeline.views.batch import AHEAD, Batch, Job, batch_of, read_ahead
from pipeline.views.plan import Request


def on_gpu(decoder: str, job: Job, plan: Iterable[Request]) -> Generator[Batch, None, None]:
    """As `pipeline.views.loader.Loader.batches`, on the current CUDA device and a stream of the loader's own."""
    requests = read_ahead(job, plan, AHEAD)
    with ThreadPoolExecutor(job.threads, thread_name_prefix="work") as workers:
        engine = _Engine(decoder, job, workers)
        try:
            for request, reads in requests:
                engine.schedule(request, reads)
                if len(engine.scheduled) == dali.DEPTH:
                    engine.launch()
                while len(engine.launched) >= _LAUNCHED:
                    yield engine.finished()
            while engine.scheduled:
                engine.launch()
                while len(engine.launched) >= _LAUNCHED:
                    yield engine.finished()
            while engine.launched:
                yield engine.finished()
        finally:
            engine.close()
            requests.close()


_LAUNCHED = 2
"""Batches whose kernels are on their way, counting the one that is waited for."""


class Cuda:
    """The current CUDA device, and a stream on it."""

    def __init__(self) -> None:
        self.number: int | None = torch.cuda.current_device()
        self.device = torch.device("cuda", self.number)
        self.stream = torch.cuda.Stream(self.device)

    @property
    def order(self) -> int | None:
        """For DALI, which returns its outputs in the order of this stream."""
        return self.stream.cuda_stream

    def work(self):
        """A context in which kernels are launched."""
        return torch.cuda.stream(self.stream)

    def copied(self, images: Tensor) -> Tensor:
        """`images` in page-locked memory once the next `mark` has passed."""
        return torch.empty(images.shape, dtype=images.dtype, pin_memory=True).copy_(images, non_blocking=True)

    def mark(self) -> Any:
        """What has passed as soon as all work so far is done."""
        return self.stream.record_event()


class Host:
    """Memory of the host; all work is done when a call returns."""

    number: int | None = None
    device = torch.device("cpu")
    order: int | None = None

    def work(self):
        return nullcontext()

    def copied(self, images: Tensor) -> Tensor:
        return images

    def mark(self) -> "Host":
        return self

    def synchronize(self) -> None:
        pass


def here() -> Cuda | Host:
    """Where the views are made. Raises UserError where there is neither a GPU nor Triton's interpreter."""
    if torch.cuda.is_available():
        return Cuda()
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Host()
    raise UserError("no GPU to decode on", found="no CUDA device", fix="use --decoder cpu")


@dataclass
class _Scheduled:
    """A batch that DALI decodes."""

    request: Request
    places: np.ndarray
    """i64 (K,): which of the images that the request reads."""
    encoded: list[bytes]
    """Of each of them: DALI reads them where they are."""
    decoders: "_Decoders"
    route: np.ndarray = field(init=False)

    @property
    def rows(self) -> np.ndarray:
        """Index rows i64 (K,)."""
        return self.request.read[self.places]

    def without(self, bad: list[int]) -> "_Scheduled":
        kept = np.setdiff1d(np.arange(len(self.places)), bad)
        return _Scheduled(self.request, self.places[kept], [self.encoded[i] for i in kept], self.decoders)


class _Launched(NamedTuple):
    batch: Batch
    checks: list[Future]
    """Digests, each future's of some samples in a row."""
    event: Any
    held: list
    """What the kernels read, or DALI for them."""


class _Images(NamedTuple):
    """What DALI has decoded."""

    addresses: np.ndarray
    """i64 (K,)."""
    sizes: np.ndarray
    """i64 (K, 2)."""
    places: np.ndarray
    """i64 (W,): which of them each image is that the request reads; −1: none."""


class _Decoders:
    """The pipelines of a decoder, each with the samples that its key hash sends there."""

    def __init__(self, decoder: str, room: int, threads: int, device: int | None):
        self.decoder, self.room, self.threads, self.device = decoder, room, threads, device
        self.pipelines = [dali.Batches(room, threads, device, engine) for engine in dali.ENGINES[decoder]]

    def anew(self) -> "_Decoders":
        return _Decoders(self.decoder, self.room, self.threads, self.device)

    def close(self) -> None:
        """Wait for the pipelines' threads, which are then gone."""
        for pipeline in self.pipelines:
            pipeline.close()

    def schedule(self, encoded: list[bytes], route: np.ndarray) -> None:
        for number, pipeline in enumerate(self.pipelines):
            if part := [encoded[i] for i in np.flatnonzero(route == number)]:
                pipeline.schedule(part)

    def take(self, route: np.ndarray, order: int | None) -> tuple[np.ndarray, list[tuple], list]:
        """Addresses i64 (B,) and shapes of the batch's images, and what keeps them alive. RuntimeError as DALI's."""
        addresses, shapes, held = np.zeros(len(route), np.int64), [()] * len(route), []
        for number, pipeline in enumerate(self.pipelines):
            at = np.flatnonzero(route == number).tolist()
            if not at:
                continue
            images = pipeline.take(order)
            held.append(images)
            for i, image, shape in zip(at, images, images.shape(), strict=True):
                addresses[i], shapes[i] = image.data_ptr(), tuple(shape)
        return addresses, shapes, held


class _Engine:
    def __init__(self, decoder: str, job: Job, workers: ThreadPoolExecutor):
        self.decoder, self.job, self.workers = decoder, job, workers
        self.here = here()
        self.program = jda.program_of(job.policy.table)
        self.decoders: _Decoders | None = None
        self.scheduled: deque[_Scheduled] = deque()
        self.launched: deque[_Launched] = deque()

    def schedule(self, request: Request, reads: list[Future]) -> None:
        """Hand a request to DALI, as soon as its bytes are there."""
        encoded = [data for read in reads for data in read.result()]
        kept = [i for i, data in enumerate(encoded) if data is not None]
        if self.decoders is None or len(kept) > self.decoders.room:  # those under way keep theirs
            most = len(request.rows) * (1 if request.mixes is None else 1 + request.views.shape[1])
            self.decoders = _Decoders(self.decoder, max(most, 1), self.job.threads, self.here.number)
        self._start(_Scheduled(request, np.array(kept, np.int64), [encoded[i] for i in kept], self.decoders))

    def _start(self, work: _Scheduled) -> None:
        work.route = dali.route(self.decoder, self.job.index.records["key_hash"][work.rows])
        work.decoders.schedule(work.encoded, work.route)
        self.scheduled.append(work)

    def launch(self) -> None:
        """Put the kernels of the oldest batch behind its decoding, on the loader's stream."""
        work = self.scheduled.popleft()
        taken, said = None, ""
        try:
            taken = work.decoders.take(work.route, self.here.order)
        except RuntimeError as error:
            said = dali.cause(error)
        if taken is None:  # and the error is gone, which would keep the pipeline
            self._mend(work, said)
            return self.launch()
        addresses, shapes, held = taken
        all_rows, skipped = work.rows, self.job.skipped
        records = self.job.index.records[all_rows]
        sizes = np.stack([records["height"], records["width"]], axis=1).astype(np.int64)
        # The boxes were drawn for the indexed size, and the kernels do not look.
        wrong = [i for i, size in enumerate(sizes.tolist()) if shapes[i] != (*size, 3)]
        for i in wrong:
            row = all_rows[i]
            skipped.add(int(row), self.job.index.bad(row, f"not of the indexed size: {shapes[i][:2]}"))
        kept = np.setdiff1d(np.arange(len(all_rows)), wrong)
        images = _Images(addresses, sizes, np.full(len(work.request.read), -1))
        images.places[work.places[kept]] = kept
        for number in range(work.request.views.shape[1]):
            self._launch(work, images, number, [held, work.encoded])

    def _launch(self, work: _Scheduled, images: "_Images", number: int, held: list) -> None:
        """Make one batch of the images of a request."""
        rows, views, mixes = work.request.rows, work.request.views[:, number], work.request.mixes
        partners = work.request.places[:, number]
        there = (images.places[: len(rows)] >= 0) & ((partners < 0) | (images.places[partners] >= 0))
        rows, views, partners = rows[there], views[there], partners[there]
        drawn = None if mixes is None else mixes[there, number]
        with self.here.work():
            made = self._pairs(images, np.flatnonzero(there), views)
            if drawn is not None:
                mixed = partners >= 0
                other = self._pairs(images, partners[mixed], drawn["view"][mixed])[1] if mixed.any() else None
                mixing.mix(made[1], other, drawn)
            on_host = self.here.copied(made) if self.job.digests else None
            event = self.here.mark()
        checks = []
        if on_host is not None:
            parts = np.array_split(np.arange(len(rows)), self.job.threads)
            checks = [self.workers.submit(_digests, on_host, event, part) for part in parts]
        self.launched.append(_Launched(batch_of(self.job, rows, made, None, drawn), checks, event, held))

    def _pairs(self, images: "_Images", wanted: np.ndarray, views: np.ndarray) -> Tensor:
        """Views (B,) of the images at the places `wanted` i64 (B,) of what was read."""
        at, base = images.places[wanted], self.job.policy.base
        return jda_gpu.pairs(
            images.addresses[at],
            images.sizes[at],
            self.program,
            views,
            base.pad,
            base.size,
            self.job.pairs,
            self.here.device,
        )

    def _mend(self, work: _Scheduled, said: str) -> None:
        """Find the images of a batch that cannot be decoded, skip them, and start the others again.

        DALI's threads may still write what belonged to the failed batch, so neither its pipelines are used again nor
        what they have decoded since.
        """
        failed, scheduled = work.decoders, self.scheduled
        failed.close()
        bad = _refused(self.decoder, work, self.here)
        if not bad:
            raise UserError(
                "the GPU cannot decode a batch, but each of its images",
                found=said,
                fix="check the GPU and its memory, or decode with --decoder cpu",
            )
        for i, why in bad.items():
            row = work.rows[i]
            self.job.skipped.add(int(row), self.job.index.bad(row, f"cannot be decoded: {why}"))
        decoders, self.scheduled = failed.anew(), deque()
        if self.decoders is failed:
            self.decoders = decoders
        for later in (work.without(list(bad)), *scheduled):
            if later.decoders is failed:
                later.decoders = decoders
                self._start(later)
            else:
                self.scheduled.append(later)

    def finished(self) -> Batch:
        """The oldest batch, once its views are made."""
        batch, checks, event, _ = self.launched.popleft()  # DALI's memory goes with it, so not before the event
        event.synchronize()
        if not self.job.digests:
            return batch
        digests = np.array([digest for check in checks for digest in check.result()], np.uint32)
        return replace(batch, digests=digests.reshape(-1, len(batch.images)))

    def close(self) -> None:
        """Wait until nothing reads or writes the memory that goes now."""
        for decoders in {id(work.decoders): work.decoders for work in self.scheduled}.values():
            decoders.close()
        for launched in self.launched:
            launched.event.synchronize()
        self.launched.clear()
        self.scheduled.clear()


def _digests(pixels: Tensor, event: Any, at: np.ndarray) -> list[list[int]]:
    """CRC-32s of the views of some samples, pixels u8 (2, B, S, S, 3), once the event has passed."""
    event.synchronize()
    return [[zlib.crc32(view) for view in pixels[:, i].numpy()] for i in at.tolist()]


def _refused(decoder: str, work: _Scheduled, here: Cuda | Host) -> dict[int, str]:
    """Which images of a batch cannot be decoded, each alone, and why."""
    found: dict[int, str] = {}
    for number, engine in enumerate(dali.ENGINES[decoder]):
        pipeline = None
        for i in np.flatnonzero(work.route == number).tolist():
            pipeline = pipeline or dali.Batches(1, 1, here.number, engine)
            pipeline.schedule([work.encoded[i]])
            try:
                pipeline.take(None)
            except RuntimeError as error:
                found[i], pipeline = dali.cause(error), None
    return found
