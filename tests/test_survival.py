"""Damage of every kind: named by key, skipped alike in every view, and no harm to the samples around it."""

import dataclasses
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from support.images import encode, jpeg, pixels, png
from support.tars import tar_of

import cache
from cache import UserError
from pipeline.config import PrecomputeTeacher, TrainStudent
from pipeline.data import prepare
from pipeline.data.index import Index, key_hash
from pipeline.demo import POLICY
from pipeline.labels import precompute
from pipeline.training import train_student
from pipeline.views import drawing
from pipeline.views.loader import Loader
from pipeline.views.policy import POLICIES

CIFAR = POLICIES["cifar10"]
SHARD, SHARDS = 400, 4
RNG = np.random.default_rng(5)


def key(number: int) -> str:
    """Spaces and letters beyond ASCII here and there."""
    return f"{'süße Äpfel/ein Bild' if number % 50 == 7 else 'plain'} {number:04d}"


NO_IMAGE = "not an image that is read (JPEG, PNG, WEBP, BMP, GIF, TIFF, PPM, AVIF)"
CUT = "truncated|damaged"  # which of the two depends on where the cut falls
BEFORE = {  # what happens to a sample's image before it is indexed, and the cause it is listed with
    "a tenth": (lambda data: data[: len(data) // 10], CUT),
    "half": (lambda data: data[: len(data) // 2], CUT),
    "nearly all": (lambda data: data[: len(data) * 95 // 100], CUT),
    "empty": (lambda data: b"", "empty file"),
    "zeros": (lambda data: bytes(len(data)), NO_IMAGE),
    "garbage": (lambda data: RNG.bytes(len(data)), NO_IMAGE),
    "16-bit png": (
        lambda data: encode(pixels(np.random.default_rng(1), 40, 40, "L").convert("I;16"), "PNG"),
        "16-bit or floating-point grey",
    ),
    "text": (lambda data: b"<html>404 Not Found</html>", NO_IMAGE),
}
ODD = {  # unusual, not bad: decoded like any other
    "gif": lambda: encode(pixels(np.random.default_rng(4), 40, 40), "GIF"),
    "png named jpg": lambda: png(np.random.default_rng(2), 40, 40),
    "progressive": lambda: jpeg(np.random.default_rng(3), 40, 40, progressive=True),
}
AFTER = ("bit flips", "another image", "read error", "undecodable")  # once the data set is indexed
PLACES = {name: 23 + 37 * i for i, name in enumerate([*BEFORE, *ODD, "no label", *AFTER])}


def write(folder: Path, damaged: bool) -> Path:
    """1,600 small JPEG in four shards, 16 of them unusual or damaged, a fifth shard that ends early."""
    rng, images = np.random.default_rng(0), [jpeg(np.random.default_rng(i), 40, 36) for i in range(20)]
    of_place = {place: name for name, place in PLACES.items()}
    folder.mkdir()
    for shard in range(SHARDS + 1):
        members = {}
        for number in range(shard * SHARD, (shard + 1) * SHARD if shard < SHARDS else SHARDS * SHARD + 20):
            data, kind = images[rng.integers(20)], of_place.get(number)
            if kind in ODD:
                data = ODD[kind]()
            if damaged and kind in BEFORE:
                data = BEFORE[kind][0](data)
            members[f"{key(number)}.jpg"] = data
            if not (damaged and kind == "no label"):
                members[f"{key(number)}.cls"] = str(number % 10).encode()
        path = tar_of(folder / f"{shard}.tar", members)
        if damaged and shard == SHARDS:
            os.truncate(path, path.stat().st_size // 2)
    prepare.build(f"webdataset:{folder}/*.tar", folder / "data", classes=10)
    return folder / "data"


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Index:
    return Index.open(write(tmp_path_factory.mktemp("clean") / "set", damaged=False))


@pytest.fixture(scope="module")
def bad(tmp_path_factory, clean) -> Index:
    return Index.open(write(tmp_path_factory.mktemp("bad") / "set", damaged=True))


def row_of(index: Index, number: int) -> int:
    (rows,) = np.nonzero(index.records["key_hash"] == key_hash(key(number)))
    return int(rows[0])


def run(loader: Loader, numbers=(0, 1)) -> dict[int, dict[int, tuple]]:
    """By view and key hash: the digests, after checking that rows come in the order of the plan."""
    index, out = loader.index, {}
    order = np.random.default_rng(1).permutation(index.good)
    for view in numbers:
        parts = [order[at : at + 64] for at in range(0, len(order), 64)]
        plan = [(part, drawing.of(index.records[part], 3, view, CIFAR)) for part in parts]
        batches = list(loader.batches(plan, digests=True))
        seen = np.concatenate([batch.rows for batch in batches])
        assert len(batches) == len(plan)
        np.testing.assert_array_equal(seen, [row for row in order if row not in loader.skipped])
        digests = np.concatenate([batch.digests for batch in batches])
        out[view] = dict(zip(index.records["key_hash"][seen].tolist(), map(tuple, digests.tolist()), strict=True))
    return out


def test_damage_before_indexing_is_listed_by_key_with_its_cause(bad):
    listed = {line["key"]: line for line in map(json.loads, (bad.path / "quarantine.jsonl").read_text().splitlines())}
    for kind, (_, cause) in BEFORE.items():
        assert listed[key(PLACES[kind])]["cause"] in cause.split("|"), kind
        assert bad.records["status"][row_of(bad, PLACES[kind])] != 0
    assert "label" in listed[key(PLACES["no label"])]["cause"]
    cut = [line for line in listed.values() if line["shard"].endswith(f"{SHARDS}.tar")]
    assert cut and any("ends" in line["cause"] or "truncated" in line["cause"] for line in cut)
    for kind in ODD:
        assert bad.records["status"][row_of(bad, PLACES[kind])] == 0, kind


@pytest.fixture
def harmed(bad, monkeypatch) -> dict[str, int]:
    """Damage after indexing; returns the row of each kind, and repairs what it did to files."""
    rows = {kind: row_of(bad, PLACES[kind]) for kind in AFTER}
    before = {}
    for kind in ("bit flips", "another image"):
        record = bad.records[rows[kind]]
        path, offset, size = Path(bad.shards[record["shard"]]), int(record["offset"]), int(record["size"])
        with path.open("r+b") as file:
            file.seek(offset)
            data = bytearray(before.setdefault((path, offset), file.read(size)))
            if kind == "bit flips":
                data[size * 3 // 4] ^= 0x10  # in the middle of the scan, where it decodes to other pixels
            else:
                other = jpeg(np.random.default_rng(99), 40, 36)
                data[: len(other)] = other[:size]
            file.seek(offset)
            file.write(data)
    pread, failing = os.pread, int(bad.records["offset"][rows["read error"]])

    def broken_disk(descriptor, size, offset):
        if offset == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(descriptor, size, offset)

    read = Index.read
    monkeypatch.setattr(os, "pread", broken_disk)
    monkeypatch.setattr(
        Index, "read", lambda index, row: read(index, row)[: None if row != rows["undecodable"] else 200]
    )
    yield rows
    for (path, offset), data in before.items():
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(data)


@pytest.fixture(scope="module")
def expected(clean) -> dict[int, dict[int, tuple]]:
    return run(Loader(clean, CIFAR, threads=2))


def test_damage_after_indexing_is_skipped_alike_in_every_view(expected, bad, harmed, capfd):
    """Every bad key is named with shard and byte; what is left equals a clean run, in the order of the plan."""
    loader = Loader(bad, CIFAR, threads=2, max_bad=0.01)
    got, skipped = run(loader), loader.skipped
    assert set(skipped.causes) == set(harmed.values())
    words = {
        "bit flips": "changed since it was indexed",
        "another image": "changed since it was indexed",
        "read error": "Input/output error",
        "undecodable": "cannot be decoded",
    }
    for kind, row in harmed.items():
        cause, record = skipped.causes[row], bad.records[row]
        assert key(PLACES[kind]) in cause and words[kind] in cause
        assert f"byte {record['offset']}" in cause and bad.shards[record["shard"]] in cause
    err = capfd.readouterr().err
    assert err.count("skipped: ") == len(harmed), err

    unusable = {int(bad.records["key_hash"][row]) for row in harmed.values()}
    good = {int(h) for h in bad.records["key_hash"][bad.good]} - unusable
    assert len(good) > 1500
    for view in (0, 1):
        assert got[view].keys() == good
        assert all(got[view][h] == expected[view][h] for h in good)


def test_beyond_max_bad_the_run_ends_with_one_line(bad, harmed):
    line = "too many samples cannot be read; found 3, the last: cannot [^;]*, expected at most 2 [^;]*; fix: [^;]*"
    with pytest.raises(UserError, match=f"^{line}$"):
        run(Loader(bad, CIFAR, threads=2, max_bad=2 / len(bad.good)))


def test_a_batch_of_which_nothing_is_left_is_empty(bad, harmed):
    rows = np.array([[harmed["read error"]], [harmed["undecodable"]], [int(bad.good[0])]])
    plan = [(part, drawing.of(bad.records[part], 3, 0, CIFAR)) for part in rows]
    batches = list(Loader(bad, CIFAR, threads=1, max_bad=0.01).batches(plan))
    assert [len(batch.rows) for batch in batches] == [0, 0, 1]


@pytest.mark.slow
def test_memory_does_not_grow(clean):
    """10,000 batches: at most 1 MB more per 1,000, by least squares after the first 1,000."""

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def plan():
        for number in range(10_000):
            rows = np.random.default_rng(number).choice(clean.good, 16)
            yield rows, drawing.of(clean.records[rows], 3, number, CIFAR)

    held = [resident() for _ in Loader(clean, CIFAR, threads=2).batches(plan(), digests=True)][1000:]
    assert len(held) == 9000
    slope, _ = np.polyfit(np.arange(len(held)) / 1000, held, 1)
    print(f"{slope:.3f} MB per 1,000 batches, {held[0]:.0f} to {held[-1]:.0f} MB")
    assert slope <= 1.0


def test_teacher_and_student_go_on_without_what_they_cannot_read(digits, teacher, tmp_path, monkeypatch):
    """A sample that the teacher skipped has no labels and teaches nothing; the rest of the store is as ever."""
    index = Index.open(digits)
    lost = int(index.good[3])
    failing = int(index.records["offset"][lost])
    pread = os.pread

    def broken_disk(descriptor, size, offset):
        if offset == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(descriptor, size, offset)

    config = PrecomputeTeacher(
        data=digits, teacher=teacher, store=tmp_path / "whole.zarr", views=1, policy=POLICY, block_rows=64, device="cpu"
    )
    precompute.run(config)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", broken_disk)
        with pytest.raises(UserError, match="too many samples cannot be read"):
            precompute.run(dataclasses.replace(config, store=tmp_path / "none.zarr"))
        precompute.run(dataclasses.replace(config, store=tmp_path / "s.zarr", max_bad=0.01))
    whole, plane = cache.open(tmp_path / "whole.zarr").load_plane(0), cache.open(tmp_path / "s.zarr").load_plane(0)
    assert np.flatnonzero(np.isnan(plane.weight)).tolist() == [lost]
    others = np.arange(len(index)) != lost
    for name in ("weight", "digest"):
        np.testing.assert_array_equal(getattr(plane, name)[others], getattr(whole, name)[others])

    student = TrainStudent(
        data=digits, store=tmp_path / "s.zarr", student="cifar/resnet8", out=tmp_path / "run", epochs=1, batch_size=16
    )
    record = train_student.run(dataclasses.replace(student, device="cpu"))
    assert np.isfinite(record["loss"])
    monkeypatch.setattr(os, "pread", broken_disk)
    record = train_student.run(dataclasses.replace(student, device="cpu", out=tmp_path / "broken", max_bad=0.01))
    assert np.isfinite(record["loss"])
