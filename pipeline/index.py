"""The data set as one memory-mapped array: a fixed record per sample, rows in shard order.

A data set folder holds `index.npy` (the records), `dataset.json` (classes, shards, fingerprint) and
`quarantine.jsonl` (one line per damaged sample or shard). A row never moves: a damaged sample keeps its row
with a non-zero status, so soft labels, random numbers and order can all hang on the row or on its key hash.
"""

import hashlib
import json
import os
import re
import tarfile
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cache.errors import UserError

RECORD = np.dtype(
    [
        ("shard", "<u4"),  # position in Index.shards
        ("offset", "<u8"),  # of the image's first byte in the shard file
        ("size", "<u4"),  # bytes of the encoded image
        ("height", "<u4"),  # pixels, 0 if quarantined
        ("width", "<u4"),
        ("label", "<i4"),
        ("key_hash", "<u8"),
        ("crc", "<u4"),  # zlib.crc32 of the encoded image
        ("status", "u1"),  # 0 good, anything else quarantined
        ("cmyk", "u1"),  # four inks: each decoder has its own idea of their colour
    ]
)
MAX_SIDE = 16_383  # Pillow rotates in 16.16 fixed point, and areas must stay exact in `pipeline.views`

_IDENTITY = np.dtype(
    [(name, RECORD[name]) for name in ("key_hash", "label", "size", "crc", "height", "width", "status")]
)
_FORMAT = 1
_META_TYPES: dict[str, type | tuple[type, ...]] = {
    "format": int,
    "source": str,
    "classes": int,
    "class_names": (list, type(None)),
    "shards": list,
    "samples": int,
    "quarantined": int,
    "fingerprint": str,
}
_MAX_META_BYTES = 64 << 20
_OPEN_SHARDS = 256  # well below the usual limit of 1,024 descriptors per process
_BLOCK = 512  # of a tar file


def key_hash(key: str) -> int:
    """64-bit blake2b of the UTF-8 key, read little-endian. Bytes that are not UTF-8 hash as they are."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def split_name(name: str) -> tuple[str, str] | None:
    """Member path -> (key, lower-case extensions), cut at the first dot of the last path component.

    The rule of `webdataset.tariterators.base_plus_ext`, without that package's import of torch.
    None for a name without a key or without a dot.
    """
    match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", name)
    return (match[1], match[2].lower()) if match else None


def fingerprint(records: np.ndarray, classes: int) -> str:
    """sha256 hex over what a sample is (key, label, bytes, size, status), in row order, and the class count.

    Where the shards lie does not enter: a data set may be moved or sharded anew without losing its identity.
    """
    digest = hashlib.sha256(int(classes).to_bytes(8, "little"))
    for start in range(0, len(records), 1 << 16):
        chunk = records[start : start + (1 << 16)]
        packed = np.empty(len(chunk), _IDENTITY)
        for name in _IDENTITY.names or ():
            packed[name] = chunk[name]
        digest.update(packed.tobytes())
    return digest.hexdigest()


def write(
    folder: Path,
    records: np.ndarray,
    shards: list[str],
    quarantine: list[dict],
    *,
    source: str,
    classes: int,
    class_names: list[str] | None,
) -> None:
    """Write the three files of a data set folder; `shards` are absolute paths or relative to the folder."""
    meta = {
        "format": _FORMAT,
        "source": source,
        "classes": classes,
        "class_names": class_names,
        "shards": shards,
        "samples": len(records),
        "quarantined": int(np.count_nonzero(records["status"])),
        "fingerprint": fingerprint(records, classes),
    }
    np.save(folder / "index.npy", records.astype(RECORD, copy=False), allow_pickle=False)
    (folder / "quarantine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in quarantine))
    (folder / "dataset.json").write_text(json.dumps(meta, indent=1) + "\n")


def key_at(path: Path, offset: int, expected_hash: int) -> str:
    """The key of the tar member whose data begins at `offset`; UserError if it is not the expected one."""
    try:
        with open(path, "rb") as file:
            block = os.pread(file.fileno(), _BLOCK, offset - _BLOCK)
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                name = split_name(header.name)
            except tarfile.TarError:
                name = None
            if name and key_hash(name[0]) == expected_hash:
                return name[0]
            # A name over 100 characters is cut in the last header and whole only in an earlier one.
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
                for member in tar:
                    name = split_name(member.name) if member.offset_data == offset else None
                    if name and key_hash(name[0]) == expected_hash:
                        return name[0]
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"cannot read shard {path}", found=error, fix="restore the shard") from None
    raise UserError(
        f"shard {path} has changed since it was indexed",
        found=f"no such key at byte {offset}",
        fix="run pipeline prepare again",
    )


class _Descriptor:
    """A read-only file descriptor that closes with its last user, so a cache may drop it at any time."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


