"""Images -> WebDataset shards and a checked index.

Every source but existing WebDataset tars is first written as shards; then all shards, written or found, go
through the same two passes: read the tar headers and labels into records, and decode every image once. What
cannot be trained on is quarantined by key, with its cause, and keeps its row.
"""

import io
import os
import re
import shutil
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cache.errors import UserError
from pipeline import index
from pipeline.config import Prepare
from pipeline.report import progress, summary
from pipeline.sources import Source, cifar, digits, duplicate_key, imagefolder, scan
from pipeline.synthetic import synthetic

SOURCES = "imagefolder:PATH | cifar10:PATH | cifar100:PATH | webdataset:GLOB | digits | synthetic:N"

_MAX_INFERRED_CLASSES = 1_000_000  # beyond it a damaged label is likelier than a class
_BATCH_IMAGES, _BATCH_PIXELS = 64, 64 << 20  # of one decode, so that huge photographs do not add up
_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xae\x42\x60\x82"


def run(config: Prepare) -> None:
    """Prepare a data set and print what is in it; see `build`."""
    facts = build(config.source, config.out, classes=config.classes, shard_size=config.shard_size, seed=config.seed)
    for name in ("causes", "splits"):
        facts[name] = ", ".join(f"{key}: {count:,}" for key, count in facts[name].items()) or "none"
    summary("prepared", facts | {"seconds": f"{facts['seconds']:.1f}"})


def build(
    source: str,
    out: Path,
    *,
    classes: int | None = None,
    shard_size: int = 4096,
    seed: int = 0,
    threads: int | None = None,
) -> dict[str, Any]:
    """Build the data set folder `out` from `source` (one of SOURCES); `shard_size` in samples.

    digits and cifar become `out/train` and `out/val`, all others one data set in `out`. Everything is
    built in a sibling folder that takes the name `out` at the end, so `out` is whole or not there.
    `classes` is for webdataset (else the highest label + 1) and synthetic (else 1000).

    Returns a summary: out, classes, samples, good, quarantined, causes {cause: count}, shards, image_bytes,
    splits {name: good samples} (empty for a single data set), seconds.
    UserError for an existing `out`, an unusable source, a full disk, duplicate keys, or a source of which
    more than half is unusable.
    """
    start = time.monotonic()
    threads = len(os.sched_getaffinity(0)) if threads is None else threads
    out = Path(out).absolute()
    if os.path.lexists(out):
        raise UserError(f"the output folder {out} exists", fix="choose another --out or remove it")
    for flag, value, low in (("shard-size", shard_size, 1), ("seed", seed, 0)):
        if value < low:
            raise UserError(f"--{flag} out of range", found=value, expected=f"at least {low}", fix=f"correct --{flag}")
    if classes is not None and not 1 <= classes < 2**31:
        raise UserError("--classes out of range", found=classes, expected="at least 1", fix="correct --classes")
    partial = out.with_name(f".{out.name}.partial")
    try:
        if partial.exists():  # of a killed run
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        parts = _build(source, partial, classes, shard_size, seed, threads)
        os.rename(partial, out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):  # a source's own have become UserErrors
            fix = "free disk space or choose another --out"
            raise UserError(f"cannot build {out}", found=error.strerror or error, fix=fix) from None
        raise
    causes = sum((part.causes for part in parts.values()), Counter())
    return {
        "out": str(out),
        "classes": next(iter(parts.values())).classes,
        "samples": sum(part.samples for part in parts.values()),
        "good": sum(part.good for part in parts.values()),
        "quarantined": causes.total(),
        "causes": dict(causes.most_common()),
        "shards": sum(part.shards for part in parts.values()),
        "image_bytes": sum(part.image_bytes for part in parts.values()),
        "splits": {name: part.good for name, part in parts.items() if name},
        "seconds": time.monotonic() - start,
    }


class _Part(NamedTuple):
    classes: int
    samples: int
    good: int
    causes: Counter[str]
    shards: int
    image_bytes: int


def _build(
    source: str, folder: Path, classes: int | None, shard_size: int, seed: int, threads: int
) -> dict[str, _Part]:
    """Write shards where the source has none, then the index of each split ("" where there is only one)."""
    kind, _, argument = source.partition(":")
    path = Path(os.path.expanduser(argument))
    if kind == "webdataset" and argument:
        shards = sorted(os.path.abspath(name) for name in glob(str(path), recursive=True))
        if not shards:
            raise UserError(f"no shard matches {argument}", fix="check the pattern, and quote it for the shell")
        return {"": _index(folder, shards, source, classes, None, threads)}
    if kind == "imagefolder" and argument:
        splits = {"": imagefolder(path, seed)}
    elif kind in ("cifar10", "cifar100") and argument:
        splits = cifar(path, int(kind.removeprefix("cifar")))
    elif source == "digits":
        splits = digits(seed)
    elif kind == "synthetic" and re.fullmatch("[1-9][0-9]{0,8}", argument):
        splits = {"": synthetic(int(argument), classes or 1000, seed, threads)}
    else:
        raise UserError("unknown source", found=source, expected=SOURCES, fix="correct SOURCE")
    parts = {}
    for name, split in splits.items():
        if classes not in (None, split.classes):
            raise UserError(
                f"{source} has classes of its own",
                found=f"--classes {classes}",
                expected=split.classes,
                fix="drop --classes",
            )
        part = folder / name
        part.mkdir(exist_ok=True)
        shards = _write_shards(split, part, shard_size)
        parts[name] = _index(part, shards, source, split.classes, split.class_names, threads)
        if parts[name].samples != split.count:
            raise UserError(
                f"{source} has names that WebDataset skips",
                found=f"{parts[name].samples} of {split.count} samples in the shards",
                fix="rename folders like __name__",
            )
    return parts


