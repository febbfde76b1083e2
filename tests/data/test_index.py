import errno
import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from google_crc32c import value as crc32c
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from cache.errors import UserError
from pipeline.data import index, records, shards
from pipeline.data.classes import Classes
from pipeline.data.index import RECORD, BadSample, Index, fingerprint, key_hash, split_name

ROOT = Path(__file__).parents[2]


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


def test_the_record_layout_is_fixed():
    """Other programs may map index.npy: 42 bytes, little-endian, nothing padded."""
    assert RECORD.itemsize == 42
    assert [(name, RECORD[name].str) for name in RECORD.names] == [
        ("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("height", "<u4"), ("width", "<u4"),
        ("label", "<i4"), ("key_hash", "<u8"), ("crc", "<u4"), ("status", "|u1"), ("cmyk", "|u1"),
    ]  # fmt: skip


def test_the_crc_is_crc_32c():
    """The check value of the CRC catalogue, and that of RFC 3720 for 32 zeros."""
    assert index.crc32c(b"123456789") == 0xE3069283 and index.crc32c(bytes(32)) == 0x8A9136AA


def test_key_hash_is_blake2b_64_of_the_utf8_key():
    """Known answers from coreutils: printf KEY | b2sum -l 64."""
    assert key_hash("n01440764/img_1").to_bytes(8, "little").hex() == "90f78b19111a0009"
    assert key_hash("é").to_bytes(8, "little").hex() == "cb1abf8beff3192f"


@given(st.text(alphabet="ab./_Jé \n", max_size=12))
def test_keys_are_webdatasets_keys(name):
    key, extension = base_plus_ext(name)
    assert split_name(name) == (None if key is None else (key, extension.lower()))


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


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_rows_read_back_the_bytes_and_keys_that_tarfile_sees(tmp_path, format):
    """Names of up to 100 characters, of 100 to 255, longer ones, in headers of their own, and beyond ASCII."""
    long = {f"{'very' * 30}/{'long' * n}_{n}.png": b"%d" % n for n in (3, 20, 40, 400)}
    expected = make(tmp_path / "d", {**members(7), **long, "ünï/cödé.jpg": b"x"}, format=format)
    data = Index.open(tmp_path / "d")
    assert len(data) == 12 and data.classes == 2 and data.class_list == Classes(2, ("a", "b"), "lexical")
    assert {data.key(row): data.read(row) for row in range(12)} == {
        name.split(".")[0]: content for name, content in expected.items()
    }


def test_records_are_read_only_and_good_rows_are_those_with_status_zero(tmp_path):
    make(tmp_path / "d", members(4), status=1, label=-1, height=0)
    data = Index.open(tmp_path / "d")
    assert data.good.dtype == np.int64 and data.good.tolist() == [0, 1, 2] and len(data) == 4
    assert isinstance(data.records, np.memmap)
    with pytest.raises(ValueError):
        data.records["label"][0] = 1


def test_a_moved_folder_opens_with_the_same_identity(tmp_path):
    expected = make(tmp_path / "old", members(5))
    before = Index.open(tmp_path / "old").fingerprint
    shutil.move(tmp_path / "old", tmp_path / "else" / "new")
    data = Index.open(tmp_path / "else" / "new")
    assert data.fingerprint == before and data.read(4) == list(expected.values())[4]
    assert data.shards == [f"{tmp_path}/else/new/s0.tar", f"{tmp_path}/else/new/s3.tar"]


def test_a_folder_of_splits_opens_the_split_asked_for(tmp_path):
    make(tmp_path / "d" / "train", members(3))
    make(tmp_path / "d" / "val", members(2))
    assert len(Index.open(tmp_path / "d")) == 3
    assert len(Index.open(str(tmp_path / "d"), split="val")) == 2
    assert len(Index.open(tmp_path / "d" / "val", split="train")) == 2


def test_threads_may_read_more_shards_than_descriptors_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_OPEN_SHARDS", 3)
    expected = list(make(tmp_path / "d", members(40), per_shard=1).values())
    data = Index.open(tmp_path / "d")
    rows = np.random.default_rng(0).integers(0, 40, 2000).tolist()
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(data.read, rows)) == [expected[row] for row in rows]
    assert len(os.listdir("/proc/self/fd")) - before <= 3
    del data
    assert len(os.listdir("/proc/self/fd")) <= before


