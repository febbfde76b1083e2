"""Images -> WebDataset shards and a checked index.

Every source but existing WebDataset tars is first written as shards; then each shard, written or found, local or
remote, is read once: tar headers and labels become records, and every image is decoded. What cannot be trained on is
quarantined by key, with its cause, and keeps its row.
"""

import io
import os
import re
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from google_crc32c import value as crc32c
from PIL import Image

from cache.errors import UserError
from pipeline.config import Prepare
from pipeline.data import index
from pipeline.data.classes import Classes
from pipeline.data.decode import Undecodable, decode
from pipeline.data.remote import is_remote
from pipeline.data.shards import Reader
from pipeline.data.sources import Scan, Source, cifar, digits, duplicate_key, imagefolder, scan
from pipeline.data.synthetic import synthetic
from pipeline.system.terminal import decimal, progress, summary

SOURCES = "imagefolder:PATH | cifar10:PATH | cifar100:PATH | webdataset:GLOB | digits | synthetic:N"

_MAX_INFERRED_CLASSES = 1_000_000  # beyond it a damaged label is likelier than a class
_BATCH_IMAGES, _BATCH_PIXELS = 64, 64 << 20  # under way at once, so that huge photographs do not add up
_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xae\x42\x60\x82"


def run(config: Prepare) -> None:
    """Prepare a data set and print what is in it; see `build`."""
    facts = build(config.source, config.out, classes=config.classes, shard_size=config.shard_size, seed=config.seed)
    counts = {name: f"{facts[name]:,}" for name in ("classes", "samples", "good", "quarantined", "shards")}
    for name in ("causes", "splits"):
        counts[name] = ", ".join(f"{key}: {count:,}" for key, count in facts[name].items()) or "none"
    images, seconds = decimal(facts["image_bytes"]), f"{facts['seconds']:.1f}"
    summary("prepared", {"out": facts["out"], **counts, "images": images, "seconds": seconds})


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

    A GLOB of tars is a path or a URL (s3://bucket/key, http(s)://host/path) with {braces}, and wildcards but for
    HTTP. Remote tars stay where they are.

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
        return {"": _index(folder, Reader().expand(argument), source, Classes(classes) if classes else None, threads)}
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
        if classes not in (None, split.classes.count):
            raise UserError(
                f"{source} has classes of its own",
                found=f"--classes {classes}",
                expected=split.classes.count,
                fix="drop --classes",
            )
        part = folder / name
        part.mkdir(exist_ok=True)
        shards = _write_shards(split, part, shard_size)
        parts[name] = _index(part, shards, source, split.classes, threads)
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
    classes: Classes | None,
    threads: int,
) -> _Part:
    """Scan and check `shards` (URLs, or paths absolute or relative to `folder`), write the index into `folder`."""
    scans: list[Scan] = []
    count = classes.count if classes else None
    _check_images(_batches(shards, folder, scans, count), threads)
    records = np.concatenate([found.records for found in scans])
    records["shard"] = np.repeat(np.arange(len(scans)), [len(found.records) for found in scans])
    keys = [key for found in scans for key in found.keys]
    causes = {row: cause for row, cause in enumerate(cause for found in scans for cause in found.causes) if cause}
    classes = classes or Classes(_check_labels(records, causes, None))
    _check_labels(records, causes, classes.count)
    bad = list(causes)
    records["status"][bad] = 1
    for name in ("height", "width", "cmyk"):
        records[name][bad] = 0

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
    index.write(folder, records, shards, quarantine, source=source, classes=classes)
    return _Part(classes.count, len(records), good, counts, len(shards), int(records["size"].sum(dtype=np.int64)))


def _check_keys(scans: list[Scan], holders: dict[int, int]) -> None:
    """The last scan may repeat no key, nor the hash of one: identity hangs on it. `holders`: key hash -> scan."""
    for key, hashed in zip(scans[-1].keys, scans[-1].records["key_hash"].tolist(), strict=True):
        if hashed not in holders:
            holders[hashed] = len(scans) - 1
            continue
        other = scans[holders[hashed]]
        twin = other.keys[int((other.records["key_hash"] == hashed).argmax())]
        if twin == key:
            raise duplicate_key(key, other.shard, scans[-1].shard)
        raise UserError(
            "two keys have the same 64-bit hash",
            found=f"{twin!r} in {other.shard} and {key!r} in {scans[-1].shard}",
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


class _Item(NamedTuple):
    scan: Scan
    row: int  # of the scan
    image: bytes  # encoded


def _check_images(batches: Iterator[list[_Item]], threads: int) -> None:
    """Fill height and width of each record whose image decodes; give the others their cause.

    DALI judges, as it decodes in training, and it is the stricter one: it refuses a JPEG or PNG cut at any
    byte. Pillow reads the header first, which keeps decompression bombs from the decoder, and names the causes.
    What neither can see is damage that libjpeg repairs with a warning: it decodes to the same pixels each time.
    """
    with warnings.catch_warnings(), ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(threads) as workers:
        warnings.simplefilter("ignore", UserWarning)  # Pillow's remarks on odd EXIF
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        following = reader.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = reader.submit(next, batches, None)  # read while this one is decoded
            for item, shape in zip(batch, workers.map(_shape, [item.image for item in batch]), strict=True):
                if shape is None:
                    item.scan.causes[item.row] = _damage(item.image) or "refused by DALI"
                else:
                    item.scan.records["height"][item.row], item.scan.records["width"][item.row] = shape[:2]


def _batches(shards: list[str], folder: Path, scans: list[Scan], classes: int | None) -> Iterator[list[_Item]]:
    """Scan shard after shard, appending to `scans`; images that may be decoded together. Fills crc and cmyk."""
    reader = Reader()
    holders: dict[int, int] = {}
    batch: list[_Item] = []
    batch_pixels = 0
    for name in _track(shards, len(shards), "checking shards", "shards"):
        shard = name if is_remote(name) else str(folder / name)
        with reader.open(shard, folder) as file:
            found = scan(file, shard)
            scans.append(found)
            _check_keys(scans, holders)
            _check_labels(found.records, {}, classes)  # for its error, which should not wait for the last shard
            for row, record in enumerate(found.records):
                image = os.pread(file.fileno(), int(record["size"]), int(record["offset"]))
                record["crc"] = crc32c(image)
                if found.causes[row]:
                    continue
                found.causes[row], pixels, record["cmyk"] = _flaw(image)
                if found.causes[row]:
                    continue
                if len(batch) == _BATCH_IMAGES or (batch and batch_pixels + pixels > _BATCH_PIXELS):
                    yield batch
                    batch, batch_pixels = [], 0
                batch.append(_Item(found, row, image))
                batch_pixels += pixels
    if batch:
        yield batch


def _shape(image: bytes) -> tuple[int, ...] | None:
    """(H, W, 3), None for what DALI refuses."""
    try:
        return decode(image).shape
    except Undecodable:
        return None


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
