"""Sources are read for what they hold, safely, and damage in them is found."""

import gzip
import io
import os
import pickle
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.images import cifar, tar
from support.prepared import SMALL, quarantine, refuse, samples
from webdataset import tariterators

from cache.errors import UserError
from pipeline.data import prepare
from pipeline.data.classes import Classes
from pipeline.data.index import Index, key_hash
from pipeline.data.ledger import Ledger
from pipeline.data.sources import tars
from pipeline.data.sources.base import Options, Sample
from pipeline.data.sources.synthetic import synthetic

NAMES = st.sampled_from(["a", "b", "dir/a", "dir.v2/a", "c d", "é"])
DOTTED = "a dot in the name: its extension is seg.png"
EXTENSIONS = st.sampled_from(["jpg", "JPEG", "png", "cls", "json", "txt", "seg.png"])


def scan(path: Path, ledger: Ledger | None = None) -> tars.Scan:
    with open(path, "rb") as file:
        return tars.scan(file, str(path), ledger or Ledger())


@given(st.lists(st.tuples(NAMES, EXTENSIONS), unique=True, max_size=16), st.booleans())
@settings(deadline=None, max_examples=80)
def test_members_group_by_key_in_any_order(tmp_path_factory, names, meta):
    """Against a plain dictionary filled by webdataset's own rule for keys."""
    path = tmp_path_factory.getbasetemp() / "grouped.tar"
    content = {"cls": b" 7\n", "json": b'{"label": 8}'}
    members = [(f"{key}.{extension}", content.get(extension, b"x")) for key, extension in names]
    lying = tar(path, ([("__meta__/notes.txt", b"")] if meta else []) + members)
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in lying[meta:]:
        key, extension = tariterators.base_plus_ext(member.name)
        assert extension.lower() not in groups.setdefault(key, {})
        groups[key][extension.lower()] = member
    found = scan(path)
    assert found.keys == list(groups) and found.cut is None
    for (key, group), record, flaw in zip(groups.items(), found.records, found.flaws, strict=True):
        image = group.get("jpg") or group.get("jpeg") or group.get("png")
        label = 7 if "cls" in group else 8 if "json" in group else None
        assert record["key_hash"] == key_hash(key)
        if image and label:
            assert flaw is None and record["label"] == label
            assert (record["offset"], record["size"]) == (image.offset_data, image.size)
        else:
            assert flaw and flaw.cause == ("no label" if image else DOTTED if "seg.png" in group else "no image")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "a.tar"
    return path.parent / "damaged.tar", tar(path, samples(4)), path.read_bytes()


@given(st.data())
@settings(deadline=None, max_examples=120)
def test_of_a_tar_cut_anywhere_the_samples_before_the_cut_are_kept(whole, data):
    path, members, content = whole
    cut = data.draw(
        st.integers(0, members[-1].offset_data + members[-1].size + 1500).filter(lambda n: n < len(content))
    )
    path.write_bytes(content[:cut])
    found = scan(path)
    complete = [m.name for m in members if m.offset_data + m.size <= cut]
    pairs = len(complete) // 2  # the label follows its image
    assert found.keys == [f"k{i}" for i in range(pairs)] and found.flaws == [None] * pairs
    end = members[-1].offset_data + 512
    if cut >= end + 512:
        assert found.cut is None
    else:
        assert found.cut == ("tar ends early" if complete or cut == 0 else "not an uncompressed tar")
        assert found.end <= end


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_no_damage_to_a_tar_escapes_as_another_exception(whole, data):
    path, _, content = whole
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        patch = data.draw(st.binary(min_size=1, max_size=12))
        damaged[at : at + len(patch)] = patch
    path.write_bytes(damaged)
    try:
        found = scan(path)
    except UserError as error:
        assert "duplicate key" in str(error)
    else:
        assert (found.records["offset"] + found.records["size"] <= len(damaged)).all()


