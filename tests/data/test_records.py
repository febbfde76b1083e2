"""What an index is held against when it is opened."""

import hashlib
import json
import os
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from support.indexes import make, members, refuse

from pipeline.data import records
from pipeline.data.index import RECORD, Index, fingerprint

ROOT = Path(__file__).parents[2]


def test_the_record_layout_is_fixed():
    """Other programs may map index.npy: 42 bytes, little-endian, nothing padded."""
    assert RECORD.itemsize == 42
    assert [(name, RECORD[name].str) for name in RECORD.names] == [
        ("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("height", "<u4"), ("width", "<u4"),
        ("label", "<i4"), ("key_hash", "<u8"), ("crc", "<u4"), ("status", "|u1"), ("cmyk", "|u1"),
    ]  # fmt: skip


def test_the_fingerprint_covers_every_field_of_identity_and_not_the_place():
    rng = np.random.default_rng(0)
    records = np.frombuffer(rng.bytes(RECORD.itemsize * 70_000), RECORD).copy()
    digest = hashlib.sha256(struct.pack("<Q", 10))
    for row in records.tolist():
        _, _, size, height, width, label, key, crc, status, _ = row
        digest.update(struct.pack("<QiIIIIB", key, label, size, crc, height, width, status))
    assert fingerprint(records, 10) == digest.hexdigest()
    assert fingerprint(records, 11) != digest.hexdigest()
    for name in RECORD.names:
        changed = records.copy()
        changed[name][-1] ^= 1
        assert (fingerprint(changed, 10) == digest.hexdigest()) == (name in ("shard", "offset", "cmyk")), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shard": 2}, "shard number 2"),
        ({"shard": 2**32 - 1}, "shard number"),
        ({"offset": 2**64 - 1}, "is shorter"),  # offset + size wraps around
        ({"offset": 2**64 - 1, "size": 0, "status": 1}, "is shorter"),
        ({"size": 2**32 - 1}, "is shorter"),
        ({"label": 2}, "label out of range"),
        ({"label": -1}, "label out of range"),
        ({"height": 0}, "side out of range"),
        ({"width": 65_501}, "side out of range"),
    ],
)
def test_a_hostile_record_is_refused(tmp_path, change, words):
    """Written with a matching fingerprint, so nothing but the check itself stands in the way."""
    make(tmp_path / "d", members(5), **change)
    refuse(tmp_path / "d", words)


def test_an_altered_index_is_refused(tmp_path):
    make(tmp_path / "d", members(5))
    records = np.load(tmp_path / "d" / "index.npy")
    records["label"][2] ^= 1
    np.save(tmp_path / "d" / "index.npy", records)
    refuse(tmp_path / "d", "was altered")
    np.save(tmp_path / "d" / "index.npy", records[:4])
    refuse(tmp_path / "d", "found 4 records, expected 5")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(5),
        np.zeros((5, 1), RECORD),
        np.zeros(5, RECORD.newbyteorder(">")),
        np.array([{}], object),
        np.zeros(5, np.dtype(RECORD.descr[::-1])),
    ],
    ids=["floats", "2-D", "big-endian", "pickle", "reordered"],
)
def test_an_index_of_another_dtype_or_shape_is_refused(tmp_path, array):
    make(tmp_path / "d", members(5))
    np.save(tmp_path / "d" / "index.npy", array, allow_pickle=True)
    refuse(tmp_path / "d", "is damaged", "index.npy")


def test_a_header_that_claims_more_than_the_file_holds_allocates_nothing(tmp_path):
    make(tmp_path / "d", members(5))
    file = tmp_path / "d" / "index.npy"
    file.write_bytes(file.read_bytes().replace(b"(5,), }            ", b"(999999999999,), } "))
    refuse(tmp_path / "d", "is damaged", "index.npy")


