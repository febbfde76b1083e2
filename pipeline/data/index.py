"""The data set as one memory-mapped array: a fixed record per sample, rows in shard order.

A data set folder is local and holds `index.npy` (the records), `dataset.json` (classes, shards, fingerprint) and
`quarantine.jsonl` (one line per damaged sample or shard); the shards lie anywhere that `pipeline.data.shards` reads. A
row never moves: a damaged sample keeps its row with a non-zero status, so soft labels, random numbers and order can all
hang on the row or on its key hash.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
import tarfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from google_crc32c import value as crc32c

from cache import outside
from cache.errors import UserError
from pipeline.config import Machine
from pipeline.data import classes as class_lists
from pipeline.data import tokens
from pipeline.data.classes import Classes
from pipeline.data.records import AGAIN, RECORD, checked, damaged, fingerprint
from pipeline.data.remote import Unreadable, is_remote
from pipeline.data.shards import CACHE_BYTES, Reader, stem

_FORMAT = 3  # 1 held the CRC-32 of zlib; 2 did not say what numbered the classes
_META = {
    **dict.fromkeys(("format", "classes", "samples", "quarantined"), (outside.kind, int)),
    **dict.fromkeys(("source", "fingerprint"), (outside.kind, str)),
    "class_rule": (outside.nullable, outside.kind, str),
    "class_names": (outside.nullable, outside.strings),
    "shards": (outside.strings,),
}
_MAX_META_BYTES = 64 << 20
_BLOCK = 512  # of a tar file
_HEADER_BYTES = 8 << 10  # a member's headers: one block, and those that hold a name over 100 characters


class BadSample(UserError):
    """A sample that can no longer be read as it was indexed; its line names key, shard, byte and cause."""


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


def write(
    folder: Path,
    records: np.ndarray,
    shards: list[str],
    quarantine: list[dict],
    *,
    source: str,
    classes: Classes,
) -> None:
    """Write the three files of a data set folder; `shards` are URLs, or paths absolute or relative to the folder."""
    meta = {
        "format": _FORMAT,
        "source": source,
        "classes": classes.count,
        "class_names": classes.names,
        "class_rule": classes.rule,
        "shards": shards,
        "samples": len(records),
        "quarantined": int(np.count_nonzero(records["status"])),
        "fingerprint": fingerprint(records, classes.count),
    }
    np.save(folder / "index.npy", records.astype(RECORD, copy=False), allow_pickle=False)
    (folder / "quarantine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in quarantine))
    if any(map(tokens.signed, shards)):
        (folder / "dataset.json").touch(mode=0o600)  # a signature is for its owner
    (folder / "dataset.json").write_text(json.dumps(meta, indent=1) + "\n")


def key_at(reader: Reader, shard: str, offset: int, expected_hash: int) -> str:
    """The key of the tar member whose data begins at `offset`; UserError if it is not the expected one."""
    start = max(0, offset - _HEADER_BYTES)
    before = reader.read(shard, start, offset - start)
    # The last block cuts a name over 100 characters, which is whole only if read from an earlier block on.
    for back in range(_BLOCK, len(before) + 1, _BLOCK):
        if found := _key_of(_member_name(before[-back:]) or "", shard, expected_hash):
            return found
    if (linked := _linked_key(shard, expected_hash)) is not None:
        return linked
    raise UserError(
        f"shard {shard} has changed since it was indexed",
        found=f"no such key at byte {offset}",
        fix=AGAIN,
    )


def _key_of(member: str, shard: str, expected_hash: int) -> str | None:
    """The key with this hash that a member's name is, by itself or below its shard's; None if it is neither."""
    name = split_name(member)
    keys = (name[0], f"{stem(shard)}/{name[0]}") if name else ()
    return next((key for key in keys if key_hash(key) == expected_hash), None)


def _linked_key(shard: str, expected_hash: int) -> str | None:
    """The key with this hash among the links of a local tar, which lie elsewhere than what they lead to."""
    if is_remote(shard):
        return None
    try:
        with tarfile.open(shard, "r:", ignore_zeros=True, encoding="utf-8", errors="surrogateescape") as tar:
            links = (member.name for member in tar if member.issym() or member.islnk())
            return next(filter(None, (_key_of(name, shard, expected_hash) for name in links)), None)
    except (tarfile.TarError, OSError, ValueError, OverflowError):
        return None


def _member_name(headers: bytes) -> str | None:
    """The name of the member whose headers are exactly these blocks."""
    file = io.BytesIO(headers)
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            member = tar.next()
            return member.name if member and member.offset_data == len(headers) else None
    except (tarfile.TarError, ValueError, OverflowError):
        return None


@dataclass(frozen=True, eq=False)
class Index:
    """A checked, read-only data set. Reads are thread-safe and leave no file position behind."""

    path: Path
    records: np.ndarray  # (N,) RECORD, memory-mapped
    class_list: Classes
    shards: list[str]  # absolute paths, or URLs
    fingerprint: str
    quarantined: int
    _reader: Reader = field(default_factory=Reader, repr=False)

    @classmethod
    def open(
        cls, path: str | Path, split: str = "train", *, cache: Path | None = None, cache_bytes: int = CACHE_BYTES
    ) -> "Index":
        """Open `path`, or `path/split` where the data set was prepared with its own train and val parts.

        `cache` is a folder for samples of remote shards, at most `cache_bytes` of them; processes may share it.
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
        shards = [shard if is_remote(shard) else os.path.join(path, shard) for shard in meta["shards"]]
        reader = Reader(cache, cache_bytes)
        records = checked(path, meta, shards, reader)
        names = None if meta["class_names"] is None else tuple(meta["class_names"])
        listed = Classes(meta["classes"], names, meta["class_rule"])
        return cls(path, records, listed, shards, meta["fingerprint"], meta["quarantined"], reader)

    def __len__(self) -> int:
        """Number of rows N, quarantined ones included."""
        return len(self.records)

    @property
    def classes(self) -> int:
        """C, the number of classes."""
        return self.class_list.count

    @property
    def usable(self) -> int:
        """Number of good rows."""
        return len(self) - self.quarantined

    @cached_property
    def good(self) -> np.ndarray:
        """Rows with status 0, ascending, int64."""
        return np.flatnonzero(self.records["status"] == 0).astype(np.int64, copy=False)

    def read(self, row: int) -> bytes:
        """The encoded image of a row, byte for byte as it was indexed; BadSample if that cannot be had."""
        record = self.records[row]
        shard, size, crc = self.shards[record["shard"]], int(record["size"]), int(record["crc"])
        try:
            data = self._reader.read(shard, int(record["offset"]), size, crc)
        except Unreadable as error:
            # The key of a sample on a server that just failed is not worth another minute of tries.
            raise self.bad(row, error.cause, find_key=not is_remote(shard)) from None
        if len(data) != size:
            raise self.bad(row, f"the shard was cut: {len(data)} of {size} bytes")
        if crc32c(data) != crc:
            raise self.bad(row, "the shard has changed since it was indexed: another CRC-32C")
        return data

    @cached_property
    def remote(self) -> bool:
        """Does any shard lie behind a URL?"""
        return any(map(is_remote, self.shards))

    def key(self, row: int) -> str:
        """The WebDataset key of a row, from its tar header; meant for messages, not for hot loops."""
        record = self.records[row]
        return key_at(self._reader, self.shards[record["shard"]], int(record["offset"]), int(record["key_hash"]))

    def bad(self, row: int, cause: str, find_key: bool = True) -> BadSample:
        record = self.records[row]
        try:
            name = repr(self.key(row)) if find_key else None
        except UserError:  # the header is gone as well
            name = None
        name = name or f"with key hash {record['key_hash']:016x}"
        return BadSample(
            f"cannot read sample {name} at byte {record['offset']} of shard {self.shards[record['shard']]}",
            found=cause,
            fix="restore the shard or run pipeline prepare again",
        )


