"""The loader's GPU half: DALI decodes batches there, Triton kernels make the views, pixels never leave the device."""

import zlib
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from cache import UserError
from kernels import jda
from kernels.jda.gpu import pairs as jda_gpu
from pipeline.data.decode import cause, gpu_pipeline
from pipeline.views.batch import AHEAD, Batch, Job, read_ahead
from pipeline.views.plan import Request


def on_gpu(decoder: str, job: Job, plan: Iterable[Request]) -> Generator[Batch, None, None]:
    """As `pipeline.views.loader.Loader.batches`, on the current CUDA device and a stream of its own."""
    index, policy, threads = job.index, job.policy, job.threads
    device = torch.cuda.current_device()
    stream, program = torch.cuda.Stream(device), jda.program_of(policy.table)
    pipeline: Any = None
    room = 0  # of the pipeline, in images
    launched: deque[tuple[Batch, object, Any]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="work") as workers:

        def finished() -> Batch:
            batch, _, event = launched.popleft()  # DALI's memory goes with the second, so not before the event
            event.synchronize()
            return _with_digests(batch, workers) if job.digests else batch

        for (rows, views), reads in read_ahead(job, plan, AHEAD):
            encoded = [data for read in reads for data in read.result()]
            kept = [i for i, data in enumerate(encoded) if data is not None]
            rows, views = rows[kept], views[kept]
            labels = torch.from_numpy(index.records["label"][rows].astype(np.int64))
            sizes = np.stack([index.records["height"][rows], index.records["width"][rows]], axis=1)
            decoded, addresses = None, np.zeros(0, np.int64)
            if kept:
                if len(kept) > room:
                    room = len(encoded)
                    pipeline = gpu_pipeline(room, threads, device, decoder == "gpu-hw")
                pipeline.feed_input("encoded", [np.frombuffer(encoded[i], np.uint8) for i in kept])
                decoded = _decode(pipeline, stream)
                addresses = np.array([image.data_ptr() for image in decoded], np.int64)
                assert [tuple(image.shape()[:2]) for image in decoded] == list(map(tuple, sizes.tolist()))
            with torch.cuda.stream(stream):
                images = jda_gpu.pairs(addresses, sizes, program, views, policy.base.pad, policy.base.size, job.pairs)
                # Allocated on this stream, used on the training's: not to be handed out again before that is done.
                images.record_stream(torch.cuda.default_stream(device))
                launched.append((Batch(rows, labels, images, None), decoded, stream.record_event()))
            if len(launched) > 1:
                yield finished()
        while launched:
            yield finished()


def _decode(pipeline, stream: torch.cuda.Stream):
    try:
        (decoded,) = pipeline.run(cuda_stream=stream.cuda_stream)
        return decoded
    except RuntimeError as error:
        # The bytes are those that were decoded when the data set was prepared. And going on after an error is not
        # safe: see pipeline.data.decode.
        raise UserError(
            "the GPU cannot decode a batch", found=cause(error), fix="check the GPU, or decode with --decoder cpu"
        ) from None


def _with_digests(batch: Batch, workers: ThreadPoolExecutor) -> Batch:
    pixels = batch.images.cpu().numpy()
    checks = list(workers.map(lambda i: [zlib.crc32(view) for view in pixels[:, i]], range(len(batch.rows))))
    return Batch(batch.rows, batch.labels, batch.images, np.array(checks, np.uint32).reshape(-1, len(pixels)))
