"""The loader: index rows and views in, pairs of uint8 crops out.

    shards -> readers (threads) -> workers (threads): DALI decode -> pair kernel -> batch

A worker takes one sample from its bytes to its two crops, so that the decoded image is still in its core's cache when
the pair kernel reads it. Several batches are under way at once. What identifies a sample is its place in the plan,
never the order in which threads happen to work; batches leave in the order in which they were asked for.
"""

import queue
import threading
from collections.abc import Generator, Iterable
from contextlib import closing

import torch

from pipeline.data.index import Index
from pipeline.data.skipped import Skipped
from pipeline.views.batch import Batch, Job
from pipeline.views.on_cpu import on_cpu
from pipeline.views.plan import Request
from pipeline.views.policy import Policy


class Loader:
    """Makes the batches of one plan after another. A sample that it has skipped once stays skipped."""

    def __init__(
        self, index: Index, policy: Policy, *, threads: int, decoder: str = "cpu", max_bad: float = 0.001
    ) -> None:
        """`threads` decode and make views. `decoder` is one of `pipeline.data.probes.identity`; with a GPU's the views
        are made there too, and a batch's images stay on it. `max_bad` is the largest share of the data set that may be
        skipped.
        """
        self.index, self.policy, self.threads, self.decoder = index, policy, threads, decoder
        self.skipped = Skipped(index, max_bad)

    def batches(
        self, plan: Iterable[Request], *, pairs: bool = True, digests: bool = False
    ) -> Generator[Batch, None, None]:
        """Yield one `Batch` per request of `plan`, in its order, working ahead in the background.

        `pairs=False` makes only the first view. A sample that cannot be read or decoded is entered in `skipped` and
        left out of its batch, which may become empty. So is one whose partner cannot, but it is not entered. Closing
        the generator stops all of its threads. Raises UserError if more samples are skipped than `max_bad` allows.
        """
        job = Job(self.index, self.policy, self.threads, self.skipped, pairs, digests)
        if self.decoder == "cpu":
            return _behind(lambda: on_cpu(job, plan))
        from pipeline.views.on_gpu import on_gpu  # it needs Triton

        return _behind(lambda: on_gpu(self.decoder, job, plan))


def _behind(start) -> Generator[Batch, None, None]:
    """What the generator made by `start` yields, run by a thread of its own that is two items ahead."""
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
            with closing(start()) as batches:
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
            if item.images.is_cuda:  # made on the loader's stream: not to be handed out again while this one reads
                item.images.record_stream(torch.cuda.current_stream(item.images.device))
            yield item
    finally:
        stopped.set()
        thread.join()
