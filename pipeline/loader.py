"""The DALI graph: index rows and views in, pairs of uint8 crops out.

    external source (bytes of the shards) -> fn.decoders.image -> pair kernel (fn.python_function) -> digests

The pair kernel writes the pixels straight into a batch of torch memory (pinned where a GPU will read it), so they
leave the graph without a copy; what flows out of DALI is one word per sample. The identity of a sample rides along
as its position in the plan, never in the order in which DALI happens to work.
"""

import io
import queue
import threading
import zlib
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from cache import UserError
from kernels import jda
from pipeline.index import Index
from pipeline.policy import Policy

Request = tuple[np.ndarray, np.ndarray]
"""One batch of a plan: index rows i64 (B,) and their views (B,), a record array of `pipeline.views.VIEW`."""


@dataclass(frozen=True)
class Batch:
    rows: np.ndarray
    """Index rows i64 (B,)."""
    labels: torch.Tensor
    """i64 (B,)."""
    images: torch.Tensor
    """u8 (2, B, S, S, 3): original views, then augmented ones; (1, B, S, S, 3) for evaluation."""
    digests: np.ndarray | None
    """CRC-32 of each view's pixels, u32 (B, 2), if asked for."""

    @property
    def original(self) -> torch.Tensor:
        return self.images[0]

    @property
    def augmented(self) -> torch.Tensor:
        return self.images[1]


def decoder_identity(device: str) -> dict:
    """What decides the decoded bytes, kept in a store's manifest: decoders differ by a level here and there."""
    if device == "cpu":
        return {"backend": "libjpeg-turbo", "fancy_upsampling": True, "orientation": False}
    return {"backend": "nvjpeg", "hw_decoder_load": 0, "fancy_upsampling": True, "orientation": False}


def load(
    index: Index,
    plan: Iterable[Request],
    policy: Policy,
    *,
    batch_size: int,
    threads: int,
    device: str = "cpu",
    pairs: bool = True,
    digests: bool = False,
) -> Iterator[Batch]:
    """Yield one `Batch` per request of `plan`, in its order, working ahead in the background.

    `batch_size` is the largest request. `threads` decode and as many run the pair kernel. `device` is where DALI
    decodes: "cpu", or "cuda" for `mixed`. `pairs=False` makes only the first view. Raises UserError if an image of
    the plan cannot be read or decoded.
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

    def produce() -> None:
        try:
            with closing(_run(index, plan, policy, batch_size, threads, device, pairs, digests)) as batches:
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


def _run(index, plan, policy, batch_size, threads, device, pairs, digests) -> Generator[Batch, None, None]:
    requests = iter(plan)
    program = jda.program_of(policy.table)
    size, pad = policy.base.size, policy.base.pad
    work: dict[int, tuple[Request, torch.Tensor]] = {}  # by DALI's iteration number

    def read(info):
        rows, views = next(requests)  # StopIteration ends the epoch for DALI
        images = torch.empty((1 + pairs, len(rows), size, size, 3), dtype=torch.uint8, pin_memory=device != "cpu")
        work[info.iteration] = (rows, views), images
        token = np.full((len(rows), 1), info.iteration)
        return [np.frombuffer(_encoded(index, row), np.uint8) for row in rows], token

    def make_pair(views, out, position, image):
        jda.pair(image, program, views[position], pad, out, position)
        return np.array([zlib.crc32(view) for view in out[:, position]] if digests else [0], np.uint32)

    def make_pairs(pool, decoded, tokens):
        (_, views), images = work[int(tokens[0][0])]
        return list(pool.map(partial(make_pair, views, images.numpy()), range(len(decoded)), decoded))

    with ThreadPoolExecutor(threads, thread_name_prefix="pair") as pool:
        graph = _graph(read, partial(make_pairs, pool), device, batch_size, threads)
        iteration = 0
        while True:
            try:
                (words,) = graph.run()
            except StopIteration:
                return
            except RuntimeError as error:
                raise UserError(
                    "cannot decode a batch",
                    found=_cause(error),
                    fix="prepare the data set again; it quarantines what cannot be decoded",
                ) from error
            (rows, _), images = work.pop(iteration)
            iteration += 1
            labels = torch.from_numpy(index.records["label"][rows].astype(np.int64))
            yield Batch(rows, labels, images, np.array(words.as_cpu().as_array()) if digests else None)


def _encoded(index: Index, row: int) -> bytes:
    """The bytes for DALI. CMYK goes through Pillow first and on as PPM: DALI rounds its conversion differently."""
    data = index.read(row)
    if not index.records["cmyk"][row]:
        return data
    converted = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(converted, "PPM")
    return converted.getvalue()


def _graph(read, make_pairs, device: str, batch_size: int, threads: int) -> Pipeline:
    # The dynamic executor loses only the batch that fails; the other one fails for ever after.
    graph = Pipeline(
        batch_size,
        threads,
        device_id=None if device == "cpu" else torch.cuda.current_device(),
        exec_dynamic=True,
        prefetch_queue_depth=2,
    )
    with graph:
        encoded, token = fn.external_source(
            source=read,
            num_outputs=2,
            batch=True,
            batch_info=True,
            dtype=[types.DALIDataType.UINT8, types.DALIDataType.INT64],
        )
        images = fn.decoders.image(
            encoded,
            device="cpu" if device == "cpu" else "mixed",
            output_type=types.DALIImageType.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
            hw_decoder_load=0.0,
        )
        graph.set_outputs(
            fn.python_function(images.cpu(), token, function=make_pairs, batch_processing=True, num_outputs=1)
        )
    graph.build()
    return graph


def _cause(error: RuntimeError) -> str:
    """The line of DALI's report that says what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "rror" in line and not line.startswith("Error in")), lines[0])