def test_damaged_tars_cost_a_line_each_and_nothing_else(tmp_path):
    """One cut in its third image, one that is no tar, one compressed, one empty; the whole one stands."""
    tar(tmp_path / "a.tar", samples(8, "a"))
    cut = tar(tmp_path / "b.tar", samples(4, "b"))[4].offset_data + 100
    os.truncate(tmp_path / "b.tar", cut)
    (tmp_path / "c.tar").write_bytes(b"no tar " * 500)
    (tmp_path / "d.tar").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    (tmp_path / "e.tar").touch()
    summary = prepare.build(f"webdataset:{tmp_path}/*.tar", tmp_path / "out", threads=1)
    assert summary["causes"] == {"tar ends early": 2, "not an uncompressed tar": 2}
    assert [(line["key"], line["shard"][-5:], line["cause"]) for line in quarantine(tmp_path / "out")] == [
        (None, "b.tar", "tar ends early"),
        (None, "c.tar", "not an uncompressed tar"),
        (None, "d.tar", "not an uncompressed tar"),
        (None, "e.tar", "tar ends early"),
    ]
    data = Index.open(tmp_path / "out")
    assert [data.key(row) for row in data.good] == [f"a{i}" for i in range(8)] + ["b0", "b1"]
    refuse(f"webdataset:{tmp_path}/c.tar", tmp_path / "more", "nothing in", "not an uncompressed tar (1)", "unpack it")


def test_duplicate_keys_are_an_error_that_names_key_and_shards(tmp_path):
    tar(tmp_path / "a.tar", samples(3))
    tar(tmp_path / "c.tar", [("k2.jpg", SMALL), ("k2.cls", b"0")])
    refuse(
        f"webdataset:{tmp_path}/[ac].tar", tmp_path / "out",
        "duplicate key 'k2'", f"in {tmp_path}/a.tar and in {tmp_path}/c.tar",
    )  # fmt: skip
    tar(tmp_path / "d.tar", [("x.jpg", SMALL), ("x.jpg", SMALL), ("x.cls", b"0")])
    refuse(f"webdataset:{tmp_path}/d.tar", tmp_path / "out", "duplicate key 'x'", f"{tmp_path}/d.tar")


def test_two_keys_with_one_hash_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.data.index.key_hash", lambda key: len(key))
    tar(tmp_path / "a.tar", [("one.jpg", SMALL), ("one.cls", b"0"), ("two.jpg", SMALL), ("two.cls", b"0")])
    refuse(f"webdataset:{tmp_path}/a.tar", tmp_path / "out", "same 64-bit hash", "'one' in", "'two' in")


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("form", ["folder", "parent", "tar.gz"])
def test_cifar_pixels_and_labels_survive_unchanged(tmp_path, classes, form):
    path, truth = cifar(tmp_path / "in", classes)
    source = {"folder": path, "parent": path.parent, "tar.gz": tmp_path / "cifar.tar.gz"}[form]
    if form == "tar.gz":
        with tarfile.open(source, "w:gz") as archive:
            archive.add(path, path.name)
    summary = prepare.build(f"cifar{classes}:{source}", tmp_path / "out", threads=1)
    total = sum(len(batch) for batch in truth.values())
    assert summary["splits"] == {"train": total - 7, "val": 7} and summary["samples"] == total
    seen = 0
    for split in ("train", "val"):
        data = Index.open(tmp_path / "out", split=split)
        assert data.class_list == Classes(classes, tuple(f"class {i}" for i in range(classes)), "source")
        for row in range(len(data)):
            batch, _, number = data.key(row).partition("/")
            assert ("test" in batch) == (split == "val")
            label, image = truth[batch][int(number)]
            assert data.records["label"][row] == label
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(data.read(row)))), image)
            seen += 1
    assert seen == total


class Payload:
    def __init__(self, target: Path):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_cifar_archive_cannot_run_code(tmp_path):
    path, _ = cifar(tmp_path / "in", 10)
    (path / "data_batch_3").write_bytes(pickle.dumps({b"data": Payload(tmp_path / "owned"), b"labels": []}))
    refuse(f"cifar10:{path}", tmp_path / "out", "unsafe pickle", "posix.mkdir")
    assert not (tmp_path / "owned").exists()
    pickle.loads((path / "data_batch_3").read_bytes())
    assert (tmp_path / "owned").exists()  # the payload is a live one


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02.",
        pickle.dumps([1]),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 10]}),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, True]}),
        pickle.dumps({b"data": np.zeros((2, 3071), np.uint8), b"labels": [0, 1]}),
        pickle.dumps({b"data": np.zeros((2, 3072), np.int16), b"labels": [0, 1]}),
        pickle.dumps({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8)}),
    ],
)
def test_a_damaged_cifar_batch_is_named(tmp_path, content):
    path, _ = cifar(tmp_path / "in", 10)
    (path / "data_batch_2").write_bytes(content)
    refuse(f"cifar10:{path}", tmp_path / "out", "damaged CIFAR batch data_batch_2")