@dataclass(frozen=True, eq=False)
class Index:
    """A checked, read-only data set. Reads are thread-safe and leave no file position behind."""

    path: Path
    records: np.ndarray  # (N,) RECORD, memory-mapped
    classes: int
    class_names: list[str] | None
    shards: list[Path]  # absolute
    fingerprint: str
    _descriptor: Any = field(default_factory=lambda: lru_cache(_OPEN_SHARDS)(_Descriptor), repr=False)

    @classmethod
    def open(cls, path: str | Path, split: str = "train") -> "Index":
        """Open `path`, or `path/split` where the data set was prepared with its own train and val parts.

        UserError if the folder is missing, empty or damaged, or a shard is missing or shorter than indexed.
        """
        path = Path(path).absolute()
        if not (path / "index.npy").exists() and (path / split / "index.npy").exists():
            path = path / split
        if not path.exists():
            raise UserError(f"no data set at {path}", fix=f"pipeline prepare SOURCE --out {path}")
        if not (path / "index.npy").exists():
            raise UserError(
                f"{path} is not a prepared data set", expected="index.npy in it", fix="run pipeline prepare"
            )
        meta = _read_meta(path)
        records = _read_records(path)
        if len(records) != meta["samples"]:
            raise _damaged(path, found=f"{len(records)} records", expected=meta["samples"])
        if np.count_nonzero(records["status"]) != meta["quarantined"]:
            raise _damaged(path, found="another number of quarantined samples", expected=meta["quarantined"])
        shards = [path / shard for shard in meta["shards"]]
        _check_records(path, records, shards, meta["classes"])
        if fingerprint(records, meta["classes"]) != meta["fingerprint"]:
            raise UserError(f"the index of {path} was altered", fix="run pipeline prepare again")
        return cls(path, records, meta["classes"], meta["class_names"], shards, meta["fingerprint"])

    def __len__(self) -> int:
        """Number of rows N, quarantined ones included."""
        return len(self.records)

    @cached_property
    def good(self) -> np.ndarray:
        """Rows with status 0, ascending, int64."""
        return np.flatnonzero(self.records["status"] == 0).astype(np.int64, copy=False)

    def read(self, row: int) -> bytes:
        """The encoded image of a row, as it stands in its shard."""
        record = self.records[row]
        path = self.shards[record["shard"]]
        try:
            shard = self._descriptor(path)  # the name keeps it open, should the cache drop it meanwhile
            data = os.pread(shard.number, int(record["size"]), int(record["offset"]))
        except OSError as error:
            raise UserError(f"cannot read shard {path}", found=error.strerror, fix="restore it") from None
        if len(data) != record["size"]:
            raise UserError(
                f"shard {path} was cut while in use",
                found=f"{len(data)} bytes at byte {record['offset']}",
                expected=record["size"],
                fix="restore the shard",
            )
        return data

    def key(self, row: int) -> str:
        """The WebDataset key of a row, from its tar header; meant for messages, not for hot loops."""
        record = self.records[row]
        return key_at(self.shards[record["shard"]], int(record["offset"]), int(record["key_hash"]))