def _write_shards(source: Source, folder: Path, shard_size: int) -> list[str]:
    """Samples -> shard-000000.tar and so on, the same bytes every time; returns their names."""
    # webdataset imports torch, which would cost every other command a second.
    from webdataset.writer import ShardWriter

    names: list[str] = []
    with ShardWriter(
        str(folder).replace("%", "%%") + "/shard-%06d.tar",
        maxcount=shard_size,
        encoder=False,
        mtime=0,
        verbose=0,
        post=lambda name: names.append(os.path.basename(name)),
    ) as writer:
        for sample in _track(source.samples, source.count, "writing shards", "images"):
            label = str(sample.label).encode()
            writer.write({"__key__": sample.key, sample.extension: sample.image, "cls": label})
    return names


def _index(
    folder: Path,
    shards: list[str],
    source: str,
    classes: int | None,
    class_names: list[str] | None,
    threads: int,
) -> _Part:
    """Scan and check `shards` (absolute or relative to `folder`) and write the index into `folder`."""
    paths = [folder / shard for shard in shards]
    scans = [scan(path) for path in _track(paths, len(paths), "reading headers", "shards")]
    records = np.concatenate([found.records for found in scans])
    records["shard"] = np.repeat(np.arange(len(scans)), [len(found.records) for found in scans])
    keys = [key for found in scans for key in found.keys]
    causes = {row: cause for row, cause in enumerate(cause for found in scans for cause in found.causes) if cause}
    _check_keys(records, keys, paths)
    classes = _check_labels(records, causes, classes)
    _check_images(records, paths, causes, threads)
    records["status"][list(causes)] = 1

    quarantine = [
        {"key": None, "shard": shard, "offset": found.end, "cause": found.cut}
        for shard, found in zip(shards, scans, strict=True)
        if found.cut
    ]
    for row, cause in sorted(causes.items()):
        shard, offset = shards[records["shard"][row]], int(records["offset"][row])
        quarantine.append({"key": keys[row], "shard": shard, "offset": offset, "cause": cause})
    counts = Counter(line["cause"] for line in quarantine)
    good = len(records) - len(causes)
    if good == 0 or good < len(quarantine):
        cause = ", most often: {} ({})".format(*counts.most_common(1)[0]) if counts else ""
        raise UserError(
            f"most of {source} is unusable" if good else f"nothing in {source} is usable",
            found=f"{good} good and {len(quarantine)} bad samples{cause}",
            expected="at least half of them good",
            fix="check the source",
        )
    index.write(folder, records, shards, quarantine, source=source, classes=classes, class_names=class_names)
    return _Part(classes, len(records), good, counts, len(shards), int(records["size"].sum(dtype=np.int64)))


def _check_keys(records: np.ndarray, keys: list[str], paths: list[Path]) -> None:
    """No two rows may share a key, nor two keys a hash: identity hangs on it."""
    order = np.argsort(records["key_hash"], kind="stable")
    hashes = records["key_hash"][order]
    twins = np.flatnonzero(hashes[1:] == hashes[:-1])
    if len(twins) == 0:
        return
    first, second = order[twins[0]], order[twins[0] + 1]
    shards = [paths[records["shard"][row]] for row in (first, second)]
    if keys[first] == keys[second]:
        raise duplicate_key(keys[first], *shards)
    raise UserError(
        "two keys have the same 64-bit hash",
        found=f"{keys[first]!r} in {shards[0]} and {keys[second]!r} in {shards[1]}",
        fix="rename one of the two samples",
    )


def _check_labels(records: np.ndarray, causes: dict[int, str], classes: int | None) -> int:
    """Add rows with a label outside [0, classes) to `causes`; without `classes`, infer it. Returns it."""
    label = records["label"]
    if classes is None:
        classes = max(int(label.max(initial=-1)) + 1, 1)
        if classes > _MAX_INFERRED_CLASSES:
            raise UserError("the highest label is no class", found=classes - 1, fix="give the count by --classes")
    for row in np.flatnonzero((label < 0) | (label >= classes)):
        causes.setdefault(int(row), f"label outside [0, {classes})")
    return classes