def refuse(path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        Index.open(path)
    message = str(caught.value)
    assert "\n" not in message and "fix: " in message
    assert all(word in message for word in words), message


def test_a_path_without_a_data_set_is_refused(tmp_path):
    refuse(tmp_path / "none", "no data set at", str(tmp_path / "none"), "pipeline prepare")
    refuse(tmp_path, "is not a prepared data set", "index.npy")


def test_an_empty_data_set_is_refused(tmp_path):
    (tmp_path / "d").mkdir()
    index.write(tmp_path / "d", np.empty(0, RECORD), [], [], source="", classes=Classes(1))
    refuse(tmp_path / "d", "is empty")


def test_missing_and_cut_shards_are_refused_by_name(tmp_path):
    make(tmp_path / "d", members(5))
    shard = tmp_path / "d" / "s3.tar"
    whole = shard.read_bytes()
    last = Index.open(tmp_path / "d").records[4]
    end = int(last["offset"] + last["size"])
    shard.write_bytes(whole[:end])
    Index.open(tmp_path / "d")  # all that the records need is there
    shard.write_bytes(whole[: end - 1])
    refuse(tmp_path / "d", "s3.tar is shorter", f"found {end - 1} bytes", f"at least {end}")
    shard.unlink()
    refuse(tmp_path / "d", "cannot read shard", "s3.tar")


def bad(data: Index, row: int, *words: str) -> None:
    with pytest.raises(BadSample) as caught:
        data.read(row)
    message = str(caught.value)
    assert "\n" not in message and "fix: " in message
    assert all(word in message for word in words), message


def test_a_sample_that_is_not_what_was_indexed_is_named_with_shard_byte_and_cause(tmp_path, monkeypatch):
    """Cut, changed in one bit, gone with its header, unreadable, missing: each is an error, never wrong bytes."""
    make(tmp_path / "d", members(5))
    data = Index.open(tmp_path / "d")
    shard, offset = tmp_path / "d" / "s3.tar", int(data.records["offset"][4])
    place = f"at byte {offset} of shard {shard}"
    hashed = f"with key hash {key_hash('class/004'):016x}"
    whole = shard.read_bytes()
    data.read(4)
    os.truncate(shard, offset + 9)
    bad(data, 4, "sample 'class/004'", place, "cut: 9 of 450 bytes")
    os.truncate(shard, 3)
    bad(data, 4, f"sample {hashed}", place, "cut: 0 of 450 bytes")
    shard.write_bytes(whole[: offset + 449] + bytes([whole[offset + 449] ^ 1]) + whole[offset + 450 :])
    bad(data, 4, "sample 'class/004'", place, "changed since it was indexed")
    shard.write_bytes(bytes(20_000))
    bad(data, 4, f"sample {hashed}", place, "changed since it was indexed")
    with pytest.raises(UserError, match="has changed since"):
        data.key(4)
    shard.write_bytes(whole)

    def fail(descriptor: int, size: int, at: int) -> bytes:
        if at == offset:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(descriptor, size, at)

    pread = os.pread
    monkeypatch.setattr(os, "pread", fail)
    bad(data, 4, "sample 'class/004'", place, "Input/output error")
    monkeypatch.undo()
    assert data.read(4) == members(5)["class/004.jpg"]
    (tmp_path / "d" / "s0.tar").unlink()
    bad(data, 0, f"sample with key hash {key_hash('class/000'):016x}", "s0.tar", "No such file")


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


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "d"
    make(folder, members(5))
    return folder, (folder / "index.npy").read_bytes(), (folder / "dataset.json").read_bytes()


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_no_damage_to_the_files_escapes_as_another_exception(sound, data):
    folder, npy, meta = sound
    name, whole = data.draw(st.sampled_from([("index.npy", npy), ("dataset.json", meta)]))
    at = data.draw(st.integers(0, len(whole) - 1))
    patch = data.draw(st.binary(max_size=3))
    damaged = whole[:at] + patch + whole[at + data.draw(st.integers(0, 4)) :]
    (folder / name).write_bytes(damaged)
    try:
        Index.open(folder)
    except UserError as error:
        assert "fix: " in str(error)
    else:
        # Only what is no part of the identity may differ: the place of the padding, the source, a class name.
        assert Index.open(folder).fingerprint == json.loads(meta)["fingerprint"]
    finally:
        (folder / name).write_bytes(whole)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("format", 1, "has another format; found 1, expected 3"),
        ("classes", 0, "0 classes"),
        ("classes", True, "classes of type bool"),
        ("classes", "2", "classes of type str"),
        ("class_names", ["a"], "1 class names, expected 2"),
        ("class_names", [1, 2], "not all strings"),
        ("shards", [None, "s3.tar"], "not all strings"),
        ("shards", ["s0.tar"], "shard number 1"),
        ("shards", ["s0.tar", "a\0b"], "cannot read shard"),
        ("samples", 6, "found 5 records, expected 6"),
        ("quarantined", 1, "another number of quarantined"),
        ("fingerprint", "0" * 64, "was altered"),
        ("more", 1, "keys"),
    ],
)
def test_a_wrong_value_in_dataset_json_is_named(tmp_path, key, value, words):
    make(tmp_path / "d", members(5))
    file = tmp_path / "d" / "dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    refuse(tmp_path / "d", words)


@pytest.mark.parametrize("text", ["", "[]", "3", "[" * 100_000, "{", "\xff"])
def test_a_dataset_json_that_is_none_is_refused(tmp_path, text):
    make(tmp_path / "d", members(5))
    (tmp_path / "d" / "dataset.json").write_text(text, "latin-1")
    refuse(tmp_path / "d", "is damaged")
    (tmp_path / "d" / "dataset.json").unlink()
    refuse(tmp_path / "d", "is damaged", "No such file")


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
