"""The one decoder, DALI: on the CPU an image at a time, on a GPU by batches."""

import io
import threading

import numpy as np
from PIL import Image

from cache import UserError

_local = threading.local()


class Undecodable(Exception):
    """DALI refuses an image; the message says why."""


def identity(decoder: str) -> dict:
    """What decides the decoded bytes, kept in a store's manifest: decoders differ by a level here and there.

    `decoder` is "cpu", "gpu" (nvJPEG's kernels alone) or "gpu-hw" (its hardware engine for all that it can take).
    DALI's default would split each batch between the two.
    """
    if decoder == "cpu":
        return {"backend": "libjpeg-turbo", "fancy_upsampling": True, "orientation": False}
    load = int(decoder == "gpu-hw")
    return {"backend": "nvjpeg", "hw_decoder_load": load, "fancy_upsampling": True, "orientation": False}


def of_identity(found: dict) -> str:
    """The decoder whose `identity` this is; UserError if none of ours is."""
    for decoder in ("cpu", "gpu", "gpu-hw"):
        if identity(decoder) == found:
            return decoder
    raise UserError("the store's pixels come from an unknown decoder", found=found, fix="run precompute-teacher anew")


def decode(data: bytes) -> np.ndarray:
    """The pixels of an encoded image, u8 (H, W, 3), valid until this thread decodes the next one.

    EXIF orientation is not applied. Raises Undecodable.

    Each thread has a pipeline for batches of one. A large batch would cost 4 to 7 % less CPU time; but when DALI
    2.4.0 meets an image that it cannot decode, it gives up the batch while its threads still work on the rest, in
    memory that is freed: wrong pixels in other batches, or a crash.
    """
    try:
        pipeline = _local.pipeline
    except AttributeError:
        pipeline = _local.pipeline = _build()
    try:
        pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8)])
        (_local.decoded,) = pipeline.run()
    except RuntimeError as error:
        del _local.pipeline  # it would fail for ever after
        raise Undecodable(cause(error)) from None
    return np.asarray(_local.decoded[0])


def as_rgb(data: bytes) -> bytes:
    """A CMYK image as PPM, converted by Pillow: DALI rounds that conversion differently."""
    converted = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(converted, "PPM")
    return converted.getvalue()


def gpu_pipeline(batch_size: int, threads: int, device: int, hardware: bool):
    """A DALI pipeline that decodes batches fed to "encoded" on a GPU: images u8 (H, W, 3) in device memory."""
    return _build(batch_size, threads, device, {"device": "mixed", "hw_decoder_load": float(hardware)})


def _build(batch_size: int = 1, threads: int = 1, device: int | None = None, decoder: dict | None = None):
    try:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline
    except ImportError:
        raise UserError("DALI is not installed", fix="pip install '.[cuda13]' or '.[cuda12]'") from None
    # On the CPU the calling thread does the work: handing it to another one and back costs 3 %.
    alone = device is None
    pipeline = Pipeline(
        batch_size,
        threads,
        device_id=device,
        exec_dynamic=False,
        exec_async=not alone,
        exec_pipelined=not alone,
        prefetch_queue_depth=1,
    )
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.DALIDataType.UINT8)
        images = fn.decoders.image(
            encoded,
            output_type=types.DALIImageType.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
            **(decoder or {}),
        )
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


def cause(error: RuntimeError) -> str:
    """The line of DALI's report that says what went wrong."""
    text = str(error)
    return text.partition("encountered:")[2].strip().partition("\n")[0] or text.strip().partition("\n")[0]
