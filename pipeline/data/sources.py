"""Readers of image sources: samples for the shards to be written, and the scan of shards that exist."""

import io
import json
import os
import pickle
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from cache.errors import UserError
from pipeline.data import index
from pipeline.data.classes import Classes, numbered

EXTENSIONS = ("jpg", "jpeg", "png")  # the first one that a sample has is its image

_MAX_IMAGE_BYTES = 1 << 30
_MAX_LABEL_BYTES = 1 << 20


class Sample(NamedTuple):
    key: str  # WebDataset key: no dot after the last slash
    extension: str  # jpg, jpeg or png
    image: bytes
    label: int


class Source(NamedTuple):
    samples: Iterator[Sample]
    count: int
    classes: Classes


def imagefolder(root: Path, seed: int) -> Source:
    """ROOT/class/**/name.jpg|jpeg|png; sorted classes, files shuffled by `seed`, hidden ones left out.

    A key is the path without its extension; dots and percent signs of the file name are percent-escaped, and files
    that differ only in their extension keep it, so that every file has a key of its own.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
        files = sorted(
            (os.path.join(folder, entry), label)
            for label, name in enumerate(names)
            for folder, _, entries in os.walk(root / name, onerror=_fail)
            for entry in entries
            if not entry.startswith(".") and _extension(entry) in EXTENSIONS
        )
    except OSError as error:
        raise UserError(f"cannot read {error.filename}", found=error.strerror, fix="give a folder of folders") from None
    if not files:
        raise UserError(f"no images in {root}", expected="ROOT/class/name.jpg, .jpeg or .png", fix="check the path")
    stems = Counter(os.path.splitext(path)[0] for path, _ in files)

    def samples() -> Iterator[Sample]:
        for i in np.random.default_rng(seed).permutation(len(files)):
            path, label = files[i]
            stem = os.path.splitext(path)[0]
            name = os.path.basename(stem if stems[stem] == 1 else path).replace("%", "%25").replace(".", "%2E")
            key = os.path.join(os.path.relpath(os.path.dirname(path), root), name)
            # A line break would hide the member from WebDataset's rule for keys.
            yield Sample(key.replace("\n", "%0A"), _extension(path), _read(path), label)

    return Source(samples(), len(files), numbered(names))


def _fail(error: OSError) -> None:
    raise error


def _extension(path: str) -> str:
    return os.path.splitext(path)[1][1:].lower()


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}", found=error.strerror, fix="check the file") from None


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


def cifar(path: Path, classes: int) -> dict[str, Source]:
    """CIFAR-10 or -100, python version, as folder or .tar.gz -> train and val, stored losslessly as PNG."""
    folder, train, test, meta = _CIFAR[classes]
    label_key, names_key = _CIFAR_LABELS[classes]
    try:
        blobs = _read_batches(path, folder, [*train, test, meta])
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
                yield Sample(f"{name}/{i:05d}", "png", _encode(Image.fromarray(image), "PNG"), int(label))

    return {
        split: Source(
            samples(names),
            sum(len(batches[name][1]) for name in names),
            Classes(classes, tuple(name.decode("utf-8", "replace") for name in class_names), "source"),
        )
        for split, names in (("train", train), ("val", [test]))
    }


def _read_batches(path: Path, folder: str, names: list[str]) -> dict[str, bytes]:
    if path.is_dir():
        path = path / folder if (path / folder).is_dir() else path
        return {name: (path / name).read_bytes() for name in names}
    blobs = {}
    with tarfile.open(path) as tar:
        for name in names:
            try:
                member = tar.getmember(f"{folder}/{name}")
                file = tar.extractfile(member)
            except KeyError:
                raise UserError(
                    f"cannot read {path}", expected=f"{folder}/{name} in it", fix="check the archive"
                ) from None
            if file is None or member.size > _MAX_PICKLE_BYTES:
                raise _bad_batch(name)
            blobs[name] = file.read()
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


def _encode(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def digits(seed: int) -> dict[str, Source]:
    """scikit-learn's 1,797 handwritten 8x8 digits as 64x64 RGB JPEGs, 80/20 train/val stratified by class."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise UserError("the digits source needs scikit-learn", fix="pip install '.[demo]'") from None
    scans: Any = load_digits()
    labels = scans.target
    train, val = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed)

    def samples(rows: Any) -> Iterator[Sample]:
        for i in rows:
            scan = Image.fromarray((scans.images[i] * (255 / 16)).round().astype(np.uint8))
            image = scan.resize((64, 64), Image.Resampling.BICUBIC).convert("RGB")
            yield Sample(f"digit/{i:04d}", "jpg", _encode(image, "JPEG", quality=95), int(labels[i]))

    classes = Classes(10, tuple(str(digit) for digit in range(10)), "source")
    return {name: Source(samples(rows), len(rows), classes) for name, rows in (("train", train), ("val", val))}