IMAGENET = """
import re, sys
import numpy as np
from pathlib import Path
from pipeline.data import index
from pipeline.data.classes import Classes
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
folder = Path(sys.argv[1])
if sys.argv[2] == "write":
    rng, count = np.random.default_rng(0), 1_281_167
    records = np.empty(count, index.RECORD)
    row = np.arange(count)
    for name, value in dict(shard=row // 4096, offset=row % 4096 * 120_000 + 512, size=110_000, height=375,
                            width=500, label=row % 1000, status=0).items():
        records[name] = value
    records["key_hash"] = rng.permutation(count)
    records["crc"] = rng.integers(0, 2**32, count)
    shards = [f"{i}.tar" for i in range(records["shard"][-1] + 1)]
    for shard in shards:
        with open(folder / shard, "wb") as file:
            file.truncate(4096 * 120_000)
    index.write(folder, records, shards, [], source="", classes=Classes(1000))
else:
    before = peak()
    data = index.Index.open(folder)
    assert len(data.good) == 1_281_167
    print(peak() - before)
"""


def test_an_index_of_imagenets_size_opens_in_150_mb(tmp_path):
    """Growth of the peak of a fresh process; over 52 MB, as the mapped records count. The shards are sparse.

    VmHWM, since ru_maxrss of a child begins at its parent's.
    """
    for step in ("write", "open"):
        output = subprocess.run(
            [sys.executable, "-c", IMAGENET, tmp_path, step], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    assert 50_000 < int(output) <= 150_000  # KiB


def test_a_large_index_is_read_through_once(tmp_path, monkeypatch):
    """And again where index or dataset.json is another file; shards are measured each time."""
    monkeypatch.setattr(records, "LARGE", 3)
    make(tmp_path / "d", members(5))
    folder, read = tmp_path / "d", []
    read_through = records._read_through
    monkeypatch.setattr(records, "_read_through", lambda *given: (read.append(given[0]), read_through(*given))[1])
    first = Index.open(folder)
    assert np.array_equal(Index.open(folder).records, first.records) and len(read) == 1
    stamp = (folder / "checked.json").read_bytes()

    for text in (b"", b"[]", b'{"ends": 3}', stamp.replace(b'"ends": [', b'"ends": [1, ')):
        (folder / "checked.json").write_bytes(text)
        Index.open(folder)
        assert (folder / "checked.json").read_bytes() == stamp
    assert len(read) == 5

    shard = Path(first.shards[0])
    whole = shard.read_bytes()
    end = int((first.records["offset"] + first.records["size"])[:3].max())
    shard.write_bytes(whole[: end - 1])
    refuse(folder, "is shorter than indexed", f"found {end - 1} bytes", f"at least {end}")
    shard.write_bytes(whole)
    assert len(read) == 5

    altered = np.array(first.records)
    altered["label"][0] += 1
    times = os.stat(folder / "index.npy")
    np.save(folder / "index.npy", altered)
    os.utime(folder / "index.npy", ns=(times.st_atime_ns, times.st_mtime_ns))  # no program sets the time of change
    refuse(folder, "was altered")
    assert len(read) == 6


def test_an_index_of_100_million_rows_is_opened_without_reading_it(tmp_path, monkeypatch):
    """Once it has been read through: sparse here, of 4.6 GB. Nothing as long as the rows is made."""
    rows = 100_000_000
    make(tmp_path / "d", members(5))
    folder = tmp_path / "d"
    meta = json.loads((folder / "dataset.json").read_text()) | {"samples": rows, "quarantined": 0}
    (folder / "dataset.json").write_text(json.dumps(meta))
    with (folder / "index.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": RECORD.descr, "fortran_order": False, "shape": (rows,)})
        file.truncate(file.tell() + rows * RECORD.itemsize)
    monkeypatch.setattr(records, "_read_through", lambda path, of, meta, shards: [1] * shards)
    Index.open(folder)
    monkeypatch.setattr(records, "_read_through", None)
    tracemalloc.start()
    index = Index.open(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(index) == index.usable == rows and peak < 10e6