def _damaged(path: Path, *, found: object, expected: object = None) -> UserError:
    return UserError(
        f"the index of {path} is damaged", found=found, expected=expected, fix="run pipeline prepare again"
    )


def _read_meta(path: Path) -> dict[str, Any]:
    """dataset.json with every key of the right type, and counts that fit each other."""
    file = path / "dataset.json"
    try:
        if file.stat().st_size > _MAX_META_BYTES:
            raise _damaged(path, found=f"dataset.json over {_MAX_META_BYTES} bytes")
        meta = json.loads(file.read_bytes())
    except OSError as error:
        raise _damaged(path, found=f"dataset.json: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise _damaged(path, found="dataset.json that is not JSON") from None
    if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
        found = meta.get("format") if isinstance(meta, dict) else type(meta).__name__
        raise _damaged(path, found=f"index format {found}", expected=_FORMAT)
    if meta.keys() != _META_TYPES.keys():
        raise _damaged(path, found=f"keys {sorted(meta)}", expected=sorted(_META_TYPES))
    for name, kind in _META_TYPES.items():
        if not isinstance(meta[name], kind) or isinstance(meta[name], bool):
            raise _damaged(path, found=f"{name} of type {type(meta[name]).__name__} in dataset.json")
    if meta["samples"] == 0:
        raise UserError(f"the data set at {path} is empty", fix="run pipeline prepare on a source with images")
    if not 1 <= meta["classes"] < 2**31:
        raise _damaged(path, found=f"{meta['classes']} classes")
    for name in ("shards", "class_names"):
        if not all(isinstance(item, str) for item in meta[name] or ()):
            raise _damaged(path, found=f"{name} that are not all strings")
    if meta["class_names"] is not None and len(meta["class_names"]) != meta["classes"]:
        raise _damaged(path, found=f"{len(meta['class_names'])} class names", expected=meta["classes"])
    return meta


def _read_records(path: Path) -> np.ndarray:
    """Map index.npy; nothing is allocated before dtype, shape and file length have been found right."""
    try:
        records = np.lib.format.open_memmap(path / "index.npy", mode="r")
    except Exception as error:  # numpy's header parser leaks ast, tokenize and struct errors
        raise _damaged(path, found=f"index.npy: {error}") from None
    if records.dtype != RECORD or records.ndim != 1:
        raise _damaged(path, found="index.npy with other records", expected="a 1-D array of RECORD")
    return records


def _check_records(path: Path, records: np.ndarray, shards: list[Path], classes: int) -> None:
    """Every record lies inside its shard, and every good one has a label in range and a plausible size."""
    if records["shard"].max() >= len(shards):
        raise _damaged(path, found=f"shard number {records['shard'].max()}", expected=f"below {len(shards)}")
    lengths = np.empty(len(shards), np.uint64)
    for number, shard in enumerate(shards):
        try:
            lengths[number] = shard.stat().st_size
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot read shard {shard}", found=error, fix="restore it or run pipeline prepare again"
            ) from None
    room = lengths[records["shard"]]
    size, offset = records["size"], records["offset"]
    # Compared without offset + size, which a hostile offset could make wrap around.
    outside = (offset > room) | (size > room - np.minimum(offset, room))
    if outside.any():
        row = int(outside.argmax())
        shard = shards[records["shard"][row]]
        raise UserError(
            f"shard {shard} is shorter than indexed",
            found=f"{int(room[row])} bytes",
            expected=f"at least {int(offset[row]) + int(size[row])}",
            fix="restore the shard or run pipeline prepare again",
        )
    good = records["status"] == 0
    label = records["label"]
    if (good & ((label < 0) | (label >= classes))).any():
        raise _damaged(path, found="a label out of range", expected=f"0 to {classes - 1}")
    for side in (records["height"], records["width"]):
        if (good & ((side == 0) | (side > MAX_SIDE))).any():
            raise _damaged(path, found="an image side out of range", expected=f"1 to {MAX_SIDE}")