def _read_meta(path: Path) -> dict[str, Any]:
    """dataset.json with every key of the right type, and counts that fit each other."""
    where = f"the index of {path}, which is damaged: dataset.json"
    meta = outside.document(path / "dataset.json", where, AGAIN, _MAX_META_BYTES)
    if isinstance(meta, dict) and meta.get("format") == 2:
        meta = {"class_rule": None, **meta, "format": _FORMAT}
    if isinstance(meta, dict) and meta.get("format") != _FORMAT:
        found = outside.shown(meta.get("format"))
        raise UserError(f"the index of {path} has another format", found=found, expected=_FORMAT, fix=AGAIN)
    outside.record(meta, where, AGAIN, _META)
    if meta["samples"] == 0:
        raise UserError(f"the data set at {path} is empty", fix="run pipeline prepare on a source with images")
    if not 1 <= meta["classes"] < 2**31:
        raise damaged(path, found=f"{outside.shown(meta['classes'])} classes")
    if meta["class_names"] is not None and len(meta["class_names"]) != meta["classes"]:
        raise damaged(path, found=f"{len(meta['class_names'])} class names", expected=meta["classes"])
    return meta


def open_data(machine: Machine, path: str | Path, split: str) -> Index:
    """The data set at `path`, read through the machine's cache of remote shards, its class names through its map."""
    index = Index.open(path, split, cache=machine.shard_cache, cache_bytes=int(machine.shard_cache_gb * 2**30))
    if machine.class_map:
        return dataclasses.replace(index, class_list=index.class_list.renamed(class_lists.read_map(machine.class_map)))
    return index


def require_labels(index: Index, flag: str) -> None:
    """Raise UserError for a data set whose samples have no labels; `flag` names it."""
    if index.class_list.unlabelled:
        fix = "give a data set prepared without --unlabelled"
        raise UserError(f"{flag} has no labels", found=f"{index.path}, prepared with --unlabelled", fix=fix)


def matched(index: Index, machine: Machine, other: Classes, here: str, there: str) -> Index:
    """`index`, once its classes are those of `other`; its labels renumbered by name if the user gave a --class-map.

    `here` and `there` name the places of the two lists in errors. Raises UserError with the first difference.
    """
    if not machine.class_map or index.class_list.unlabelled:
        other.require_same(index.class_list, there, here)
        return index
    numbers = index.class_list.numbers_in(other, here, there)
    records = np.array(index.records)
    known = (records["label"] >= 0) & (records["label"] < len(numbers))
    records["label"][known] = numbers[records["label"][known]]
    return dataclasses.replace(index, records=records, class_list=other)