def test_a_damaged_cifar_archive_is_an_error(tmp_path):
    path, _ = cifar(tmp_path / "in", 10)
    archive = tmp_path / "cifar.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(path, path.name)
    content = archive.read_bytes()
    archive.write_bytes(content[: len(content) // 2])
    refuse(f"cifar10:{archive}", tmp_path / "out", "cannot read", "cifar.tar.gz")
    archive.write_bytes(content[:5000] + bytes(100) + content[5100:])
    refuse(f"cifar10:{archive}", tmp_path / "out", "fix: ")
    refuse(f"cifar100:{path}", tmp_path / "out", "cannot read")
    (path / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"one"]}))
    refuse(f"cifar10:{path}", tmp_path / "out", "damaged CIFAR batch batches.meta")


def test_digits_are_sklearns_scans_split_80_to_20_by_class(tmp_path):
    from sklearn.datasets import load_digits

    scans = load_digits()
    prepare.build("digits", tmp_path / "out", threads=2)
    rows = []
    for split in ("train", "val"):
        data = Index.open(tmp_path / "out", split=split)
        assert (data.records["height"] == 64).all() and (data.records["width"] == 64).all()
        numbers = [int(data.key(row).removeprefix("digit/")) for row in range(len(data))]
        assert (scans.target[numbers] == data.records["label"]).all()
        share = np.bincount(data.records["label"], minlength=10) / np.bincount(scans.target)
        assert np.abs(share - (0.8 if split == "train" else 0.2)).max() < 0.01
        rows += numbers
        for row in range(0, len(data), 100):
            image = Image.open(io.BytesIO(data.read(row)))
            assert image.mode == "RGB" and image.format == "JPEG"
            # Box-averaging back to 8x8 undoes the enlargement, up to the overshoot of the bicubic kernel.
            small = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX)) * (16 / 255)
            assert np.corrcoef(small.ravel(), scans.images[numbers[row]].ravel())[0, 1] > 0.97
    assert sorted(rows) == list(range(1797))


def generated(count: int, classes: int, seed: int, threads: int) -> list[Sample]:
    return list(synthetic(str(count), Options(seed, threads, classes), Ledger())[""].samples)


def test_synthetic_images_are_like_imagenets_and_a_function_of_seed_and_number():
    """Mean size within 15 % of ImageNet's 110 KB (sd 45 KB, so 2.5 standard errors at n = 48)."""
    made = generated(48, 1000, 0, 2)
    assert [sample.label for sample in made] == list(range(48))
    assert np.mean([len(sample.image) for sample in made]) == pytest.approx(110e3, rel=0.15)
    sizes = Counter(Image.open(io.BytesIO(sample.image)).size for sample in made)
    assert sizes.most_common(1)[0][0] == (500, 375) and len(sizes) >= 3
    assert len({sample.image for sample in made}) == 48
    assert made[:9] == generated(9, 1000, 0, 1)
    assert made[0].image != generated(1, 1000, 1, 1)[0].image


def test_synthetic_classes_can_be_told_apart():
    """Nearest class mean of the mean colour, 10 classes: far above the 10 % of chance, and not trivial."""
    made = generated(120, 10, 0, 2)
    colour = np.array([np.asarray(Image.open(io.BytesIO(s.image)).resize((1, 1))).ravel() for s in made], float)
    label = np.array([sample.label for sample in made])
    means = np.array([colour[:60][label[:60] == c].mean(0) for c in range(10)])
    nearest = ((colour[60:, None] - means) ** 2).sum(2).argmin(1)
    assert (nearest == label[60:]).mean() > 0.4
