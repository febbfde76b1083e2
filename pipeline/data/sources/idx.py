"""IDX files, as MNIST and its many relatives come: http://yann.lecun.com/exdb/mnist, plain or gzipped."""

import gzip
import os
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from cache.errors import UserError
from pipeline.data.classes import Classes
from pipeline.data.ledger import Ledger
from pipeline.data.sources.base import Options, Sample, Source, account, encoded

_SPLITS = {"train": ("train",), "val": ("t10k", "test")}
_MAX_BYTES = 4 << 30  # of one file, unpacked


def idx(path: str, options: Options, ledger: Ledger) -> dict[str, Source]:
    """Train and val, grey or colour, stored losslessly as PNG; the classes are numbers, 0 to the highest label.

    The folder holds `…train-images-idx3-ubyte`, `…train-labels-idx1-ubyte`, and two of `t10k` or `test`, each with or
    without `.gz`. UserError if one is missing, there twice, or damaged.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(path) if not entry.is_dir())
    except OSError as error:
        raise UserError(f"cannot read {path}", found=error.strerror, fix="give the folder of the IDX files") from None
    files = {(split, what): _file(path, names, split, what) for split in _SPLITS for what in ("images", "labels")}
    account(names, list(files.values()), ledger)
    arrays = {role: _read(os.path.join(path, name)) for role, name in files.items()}
    for split in _SPLITS:
        images, labels = arrays[split, "images"], arrays[split, "labels"]
        if labels.ndim != 1 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)):
            raise _bad(files[split, "images"], f"{images.ndim} and {labels.ndim} dimensions", "3 and 1")
        if len(images) != len(labels) or not images.size:
            raise _bad(files[split, "labels"], f"{len(labels)} labels", f"{len(images)}, one for each image")
    highest = max(int(arrays[split, "labels"].max()) for split in _SPLITS)
    classes = Classes(options.classes or highest + 1)
    return {
        split: Source(
            _samples(split, arrays[split, "images"], arrays[split, "labels"]), len(arrays[split, "labels"]), classes, 0
        )
        for split in _SPLITS
    }


def _samples(split: str, images: np.ndarray, labels: np.ndarray) -> Iterator[Sample]:
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield Sample(f"{split}/{i:08d}", "png", encoded(Image.fromarray(image), "PNG"), int(label))


def _file(path: str, names: list[str], split: str, what: str) -> str:
    """The one file of a split's images or labels."""
    found = [
        name
        for name in names
        if f"{what}-idx" in name.replace(".idx", "-idx") and any(word in name for word in _SPLITS[split])
    ]
    if len(found) != 1:
        expected = f"one {_SPLITS[split][0]}-{what}-idx{3 if what == 'images' else 1}-ubyte, with or without .gz"
        raise UserError(
            f"cannot read {path}", found=", ".join(found) or "none", expected=expected, fix="check the folder"
        )
    return found[0]


def _read(path: str) -> np.ndarray:
    """The array of unsigned bytes in an IDX file; nothing is allocated before its length has been found right."""
    name = os.path.basename(path)
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:3] != b"\0\0\x08" or not 1 <= head[3] <= 4:
                raise _bad(name, f"a file that begins with {head!r}", "IDX of unsigned bytes")
            shape = tuple(np.frombuffer(file.read(4 * head[3]), ">u4").astype(int).tolist())
            size = int(np.prod(shape, dtype=object))
            if len(shape) != head[3] or size > _MAX_BYTES:
                raise _bad(name, f"{size:,} bytes announced", f"at most {_MAX_BYTES:,}")
            data = file.read(size + 1)
    except UserError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"cannot read {path}", found=error, fix="fetch it again") from None
    if len(data) != size:
        raise _bad(name, f"{len(data):,} bytes", f"{size:,}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _bad(name: str, found: object, expected: object) -> UserError:
    return UserError(f"damaged IDX file {name}", found=found, expected=expected, fix="fetch it again")
