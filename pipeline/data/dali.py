"""DALI pipelines that decode: one image at a time in the calling thread, or batches in the background.

    decoder    who decodes on a GPU
    gpu        nvJPEG's kernels; the Huffman codes of an image below a megapixel are read by the host's threads
    gpu-hw     the hardware engine, for all that it can take; the rest as with gpu
    gpu-both   both at once: a sample's key hash says which of them decodes it, in every view, epoch and batch

DALI's own default would split each batch between the two by position, which no other batch could replay.
"""

from typing import Any

import numpy as np

from cache import UserError

DEPTH = 2
"""Batches that a background pipeline works on at once."""

ENGINE_SHARE = 0.65
"""Of the samples, with gpu-both, that go to the hardware engine: DALI's own default for a batch."""

ENGINES = {"gpu": (0.0,), "gpu-hw": (1.0,), "gpu-both": (1.0, 0.0)}
"""Decoder -> `hw_decoder_load` of each pipeline that it takes."""

# 8 × 8 gray pixels: what a pipeline starts with.
_TINY = b"P5 8 8 255\n" + bytes(64)


def route(decoder: str, key_hash: np.ndarray) -> np.ndarray:
    """Which pipeline of `ENGINES[decoder]` decodes each sample, by its key hash u64 (B,): i64 (B,)."""
    if len(ENGINES[decoder]) == 1:
        return np.zeros(len(key_hash), np.int64)
    return ((key_hash >> np.uint64(48)) >= np.uint64(round(ENGINE_SHARE * 2**16))).astype(np.int64)


class Batches:
    """Decodes batches of up to `room` images in the background and hands them out in order.

    The bytes of a batch are not copied: hold them until its pixels have been read. After an error no other batch may
    be taken: DALI gives up a batch while its threads still write, and what they write to may belong to another one.
    """

    def __init__(self, room: int, threads: int, device: int | None, engine: float):
        """`device`: number of the GPU, None for the CPU; `engine`: share of its samples for the hardware engine."""
        # Only the dynamic executor gives every batch memory of its own, and results in the order of a stream.
        how = {} if device is None else {"device": "mixed", "hw_decoder_load": engine}
        self._pipeline: Any = _build(
            how,
            no_copy=True,
            batch_size=room,
            num_threads=threads,
            device_id=device,
            exec_dynamic=True,
            prefetch_queue_depth=DEPTH,
            set_affinity=False,  # else the threads of all ranks share the cores nearest to the GPU
        )
        # The first call of schedule_run starts as many batches as may be under way, each later one a single batch.
        for _ in range(DEPTH):
            self._feed([_TINY])
        self._pipeline.schedule_run()
        for _ in range(DEPTH):
            self._pipeline.outputs()

    def close(self) -> None:
        """End the pipeline and its threads; what was taken stays valid."""
        self._pipeline = None

    def _feed(self, encoded: list[bytes]) -> None:
        self._pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in encoded])

    def schedule(self, encoded: list[bytes]) -> None:
        """Start to decode a batch; at most `DEPTH` may be scheduled and not yet taken."""
        self._feed(encoded)
        self._pipeline.schedule_run()

    def take(self, stream: int | None) -> Any:
        """The oldest batch that was scheduled: a DALI TensorList, u8 (H, W, 3) each, in the order of a CUDA stream.

        Its memory is its own until it is deleted. Raises RuntimeError if an image cannot be decoded.
        """
        (decoded,) = self._pipeline.outputs(stream)
        return decoded


def alone() -> Any:
    """A pipeline for one image at a time, decoded by the calling thread: another one and back would cost 3 %."""
    return _build(
        {},
        batch_size=1,
        num_threads=1,
        device_id=None,
        exec_dynamic=False,
        exec_async=False,
        exec_pipelined=False,
        prefetch_queue_depth=1,
    )


def _build(decoder: dict, no_copy: bool = False, **options: Any) -> Any:
    try:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline
    except ImportError:
        raise UserError("DALI is not installed", fix="pip install '.[cuda13]' or '.[cuda12]'") from None
    pipeline = Pipeline(**options)
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.DALIDataType.UINT8, no_copy=no_copy)
        images = fn.decoders.image(
            encoded,
            output_type=types.DALIImageType.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
            **decoder,
        )
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


def cause(error: RuntimeError) -> str:
    """The line of DALI's report that says what went wrong."""
    text = str(error)
    return text.partition("encountered:")[2].strip().partition("\n")[0] or text.strip().partition("\n")[0]


def version() -> str:
    """Of DALI and of the library that it decodes with, as installed; "none" without it."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    found = []
    for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-nvimgcodec-cu13", "nvidia-nvimgcodec-cu12"):
        try:
            found.append(f"{name.removeprefix('nvidia-').rpartition('-')[0]} {version_of(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found) or "none"