def _check_images(records: np.ndarray, paths: list[Path], causes: dict[int, str], threads: int) -> None:
    """Fill the crc of every row, height and width of each that decodes; add the others to `causes`.

    DALI judges, as it decodes in training, and it is the stricter one: it refuses a JPEG or PNG cut at any
    byte. Pillow reads the header first, which keeps decompression bombs from the decoder, and names the causes.
    What neither can see is damage that libjpeg repairs with a warning: it decodes to the same pixels each time.
    """
    decode = _decoder(threads)
    batches = _batches(records, paths, causes)
    with warnings.catch_warnings(), ThreadPoolExecutor(1) as reader:
        warnings.simplefilter("ignore", UserWarning)  # Pillow's remarks on odd EXIF
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        following = reader.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = reader.submit(next, batches, None)  # read while this one is decoded
            for (row, image), shape in zip(batch, _shapes(decode, [image for _, image in batch]), strict=True):
                if shape is None:
                    causes[row] = _damage(image) or "refused by DALI"
                else:
                    records["height"][row], records["width"][row] = shape[:2]


def _batches(records: np.ndarray, paths: list[Path], causes: dict[int, str]) -> Iterator[list[tuple[int, bytes]]]:
    """Rows and images that may be decoded together; the other rows only get their crc and their cause."""
    batch: list[tuple[int, bytes]] = []
    batch_pixels = 0
    for row, image in _track(_images(records, paths), len(records), "checking images", "images"):
        records["crc"][row] = zlib.crc32(image)
        if row in causes:
            continue
        flaw, pixels, records["cmyk"][row] = _flaw(image)
        if flaw:
            causes[row] = flaw
            continue
        if len(batch) == _BATCH_IMAGES or (batch and batch_pixels + pixels > _BATCH_PIXELS):
            yield batch
            batch, batch_pixels = [], 0
        batch.append((row, image))
        batch_pixels += pixels
    if batch:
        yield batch


def _images(records: np.ndarray, paths: list[Path]) -> Iterator[tuple[int, bytes]]:
    """Every row with its encoded image."""
    for shard, rows in groupby(range(len(records)), records["shard"].__getitem__):
        with open(paths[shard], "rb") as file:
            for row in rows:
                yield row, os.pread(file.fileno(), int(records["size"][row]), int(records["offset"][row]))


def _shapes(decode: Callable, images: list[bytes]) -> list[tuple[int, ...] | None]:
    """(H, W, 3) of each image, None for one that DALI refuses: a failed batch is repeated image by image."""
    try:
        return decode(images)
    except RuntimeError:
        return [None] if len(images) == 1 else [_shapes(decode, [image])[0] for image in images]


def _decoder(threads: int) -> Callable[[list[bytes]], list[tuple[int, ...]]]:
    """A function from encoded images to decoded shapes; it raises RuntimeError and stays usable."""
    try:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline
    except ImportError:
        raise UserError("DALI is not installed", fix="pip install '.[cuda13]' or '.[cuda12]'") from None
    # The dynamic executor loses only the batch that fails; the other one fails for ever after.
    pipe = Pipeline(_BATCH_IMAGES, threads, device_id=None, exec_dynamic=True, prefetch_queue_depth=1)
    with pipe:
        encoded = fn.external_source(name="encoded")
        pipe.set_outputs(fn.decoders.image(encoded, output_type=types.DALIImageType.RGB, adjust_orientation=False))
    pipe.build()

    def decode(images: list[bytes]) -> list[tuple[int, ...]]:
        pipe.feed_input("encoded", [np.frombuffer(image, np.uint8) for image in images])
        return pipe.run()[0].shape()

    return decode


def _flaw(image: bytes) -> tuple[str | None, int, bool]:
    """Why an encoded image cannot be used, as far as its header and its end tell; its pixel count; is it CMYK?"""
    if not image:
        return "empty file", 0, False
    try:
        opened = Image.open(io.BytesIO(image), formats=("JPEG", "PNG"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return f"over {Image.MAX_IMAGE_PIXELS} pixels", 0, False
    except Exception:  # Pillow's plug-ins raise what they please
        known = image.startswith((_JPEG_START, _PNG_START))
        return "damaged" if known else "not a JPEG or PNG image", 0, False
    if max(opened.size) > index.MAX_SIDE:
        return f"a side over {index.MAX_SIDE} pixels", 0, False
    # DALI prints to stderr for each image it refuses: most cuts are found here, in silence.
    suspect = not image.endswith((_JPEG_END, _PNG_END))
    return _damage(image) if suspect else None, opened.width * opened.height, opened.mode == "CMYK"


def _damage(image: bytes) -> str | None:
    """Why an image cannot be decoded, as far as Pillow can tell; None if it can."""
    try:
        opened = Image.open(io.BytesIO(image), formats=("JPEG", "PNG"))
        opened.load()
    except Exception as error:
        return "truncated" if "truncated" in str(error).lower() else "damaged"
    # Pillow forgives a PNG without its last chunk, DALI does not.
    return "truncated" if opened.format == "PNG" and _PNG_END not in image else None


def _track(items: Iterable, total: int, what: str, unit: str) -> Iterator:
    with progress(what, total, unit) as advance:
        for item in items:
            yield item
            advance(1)
