"""The one decoder, DALI, on the CPU: an image at a time. A GPU's decodes batches (`pipeline.data.dali`)."""

import io
import threading

import numpy as np
from PIL import Image

from pipeline.data import dali

_local = threading.local()


class Undecodable(Exception):
    """DALI refuses an image; the message says why."""


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
        pipeline = _local.pipeline = dali.alone()
    try:
        pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8)])
        (_local.decoded,) = pipeline.run()
    except RuntimeError as error:
        del _local.pipeline  # it would fail for ever after
        raise Undecodable(dali.cause(error)) from None
    return np.asarray(_local.decoded[0])


def as_rgb(data: bytes) -> bytes:
    """A CMYK image as PPM, converted by Pillow: DALI rounds that conversion differently. Raises Undecodable."""
    converted = io.BytesIO()
    try:
        Image.open(io.BytesIO(data)).convert("RGB").save(converted, "PPM")
    except Exception as error:  # of a damaged file Pillow raises nearly anything
        raise Undecodable(f"Pillow: {error}") from None
    return converted.getvalue()