class Scan(NamedTuple):
    """What the headers and labels of one tar say."""

    shard: str
    records: np.ndarray  # (n,) RECORD; shard, height, width, crc and status still 0
    keys: list[str]
    causes: list[str | None]  # why a sample cannot be used
    end: int  # byte behind the last member
    cut: str | None  # why nothing could be read from there on; None for a whole tar


def scan(file: BinaryIO, shard: str) -> Scan:
    """Samples of a tar: regular members that share a key, wherever they stand; rows in order of appearance.

    A tar is whole if a block of zeros follows its members. In one that is not, the members before the cut
    count, and a last sample that lacks its image or label goes with the rest.
    UserError, with the name `shard`, for an unreadable file and for a key that has two members of one extension.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}  # key -> extension -> offset, size
    end, cut, key = 0, None, ""
    try:
        for member in _members(file):
            name, offset, size, end = member
            split = index.split_name(name)
            # As webdataset does, leave out __meta__/notes.txt and the like.
            if split is None or re.match(r"__[^/]*__($|/)", name):
                continue
            key, extension = split
            if extension in samples.setdefault(key, {}):
                raise duplicate_key(key, shard, shard)
            samples[key][extension] = offset, size
        if os.pread(file.fileno(), 512, end) != bytes(512):
            empty = os.fstat(file.fileno()).st_size == 0
            cut = "tar ends early" if end or empty else "not an uncompressed tar"
            if samples and not (samples[key].keys() & {*EXTENSIONS} and samples[key].keys() & {"cls", "json"}):
                del samples[key]
        rows, causes = [], []
        for key, sample in samples.items():
            offset, size, label, cause = _row(file.fileno(), sample)
            rows.append((0, offset, size, 0, 0, label, index.key_hash(key), 0, 0, 0))
            causes.append(cause)
    except OSError as error:
        raise UserError(f"cannot read shard {shard}", found=error.strerror, fix="check the file") from None
    return Scan(shard, np.array(rows, index.RECORD), list(samples), causes, end, cut)


def _members(file: BinaryIO) -> Iterator[tuple[str, int, int, int]]:
    """(name, offset, size, end) of each whole member; stops where the tar breaks off."""
    length = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while member := tar.next():
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # it would keep every header
                if member.size < 0 or member.offset_data + member.size > length:
                    return
                plain = member.isreg() and not member.issparse()
                yield member.name if plain else "", member.offset_data, member.size, tar.offset
    except (tarfile.TarError, UnicodeError, ValueError, OverflowError):
        return


def _row(descriptor: int, sample: dict[str, tuple[int, int]]) -> tuple[int, int, int, str | None]:
    """Offset, size, label, and why it cannot be used; the first member's offset if none is an image."""
    image = next((sample[extension] for extension in EXTENSIONS if extension in sample), None)
    if image is None:
        return next(iter(sample.values()))[0], 0, -1, "no image"
    if image[1] > _MAX_IMAGE_BYTES:
        return image[0], 0, -1, f"over {_MAX_IMAGE_BYTES} bytes"
    if "cls" not in sample and "json" not in sample:
        return *image, -1, "no label"
    offset, size = sample["cls"] if "cls" in sample else sample["json"]
    label = _label(os.pread(descriptor, min(size, _MAX_LABEL_BYTES), offset), "cls" in sample)
    return (*image, -1, label) if isinstance(label, str) else (*image, label, None)


def _label(text: bytes, is_cls: bool) -> int | str:
    """The label in a .cls or .json member, or why there is none."""
    if is_cls:
        return int(text) if re.fullmatch(rb"\s*-?[0-9]{1,9}\s*", text) else "label is not an integer"
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return "label is not an integer"
    if not isinstance(content, dict) or not content.keys() & {"label", "cls"}:
        return "no label"
    label = content["label"] if "label" in content else content["cls"]
    return label if type(label) is int and abs(label) < 2**31 else "label is not an integer"


def duplicate_key(key: str, first: str, second: str) -> UserError:
    return UserError(
        f"duplicate key {key!r}",
        found=f"it in {first} and in {second}",
        fix="give every sample a key of its own",
    )
