"""The loader: index rows and views in, pairs of uint8 crops out.

    shards -> readers (threads) -> workers (threads): DALI decode -> pair kernel -> batch

A worker takes one sample from its bytes to its two crops, so that the decoded image is still in its core's cache when
the pair kernel reads it. Several batches are under way at once. What identifies a sample is its place in the plan,
never the order in which threads happen to work; batches leave in the order in which they were asked for.
"""

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing

import torch

from pipeline.data.index import Index
from pipeline.data.skipped import Skipped
from pipeline.views.batch import Batch, Request
from pipeline.views.on_cpu import on_cpu
from pipeline.views.policy import Policy


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

    `threads` decode and make views. `decoder` is one of `pipeline.data.decode.identity`; with a GPU's the views are
    made there too, and `images` stay on it. `pairs=False` makes only the first view. A sample that cannot be read or
    decoded is entered in `skipped` and left out of its batch, which may become empty. Raises UserError if that
    happens to more samples than `skipped` allows.
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
                run = on_cpu(*arguments)
            else:
                from pipeline.views.on_gpu import on_gpu  # it needs Triton

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
