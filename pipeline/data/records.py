"""The records of an index, and what they are held against before anyone relies on them.

An index is read through when it is opened, in parts, so that its size costs no memory. One of more than `LARGE` rows is
read through once: the folder then keeps `checked.json`, which says what file that was (size, times, inode) and where
the samples of each shard end. Later only the lengths of the shards are looked at, and an index of 100 million rows
opens in a second. A file that was written, copied or replaced since has another time of change, which no program can
choose, and is read again. What breaks on the disk afterwards is found by a sample's CRC-32C, where that is its place
or its bytes.
"""

import contextlib
import errno
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from cache.errors import UserError
from cache.outside import parsed
from pipeline.data.remote import is_remote
from pipeline.data.shards import Reader
from pipeline.system.files import write_atomically

RECORD = np.dtype(
    [
        ("shard", "<u4"),  # position in Index.shards
        ("offset", "<u8"),  # of the image's first byte in the shard file
        ("size", "<u4"),  # bytes of the encoded image
        ("height", "<u4"),  # pixels, 0 if quarantined
        ("width", "<u4"),
        ("label", "<i4"),
        ("key_hash", "<u8"),
        ("crc", "<u4"),  # CRC-32C of the encoded image
        ("status", "u1"),  # 0 good, anything else quarantined
        ("cmyk", "u1"),  # four inks: each decoder has its own idea of their colour
    ]
)
MAX_SIDE = 16_383  # Pillow rotates in 16.16 fixed point, and areas must stay exact in `pipeline.views.drawing`
LARGE = 4_000_000
"""Rows; reading through so many takes a second or two."""

_IDENTITY = np.dtype(
    [(name, RECORD[name]) for name in ("key_hash", "label", "size", "crc", "height", "width", "status")]
)
_CHUNK = 1 << 16  # rows
_FARTHEST = 1 << 62  # an offset that a hostile index names must not wrap around where sizes are added
_LENGTH_THREADS = 32
_MAX_STAMP_BYTES = 64 << 20
AGAIN = "run pipeline prepare again"


def fingerprint(records: np.ndarray, classes: int) -> str:
    """sha256 hex over what a sample is (key, label, bytes, size, status), in row order, and the class count.

    Where the shards lie does not enter: a data set may be moved or sharded anew without losing its identity.
    """
    digest = _started(classes)
    for start in range(0, len(records), _CHUNK):
        digest.update(_identity(records[start : start + _CHUNK]))
    return digest.hexdigest()


def _started(classes: int):
    return hashlib.sha256(int(classes).to_bytes(8, "little"))


def _identity(chunk: np.ndarray) -> bytes:
    packed = np.empty(len(chunk), _IDENTITY)
    for name in _IDENTITY.names or ():
        packed[name] = chunk[name]
    return packed.tobytes()


def damaged(path: Path, *, found: object, expected: object = None) -> UserError:
    """What is said of an index at `path` that `prepare` did not write so."""
    return UserError(f"the index of {path} is damaged", found=found, expected=expected, fix=AGAIN)


def checked(path: Path, meta: dict[str, Any], shards: list[str], reader: Reader) -> np.ndarray:
    """The mapped records of the index in folder `path`, each within its shard and as `meta`, dataset.json, says.

    Raises UserError for an index that is damaged or altered, and for a shard that is missing or shorter than indexed.
    """
    records = _mapped(path)
    if len(records) != meta["samples"]:
        raise damaged(path, found=f"{len(records)} records", expected=meta["samples"])
    stamp = {"index": _file(path / "index.npy"), "dataset": hashlib.sha256(json.dumps(meta).encode()).hexdigest()}
    large = len(records) > LARGE
    ends = _stamped(path, stamp, len(shards)) if large else None
    known = ends is not None
    ends = ends if known else _read_through(path, records, meta, len(shards))
    with ThreadPoolExecutor(_LENGTH_THREADS) as pool:
        # A server answers in milliseconds, each time; a disk in less than a thread takes to be asked.
        measured = (pool.map if any(map(is_remote, shards)) else map)(reader.length, shards)
        for shard, length, end in zip(shards, measured, ends, strict=True):
            if length < end:
                raise UserError(
                    f"shard {shard} is shorter than indexed",
                    found=f"{length} bytes",
                    expected=f"at least {end}",
                    fix="restore the shard or run pipeline prepare again",
                )
    if large and not known:
        with contextlib.suppress(UserError, OSError):  # a folder that cannot be written to is read each time
            write_atomically(path / "checked.json", json.dumps(stamp | {"ends": ends}).encode())
    return records


def _mapped(path: Path) -> np.ndarray:
    """Map index.npy; nothing is allocated before dtype, shape and file length have been found right.

    Where the file system cannot map files, as some of those in user space, it is read.
    """
    try:
        try:
            records = np.lib.format.open_memmap(path / "index.npy", mode="r")
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            records = np.load(path / "index.npy", allow_pickle=False)
    except Exception as error:  # numpy's header parser leaks ast, tokenize and struct errors
        raise damaged(path, found=f"index.npy: {error}") from None
    if records.dtype != RECORD or records.ndim != 1:
        raise damaged(path, found="index.npy with other records", expected="a 1-D array of RECORD")
    return records


def _file(path: Path) -> list[int]:
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]


def _stamped(path: Path, stamp: dict[str, Any], shards: int) -> list[int] | None:
    """Where the samples of each shard end, if this very file was read through before."""
    file = path / "checked.json"
    try:
        if file.stat().st_size > _MAX_STAMP_BYTES:
            return None
        found = parsed(file.read_bytes())
        ends = found.pop("ends")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    sound = isinstance(ends, list) and len(ends) == shards and all(type(end) is int for end in ends)
    return ends if found == stamp and sound else None


def _read_through(path: Path, records: np.ndarray, meta: dict[str, Any], shards: int) -> list[int]:
    """Where the samples of each shard end. Every good record must have a label in range and a plausible size."""
    ends, quarantined, digest = np.zeros(shards, np.uint64), 0, _started(meta["classes"])
    for start in range(0, len(records), _CHUNK):
        chunk = records[start : start + _CHUNK]
        if (last := chunk["shard"].max()) >= shards:
            raise damaged(path, found=f"shard number {last}", expected=f"below {shards}")
        np.maximum.at(ends, chunk["shard"], np.minimum(chunk["offset"], np.uint64(_FARTHEST)) + chunk["size"])
        good, label = chunk["status"] == 0, chunk["label"]
        quarantined += len(chunk) - int(np.count_nonzero(good))
        if (good & ((label < 0) | (label >= meta["classes"]))).any():
            raise damaged(path, found="a label out of range", expected=f"0 to {meta['classes'] - 1}")
        for side in (chunk["height"], chunk["width"]):
            if (good & ((side == 0) | (side > MAX_SIDE))).any():
                raise damaged(path, found="an image side out of range", expected=f"1 to {MAX_SIDE}")
        digest.update(_identity(chunk))
    if quarantined != meta["quarantined"]:
        raise damaged(path, found="another number of quarantined samples", expected=meta["quarantined"])
    if digest.hexdigest() != meta["fingerprint"]:
        raise UserError(f"the index of {path} was altered", fix=AGAIN)
    return ends.tolist()
