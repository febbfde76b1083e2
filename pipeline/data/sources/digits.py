"""scikit-learn's handwritten digits: no file to fetch."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from cache.errors import UserError
from pipeline.data.classes import Classes
from pipeline.data.ledger import Ledger
from pipeline.data.sources.base import Options, Sample, Source, encoded


def digits(_: str, options: Options, ledger: Ledger) -> dict[str, Source]:
    """scikit-learn's 1,797 handwritten 8x8 digits as 64x64 RGB JPEGs, 80/20 train/val stratified by class."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise UserError("the digits source needs scikit-learn", fix="pip install '.[demo]'") from None
    scans: Any = load_digits()
    labels = scans.target
    train, val = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=options.seed)

    def samples(rows: Any) -> Iterator[Sample]:
        for i in rows:
            scan = Image.fromarray((scans.images[i] * (255 / 16)).round().astype(np.uint8))
            image = scan.resize((64, 64), Image.Resampling.BICUBIC).convert("RGB")
            yield Sample(f"digit/{i:04d}", "jpg", encoded(image, "JPEG", quality=95), int(labels[i]))

    classes = Classes(10, tuple(str(digit) for digit in range(10)), "source")
    return {name: Source(samples(rows), len(rows), classes, files=0) for name, rows in (("train", train), ("val", val))}
