"""Data sets of bytes that are no images, and what is said of them."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from google_crc32c import value as crc32c

from cache.errors import UserError
from pipeline.data import index
from pipeline.data.classes import Classes
from pipeline.data.index import RECORD, Index, key_hash


def make(
    folder: Path, members: dict[str, bytes], per_shard: int = 3, format: int = tarfile.PAX_FORMAT, **changes
) -> dict[str, bytes]:
    """A data set folder made with tarfile alone; its "images" are any bytes, since an index never decodes."""
    folder.mkdir(parents=True)
    rows, shards = [], []
    items = list(members.items())
    for start in range(0, len(items), per_shard):
        shards.append(f"s{start}.tar")
        with tarfile.open(folder / shards[-1], "w", format=format) as tar:
            for name, data in items[start : start + per_shard]:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        with tarfile.open(folder / shards[-1]) as tar:
            for member in tar:
                key, data = member.name.split(".")[0], members[member.name]
                number, crc, label = len(shards) - 1, crc32c(data), len(rows) % 2
                rows.append((number, member.offset_data, len(data), 9, 7, label, key_hash(key), crc, 0, 0))
    records = np.array(rows, RECORD)
    for name, value in changes.items():
        records[name][-1] = value
    index.write(folder, records, shards, [], source="test", classes=Classes(2, ("a", "b"), "lexical"))
    return members


def members(count: int) -> dict[str, bytes]:
    return {f"class/{i:03d}.jpg": np.random.default_rng(i).bytes(50 + 100 * i) for i in range(count)}


def refuse(path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        Index.open(path)
    message = str(caught.value)
    assert "\n" not in message and "fix: " in message
    assert all(word in message for word in words), message
