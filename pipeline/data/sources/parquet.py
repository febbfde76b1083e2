"""Parquet files of images as the Hugging Face Hub has them: bytes and path in a struct, and a label beside it.

A file's features, with the names of classes, are JSON in its metadata, under `huggingface`:
https://huggingface.co/docs/datasets/image_dataset. Rows are streamed, a page of a row group at a time.
"""

import io
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from cache.errors import UserError
from cache.outside import parsed
from pipeline.data import classes as class_lists
from pipeline.data.classes import Classes, numbered
from pipeline.data.ledger import Ledger
from pipeline.data.shards import Reader, stem
from pipeline.data.sources.base import EXTENSIONS, Options, Sample, Source, key_of, whole
from pipeline.data.sources.rules import numbering

_LABELS = ("label", "labels", "fine_label", "cls")
_IMAGES = ("image", "img", "jpg", "png")
_ROWS, _BATCH_BYTES = 64, 1 << 20  # at once, at most
_BUFFER_BYTES = 4 << 20  # of a column
_OPEN_THREADS = 16
_SIGNS = {b"\x89PNG": "png", b"\xff\xd8": "jpg", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tif", b"MM\0*": "tif"}


class _File(NamedTuple):
    shard: str
    metadata: Any
    """pyarrow's, of the file."""
    image: str
    """The column of images."""
    label: str | None
    names: tuple[str, ...] | None
    """Of the classes, by the metadata."""


def parquet(pattern: str, options: Options, ledger: Ledger) -> dict[str, Source]:
    """One data set of all files of a pattern, in the order of their names and rows.

    A key is the image's path without its extension, or file and row where there is none (`--key shard/row`). A row
    without an image or a label is quarantined. UserError for a file that is none, and for files of several splits.
    """
    _pyarrow()
    reader = Reader()
    shards = reader.expand(pattern, ".parquet")
    _require_one_split(shards)
    with ThreadPoolExecutor(_OPEN_THREADS) as pool:
        files = list(pool.map(lambda shard: _inspect(reader, shard, options), shards))
    classes = _classes(reader, files, options)
    count = sum(file.metadata.num_rows for file in files)
    if not count:
        raise UserError("Parquet files without rows", found=f"{len(files)} files", fix="check the pattern")
    return {"": Source(_samples(reader, files, classes, options, ledger), count, classes, files=1)}


def _samples(
    reader: Reader, files: list[_File], classes: Classes, options: Options, ledger: Ledger
) -> Iterator[Sample]:
    numbers = numbering(classes, options.names)
    for file in files:
        columns = [file.image, *([file.label] if file.label else [])]
        row = 0
        for batch in _batches(reader, file, columns):
            images = batch.column(file.image)
            structs = (
                dict(zip([f.name for f in images.type], images.flatten(), strict=True)) if _is_struct(images) else {}
            )
            paths = structs.get("path")
            for at in range(batch.num_rows):
                content = (structs["bytes"] if structs else images)[at].as_py() or b""
                path = paths[at].as_py() if paths is not None else None
                label = batch.column(file.label)[at].as_py() if file.label else None
                if isinstance(label, str) and numbers and (found := numbers(class_lists.nfc(label))) is not None:
                    label = found
                ledger.meet()
                ledger.use()
                yield Sample(
                    _key(file.shard, row + at, path, options.key), _extension(path, content), content, whole(label)
                )
            row += batch.num_rows


def _key(shard: str, row: int, path: str | None, rule: str) -> str:
    name = os.path.splitext(os.path.basename(path))[0] if path else ""
    if rule == "shard/row" or not name:
        return f"{key_of(stem(shard))}/{row:08d}"
    key = os.path.join(os.path.dirname(path or "").strip("/"), key_of(name))
    return f"{key_of(stem(shard))}/{key}" if rule == "shard/name" else key


def _extension(path: str | None, content: bytes) -> str:
    named = os.path.splitext(path or "")[1][1:].lower()
    if named in EXTENSIONS:
        return named
    return next((kind for sign, kind in _SIGNS.items() if content.startswith(sign)), "webp")


def _classes(reader: Reader, files: list[_File], options: Options) -> Classes:
    """By the metadata, else by the labels themselves, which are then read twice."""
    first = files[0]
    for file in files:
        if file.names != first.names:
            raise UserError(
                f"{file.shard} has other classes", expected=f"those of {first.shard}", fix="check the pattern"
            )
    if first.names:
        return Classes(len(first.names), first.names, "source")
    if options.order not in class_lists.RULES:
        return class_lists.read_list(options.order)
    found: set[Any] = set()
    for file in files:
        if file.label:
            for batch in _batches(reader, file, [file.label]):
                found.update(batch.column(file.label).unique().to_pylist())
    names = {label for label in found if isinstance(label, str) and whole(label) is None}
    if names:
        return numbered({(options.names or {}).get(class_lists.nfc(name), name) for name in names}, options.order)
    highest = max((number for label in found if (number := whole(label)) is not None), default=0)
    return Classes(options.classes or max(highest, 0) + 1)


def _inspect(reader: Reader, shard: str, options: Options) -> _File:
    """Which columns of a file are what, by its features, else by their names and types."""
    pyarrow = _pyarrow()
    opened = _opened(reader, shard)
    schema = opened.schema_arrow
    features = _features(schema.metadata or {})
    images = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
    images += [name for name in schema.names if _holds_bytes(schema.field(name).type)]
    binary = (pyarrow.types.is_binary, pyarrow.types.is_large_binary)
    images += [name for name in _IMAGES if name in schema.names and any(t(schema.field(name).type) for t in binary)]
    columns = ", ".join(schema.names)
    if not images:
        raise UserError(f"no column of images in {shard}", found=columns, expected="one", fix="check the file")
    if options.label_key and options.label_key not in schema.names:
        raise UserError(f"no column {options.label_key} in {shard}", found=columns, fix="correct --label-key")
    label = options.label_key or next((name for name in _LABELS if name in schema.names), None)
    if label is None:
        raise UserError(f"no column of labels in {shard}", found=columns, fix="name it by --label-key")
    names = features.get(label, {}).get("names")
    if isinstance(names, dict):  # as old files have it, by number
        names = [names[number] for number in sorted(names, key=int)]
    if names is not None and not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
        raise UserError(f"unusable names of classes in {shard}", found=f"{names!s:.80}", fix="make the file again")
    return _File(shard, opened.metadata, images[0], label, tuple(names) if names else None)


def _features(metadata: dict[bytes, bytes]) -> dict[str, dict]:
    try:
        features = parsed(metadata[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _holds_bytes(kind: Any) -> bool:
    return str(kind).startswith("struct<") and kind.get_field_index("bytes") >= 0


def _is_struct(column: Any) -> bool:
    return str(column.type).startswith("struct<")


def _require_one_split(shards: list[str]) -> None:
    """Files of the Hub begin with the name of their split."""
    found = {match[1] for shard in shards if (match := re.match(r"(train|validation|val|test)\b", stem(shard)))}
    if len(found) > 1:
        expected = "those of one"
        raise UserError(
            "files of several splits", found=", ".join(sorted(found)), expected=expected, fix="give train-*"
        )


class _Ranges(io.RawIOBase):
    """A shard as a file."""

    def __init__(self, reader: Reader, shard: str):
        super().__init__()
        self._reader, self._shard, self._at = reader, shard, 0
        self._length = reader.length(shard)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._reader.read(self._shard, self._at, min(len(buffer), max(self._length - self._at, 0)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _opened(reader: Reader, shard: str, metadata: Any = None) -> Any:
    from pyarrow import parquet

    file = _Ranges(reader, shard)
    try:
        return parquet.ParquetFile(file, metadata=metadata, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    except UserError:
        raise
    except Exception as error:  # pyarrow has many
        raise _damaged(shard, error) from None


def _batches(reader: Reader, file: _File, columns: list[str]) -> Iterator[Any]:
    opened = _opened(reader, file.shard, file.metadata)
    batches = opened.iter_batches(batch_size=_rows(file.metadata), columns=columns, use_threads=False)
    while True:
        try:
            batch = next(batches, None)
        except UserError:
            raise
        except Exception as error:
            raise _damaged(file.shard, error) from None
        if batch is None:
            return
        yield batch


def _rows(metadata: Any) -> int:
    """Rows to hold at once, by what they take in the row group with the largest: pyarrow holds them several times."""
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    largest = max((group.total_byte_size / max(group.num_rows, 1) for group in groups), default=1.0)
    return int(min(max(_BATCH_BYTES / max(largest, 1.0), 1), _ROWS))


def _damaged(shard: str, error: Exception) -> UserError:
    found = " ".join(str(error).split())[:200]
    return UserError(f"cannot read the Parquet file {shard}", found=found, fix="fetch it again, or leave it out")


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise UserError("the parquet source needs pyarrow", fix="pip install '.[parquet]'") from None
    return pyarrow
