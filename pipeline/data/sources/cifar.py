"""CIFAR-10 and CIFAR-100, python version, as folder or .tar.gz."""

import io
import os
import pickle
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cache.errors import UserError
from pipeline.data.classes import Classes
from pipeline.data.ledger import Ledger
from pipeline.data.sources.base import Options, Sample, Source, account, encoded


class _CifarUnpickler(pickle.Unpickler):
    """Rebuilds numpy arrays and plain containers, and calls nothing else that a file might name."""

    _ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise UserError(
                "unsafe pickle in the CIFAR archive",
                found=f"{module}.{name}",
                expected="numpy arrays only",
                fix="get the archive from its home page",
            )
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


_CIFAR = {
    10: ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", "batches.meta"),
    100: ("cifar-100-python", ["train"], "test", "meta"),
}
_CIFAR_LABELS = {10: (b"labels", b"label_names"), 100: (b"fine_labels", b"fine_label_names")}
_MAX_PICKLE_BYTES = 512 << 20  # the largest real one, CIFAR-100's train, has 155 MB


def cifar10(path: str, options: Options, ledger: Ledger) -> dict[str, Source]:
    """Train and val, stored losslessly as PNG."""
    return _cifar(Path(path), 10, ledger)


def cifar100(path: str, options: Options, ledger: Ledger) -> dict[str, Source]:
    """Train and val by their fine labels, stored losslessly as PNG."""
    return _cifar(Path(path), 100, ledger)


def _cifar(path: Path, classes: int, ledger: Ledger) -> dict[str, Source]:
    folder, train, test, meta = _CIFAR[classes]
    label_key, names_key = _CIFAR_LABELS[classes]
    try:
        blobs = _read_batches(path, folder, [*train, test, meta], ledger)
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"cannot read {path}", found=error, fix=f"give the {folder} folder or .tar.gz") from None
    class_names = _unpickle(blobs[meta], meta).get(names_key)
    if not (
        isinstance(class_names, list)
        and len(class_names) == classes
        and all(isinstance(name, bytes) for name in class_names)
    ):
        raise _bad_batch(meta)
    batches = {name: _cifar_batch(_unpickle(blobs[name], name), name, label_key, classes) for name in [*train, test]}

    def samples(names: list[str]) -> Iterator[Sample]:
        for name in names:
            for i, (image, label) in enumerate(zip(*batches[name], strict=True)):
                yield Sample(f"{name}/{i:05d}", "png", encoded(Image.fromarray(image), "PNG"), int(label))

    return {
        split: Source(
            samples(names),
            sum(len(batches[name][1]) for name in names),
            Classes(classes, tuple(name.decode("utf-8", "replace") for name in class_names), "source"),
            files=0,
        )
        for split, names in (("train", train), ("val", [test]))
    }


def _read_batches(path: Path, folder: str, names: list[str], ledger: Ledger) -> dict[str, bytes]:
    if path.is_dir():
        path = path / folder if (path / folder).is_dir() else path
        blobs = {name: (path / name).read_bytes() for name in names}
        account([entry.name for entry in os.scandir(path) if not entry.is_dir()], names, ledger)
        return blobs
    blobs = {}
    with tarfile.open(path) as tar:
        members = {member.name: member for member in tar.getmembers() if not member.isdir()}
        for name in names:
            member = members.get(f"{folder}/{name}")
            if member is None:
                raise UserError(
                    f"cannot read {path}", expected=f"{folder}/{name} in it", fix="check the archive"
                ) from None
            if not member.isreg() or member.size > _MAX_PICKLE_BYTES:
                raise _bad_batch(name)
            file = tar.extractfile(member)
            assert file
            blobs[name] = file.read()
    account(list(members), [f"{folder}/{name}" for name in names], ledger)
    return blobs


def _unpickle(blob: bytes, name: str) -> dict:
    try:
        content = _CifarUnpickler(io.BytesIO(blob), encoding="bytes").load()
    except UserError:
        raise
    except Exception:  # a damaged pickle may raise anything that its own opcodes can reach
        raise _bad_batch(name) from None
    if not isinstance(content, dict):
        raise _bad_batch(name)
    return content


def _cifar_batch(content: dict, name: str, label_key: bytes, classes: int) -> tuple[np.ndarray, list[int]]:
    """Images (n, 32, 32, 3) uint8 and n labels of one batch, checked."""
    data, labels = content.get(b"data"), content.get(label_key)
    if not (
        isinstance(data, np.ndarray)
        and data.dtype == np.uint8
        and isinstance(labels, list)
        and labels
        and data.shape == (len(labels), 3072)
        and all(type(label) is int and 0 <= label < classes for label in labels)
    ):
        raise _bad_batch(name)
    # Contiguous, since Pillow takes the buffer as it lies.
    return np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels


def _bad_batch(name: str) -> UserError:
    return UserError(f"damaged CIFAR batch {name}", fix="get the archive from its home page again")
