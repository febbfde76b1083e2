"""ImageNet-like images without ImageNet: crops of two photographs, zoomed, tinted and mixed by class."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from cache.errors import UserError
from pipeline.data.classes import Classes
from pipeline.data.ledger import Ledger
from pipeline.data.sources.base import Options, Sample, Source, encoded

_CHUNK = 256  # samples in flight
# ImageNet's usual sizes (width, height); its few large photographs carry much of its mean of 110 KB a file.
_SIZES = ((500, 375),) * 6 + ((375, 500),) * 2 + ((500, 333), (800, 600))
_QUALITY = 97


def synthetic(count: str, options: Options, ledger: Ledger) -> dict[str, Source]:
    """`count` JPEGs of about 500x375 and 110 KB in 1000 classes, label i mod classes; a function of (seed, i) alone.

    A class sets how the two photographs are mixed and tinted; crop, zoom, size and a smaller tint vary by
    sample, so a network can learn the classes but not from one pixel.
    """
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise UserError("the synthetic source needs scikit-learn", fix="pip install '.[demo]'") from None
    bundle: Any = load_sample_images()
    photographs = [Image.fromarray(pixels) for pixels in bundle.images]

    number, classes, seed = int(count), options.classes or 1000, options.seed

    def sample(i: int) -> Sample:
        label = i % classes
        return Sample(f"synthetic/{i:08d}", "jpg", _image(photographs, label, i, seed), label)

    def samples() -> Iterator[Sample]:
        with ThreadPoolExecutor(options.threads) as pool:
            for start in range(0, number, _CHUNK):
                yield from pool.map(sample, range(start, min(start + _CHUNK, number)))

    return {"": Source(samples(), number, Classes(classes), files=0)}


def _image(photographs: list[Image.Image], label: int, i: int, seed: int) -> bytes:
    of_class, rng = np.random.default_rng((seed, 0, label)), np.random.default_rng((seed, 1, i))
    width, height = _SIZES[rng.integers(len(_SIZES))]
    crops = []
    for photograph in photographs:
        scale = rng.uniform(0.4, 1) * min(photograph.width / width, photograph.height / height)
        x = rng.uniform(0, photograph.width - scale * width)
        y = rng.uniform(0, photograph.height - scale * height)
        box = (x, y, x + scale * width, y + scale * height)
        crops.append(photograph.resize((width, height), Image.Resampling.BICUBIC, box=box))
    mixed = Image.blend(crops[0], crops[1], of_class.uniform())
    gains = of_class.uniform(0.8, 1.8, 3) * rng.uniform(0.9, 1.1, 3)
    table = np.clip(np.arange(256) * gains[:, None], 0, 255).astype(np.uint8)
    return encoded(mixed.point(table.ravel().tolist()), "JPEG", quality=_QUALITY)
