"""Encoded images for tests: smooth random colour fields, so that a lossy codec keeps their content."""

import io

import numpy as np
from PIL import Image


def pixels(rng: np.random.Generator, width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A random image of any Pillow mode whose channels are uint8 (RGB, L, CMYK, RGBA, LA)."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, channels), dtype=np.uint8)
    bands = [
        Image.fromarray(coarse[..., band]).resize((width, height), Image.Resampling.BICUBIC) for band in range(channels)
    ]
    return Image.merge(mode, bands)


def encode(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def jpeg(rng: np.random.Generator, width: int, height: int, mode: str = "RGB", quality: int = 90, **options) -> bytes:
    """A JPEG of mode RGB, L or CMYK; options go to Pillow (progressive, exif, subsampling)."""
    return encode(pixels(rng, width, height, mode), "JPEG", quality=quality, **options)


def png(rng: np.random.Generator, width: int, height: int, mode: str = "RGB", **options) -> bytes:
    """A PNG of mode RGB, L, RGBA or LA."""
    return encode(pixels(rng, width, height, mode), "PNG", **options)
