import errno
import json
import os
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.indexes import make, members, refuse
from webdataset.tariterators import base_plus_ext

from cache.errors import UserError
from pipeline.data import index, shards
from pipeline.data.classes import Classes
from pipeline.data.index import RECORD, BadSample, Index, key_hash, split_name


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
