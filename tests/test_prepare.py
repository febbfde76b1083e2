import gc
import gzip
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import tarfile
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from images import cifar, encode, jpeg, pixels, png, png_claiming, tar
from PIL import Image, PngImagePlugin
from webdataset import tariterators

from cache.errors import UserError
from pipeline import prepare, sources
from pipeline.config import Prepare
from pipeline.index import MAX_SIDE, Index, key_hash
from pipeline.synthetic import synthetic

ROOT = Path(__file__).parents[1]
RNG = np.random.default_rng(0)
SMALL = jpeg(RNG, 24, 17)


def samples(count: int, prefix: str = "k", image: bytes = SMALL) -> list[tuple[str, bytes]]:
    return [
        member for i in range(count) for member in ((f"{prefix}{i}.jpg", image), (f"{prefix}{i}.cls", b"%d" % (i % 3)))
    ]


def quarantine(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def refuse(source: str, out: Path, *words: str, **options) -> None:
    """The source ends in one line that holds all `words`, and nothing is left beside it."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as caught:
        prepare.build(source, out, **options)
    message = str(caught.value)
    assert "\n" not in message and "fix: " in message
    assert all(word in message for word in words), message
    assert sorted(out.parent.iterdir()) == before


def test_every_kind_of_image_is_indexed_with_its_own_size_bytes_and_label(tmp_path):
    """Sizes as stored, before any EXIF rotation; the reference is tarfile and Pillow's full decode."""
    rotated = Image.Exif()
    rotated[0x0112] = 6
    deep = Image.fromarray(RNG.integers(0, 1 << 16, (9, 5), dtype=np.uint16))
    images = {
        "rgb.jpg": jpeg(RNG, 61, 40),
        "gray.JPEG": jpeg(RNG, 33, 20, "L"),
        "cmyk.jpeg": jpeg(RNG, 20, 33, "CMYK"),
        "progressive.jpg": jpeg(RNG, 50, 60, progressive=True),
        "exif.jpg": jpeg(RNG, 30, 20, exif=rotated),
        "trailing.jpg": jpeg(RNG, 16, 16) + b"camera maker's notes",
        "really_png.jpg": png(RNG, 12, 8),
        "one.png": png(RNG, 1, 1),
        "alpha.png": png(RNG, 10, 20, "RGBA"),
        "gray_alpha.png": png(RNG, 11, 7, "LA"),
        "palette.png": encode(pixels(RNG, 9, 9).convert("P"), "PNG"),
        "bits.png": encode(pixels(RNG, 9, 8).convert("1"), "PNG"),
        "deep.png": encode(deep, "PNG"),
        "animated.png": encode(
            pixels(RNG, 8, 6), "PNG", save_all=True, append_images=[pixels(RNG, 8, 6), pixels(RNG, 8, 6)]
        ),
    }
    members = []
    for label, (name, data) in enumerate(images.items()):
        members += [(name, data), (f"{name.split('.')[0]}.cls", b"%d\n" % label)]
    tar(tmp_path / "a.tar", members[:10])
    tar(tmp_path / "b.tar", members[10:])
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")}

    summary = prepare.build(f"webdataset:{tmp_path}/*.tar", tmp_path / "out", threads=2)
    data = Index.open(tmp_path / "out")
    assert quarantine(tmp_path / "out") == [] and summary["good"] == len(data) == len(images)
    assert data.classes == summary["classes"] == len(images) and data.class_names is None
    for row, (name, image) in enumerate(images.items()):
        record = data.records[row]
        opened = Image.open(io.BytesIO(image))
        opened.load()
        assert data.read(row) == image and data.key(row) == name.split(".")[0]
        assert (record["width"], record["height"]) == opened.size
        assert record["label"] == row and record["crc"] == zlib.crc32(image) and record["status"] == 0
        assert record["key_hash"] == key_hash(name.split(".")[0])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "dataset.json",
        "index.npy",
        "quarantine.jsonl",
    ]
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")} == before


WHOLE_PNG = png(RNG, 60, 40)
WHOLE_JPEG = jpeg(RNG, 200, 150)
TEXT = PngImagePlugin.PngInfo()
TEXT.add_text("comment", "IEND\xae\x42\x60\x82")
BAD_IMAGES = {
    "zero bytes": (b"", "empty file"),
    "text": (b"not an image", "not a JPEG or PNG image"),
    "gif": (encode(pixels(RNG, 5, 5), "GIF"), "not a JPEG or PNG image"),
    "half": (WHOLE_JPEG[: len(WHOLE_JPEG) // 2], "truncated"),
    "no end": (WHOLE_JPEG[:-2], "truncated"),
    "header": (WHOLE_JPEG[:20], "damaged"),
    "half a progressive": (jpeg(RNG, 200, 150, progressive=True)[:3000], "truncated"),
    "half a png": (WHOLE_PNG[: len(WHOLE_PNG) // 2], "truncated"),
    "png without its end": (WHOLE_PNG[:-12], "truncated"),
    "png with an end that is none": (png(RNG, 5, 5, pnginfo=TEXT)[:-12], "refused by DALI"),
    "png with a flipped byte": (WHOLE_PNG[:200] + bytes([WHOLE_PNG[200] ^ 255]) + WHOLE_PNG[201:], "damaged"),
    "bomb": (png_claiming(60_000, 60_000), f"over {Image.MAX_IMAGE_PIXELS} pixels"),
    "small bomb": (png_claiming(10_000, 10_000), f"over {Image.MAX_IMAGE_PIXELS} pixels"),
    "long": (png_claiming(MAX_SIDE + 1, 1), f"a side over {MAX_SIDE} pixels"),
}


@pytest.mark.filterwarnings("ignore")  # as outside of pytest: Pillow only warns of the smaller bomb
def test_each_damaged_image_is_quarantined_by_key_with_its_cause_and_keeps_its_row(tmp_path):
    members, expected = [], {}
    for i, (name, (image, cause)) in enumerate(BAD_IMAGES.items()):
        members += [*samples(2, f"good{i}_"), (f"bad/{name}.jpg", image), (f"bad/{name}.cls", b"1")]
        expected[f"bad/{name}"] = (cause, image)
    offsets = {member.name: member.offset_data for member in tar(tmp_path / "a.tar", members)}
    summary = prepare.build(f"webdataset:{tmp_path}/a.tar", tmp_path / "out", threads=2)
    lines = quarantine(tmp_path / "out")
    assert {line["key"]: line["cause"] for line in lines} == {key: cause for key, (cause, _) in expected.items()}
    assert all(line["shard"] == str(tmp_path / "a.tar") for line in lines)
    assert all(line["offset"] == offsets[line["key"] + ".jpg"] for line in lines)
    assert summary["quarantined"] == len(lines) and summary["samples"] == len(lines) * 3
    assert summary["causes"] == Counter(cause for cause, _ in expected.values())
    data = Index.open(tmp_path / "out")
    for row in range(len(data)):
        record, key = data.records[row], data.key(row)
        if key in expected:
            assert (record["status"], record["height"], record["width"]) == (1, 0, 0)
            assert record["crc"] == zlib.crc32(expected[key][1]) and data.read(row) == expected[key][1]
        else:
            assert (record["status"], record["height"], record["width"]) == (0, 17, 24)
    assert data.good.tolist() == [row for row in range(len(data)) if not data.key(row).startswith("bad")]


@pytest.mark.parametrize("make", [jpeg, png])
def test_an_image_cut_at_any_byte_is_found_without_noise(tmp_path, capfd, make):
    """Every cut of a small image; DALI would print a line for each that reached it, Pillow one on the odd EXIF."""
    odd = jpeg(RNG, 24, 17, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x01")
    image = make(RNG, 9, 9)
    cuts = [(f"cut{i:04d}", image[:i]) for i in range(len(image))]
    tar(
        tmp_path / "a.tar",
        [member for key, data in cuts for member in ((f"{key}.jpg", data), (f"{key}.cls", b"0"))]
        + samples(len(image) + 1, image=odd),
    )
    prepare.build(f"webdataset:{tmp_path}/a.tar", tmp_path / "out", threads=2)
    assert [line["key"] for line in quarantine(tmp_path / "out")] == [key for key, _ in cuts]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("label", "cause"),
    [
        (None, "no label"),
        (("cls", b""), "label is not an integer"),
        (("cls", b"cat"), "label is not an integer"),
        (("cls", b"1.0"), "label is not an integer"),
        (("cls", b"1_0"), "label is not an integer"),
        (("cls", b"9" * 4000), "label is not an integer"),
        (("cls", b"-1"), "label outside [0, 3)"),
        (("json", b'{"label": true}'), "label is not an integer"),
        (("json", b'{"label": 2.0}'), "label is not an integer"),
        (("json", b'{"cls": 99999999999}'), "label is not an integer"),
        (("json", b"{"), "label is not an integer"),
        (("json", b"[" * 100_000), "label is not an integer"),
        (("json", b'{"caption": "cat"}'), "no label"),
        (("json", b"[1]"), "no label"),
        (("json", b'{"label": -5}'), "label outside [0, 3)"),
    ],
)
def test_a_sample_without_a_usable_label_is_quarantined(tmp_path, label, cause):
    odd = [("odd.jpg", SMALL)] + ([(f"odd.{label[0]}", label[1])] if label else [])
    tar(tmp_path / "a.tar", odd + samples(3))
    prepare.build(f"webdataset:{tmp_path}/a.tar", tmp_path / "out", threads=1)
    assert [(line["key"], line["cause"]) for line in quarantine(tmp_path / "out")] == [("odd", cause)]
    data = Index.open(tmp_path / "out")
    assert data.classes == 3 and data.good.tolist() == [1, 2, 3]


def test_the_command_prints_one_summary_with_counts_and_causes(tmp_path, capsys):
    tar(tmp_path / "a.tar", [("odd.jpg", b""), ("odd.cls", b"1"), *samples(3)])
    prepare.run(Prepare(source=f"webdataset:{tmp_path}/a.tar", out=tmp_path / "out"))
    out, err = capsys.readouterr()
    assert "samples" in out and "empty file: 1" in out and err == ""


def test_a_sample_without_an_image_keeps_its_row(tmp_path):
    tar(tmp_path / "a.tar", [("odd.txt", b"words"), ("odd.cls", b"1"), *samples(3)])
    prepare.build(f"webdataset:{tmp_path}/a.tar", tmp_path / "out", threads=1)
    assert [(line["key"], line["cause"]) for line in quarantine(tmp_path / "out")] == [("odd", "no image")]
    data = Index.open(tmp_path / "out")
    assert data.key(0) == "odd" and data.read(0) == b"" and data.good.tolist() == [1, 2, 3]


def test_labels_outside_given_classes_are_quarantined_and_a_wrong_count_is_an_error(tmp_path):
    tar(tmp_path / "a.tar", samples(9))
    summary = prepare.build(f"webdataset:{tmp_path}/a.tar", tmp_path / "out", classes=2, threads=1)
    assert summary["causes"] == {"label outside [0, 2)": 3} and summary["classes"] == 2
    refuse(
        f"webdataset:{tmp_path}/a.tar", tmp_path / "more",
        "most of", "found 3 good and 6 bad samples, most often: label outside [0, 1) (6)", classes=1,
    )  # fmt: skip
    tar(tmp_path / "b.tar", [*samples(9), ("x.jpg", SMALL), ("x.cls", b"999999999")])
    refuse(f"webdataset:{tmp_path}/b.tar", tmp_path / "more", "found 999999999", "--classes")


NAMES = st.sampled_from(["a", "b", "dir/a", "dir.v2/a", "c d", "é"])
EXTENSIONS = st.sampled_from(["jpg", "JPEG", "png", "cls", "json", "txt", "seg.png"])


@given(st.lists(st.tuples(NAMES, EXTENSIONS), unique=True, max_size=16), st.booleans())
@settings(deadline=None, max_examples=80)
def test_members_group_by_key_in_any_order(tmp_path_factory, names, meta):
    """Against a plain dictionary filled by webdataset's own rule for keys."""
    path = tmp_path_factory.getbasetemp() / "grouped.tar"
    content = {"cls": b" 7\n", "json": b'{"label": 8}'}
    members = [(f"{key}.{extension}", content.get(extension, b"x")) for key, extension in names]
    found = tar(path, ([("__meta__/notes.txt", b"")] if meta else []) + members)
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in found[meta:]:
        key, extension = tariterators.base_plus_ext(member.name)
        assert extension.lower() not in groups.setdefault(key, {})
        groups[key][extension.lower()] = member
    scan = sources.scan(path)
    assert scan.keys == list(groups) and scan.cut is None
    for (key, group), record, cause in zip(groups.items(), scan.records, scan.causes, strict=True):
        image = group.get("jpg") or group.get("jpeg") or group.get("png")
        label = 7 if "cls" in group else 8 if "json" in group else None
        assert record["key_hash"] == key_hash(key)
        if image and label:
            assert cause is None and record["label"] == label
            assert (record["offset"], record["size"]) == (image.offset_data, image.size)
        else:
            assert cause == ("no label" if image else "no image")


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
    scan = sources.scan(path)
    complete = [m.name for m in members if m.offset_data + m.size <= cut]
    pairs = len(complete) // 2  # the label follows its image
    assert scan.keys == [f"k{i}" for i in range(pairs)] and scan.causes == [None] * pairs
    end = members[-1].offset_data + 512
    if cut >= end + 512:
        assert scan.cut is None
    else:
        assert scan.cut == ("tar ends early" if complete or cut == 0 else "not an uncompressed tar")
        assert scan.end <= end


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
        scan = sources.scan(path)
    except UserError as error:
        assert "duplicate key" in str(error)
    else:
        assert (scan.records["offset"] + scan.records["size"] <= len(damaged)).all()


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
    refuse(f"webdataset:{tmp_path}/c.tar", tmp_path / "more", "nothing in", "not an uncompressed tar (1)")


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
    monkeypatch.setattr("pipeline.index.key_hash", lambda key: len(key))
    tar(tmp_path / "a.tar", [("one.jpg", SMALL), ("one.cls", b"0"), ("two.jpg", SMALL), ("two.cls", b"0")])
    refuse(f"webdataset:{tmp_path}/a.tar", tmp_path / "out", "same 64-bit hash", "'one' in", "'two' in")


def test_unusable_sources_and_flags_are_errors(tmp_path):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.tar").mkdir()
    for source in ("", "imagenet:/x", "imagefolder:", "webdataset:", "digits:1", "synthetic:0", "synthetic:many"):
        refuse(source, out, "unknown source", "imagefolder:PATH")
    refuse(f"webdataset:{tmp_path}/none-*.tar", out, "no shard matches")
    refuse(f"webdataset:{tmp_path}/folder.tar", out, "cannot read shard", "Is a directory")
    refuse(f"imagefolder:{tmp_path}/none", out, "cannot read", "give a folder of folders")
    refuse(f"imagefolder:{tmp_path}/empty", out, "no images in")
    refuse(f"cifar10:{tmp_path}/none", out, "cannot read", "cifar-10-batches-py")
    refuse(f"cifar100:{tmp_path}/empty", out, "cannot read", "cifar-100-python")
    refuse("digits", out, "classes of its own", "found --classes 3, expected 10", classes=3)
    refuse("synthetic:5", out, "--classes out of range", classes=0)
    refuse("synthetic:5", out, "--shard-size out of range", shard_size=0)
    refuse("synthetic:5", out, "--seed out of range", seed=-1)


def test_an_output_that_exists_is_left_alone(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("empty", "link"):
        refuse("synthetic:5", tmp_path / name, "exists", name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image folder with names that WebDataset's rule for keys would tear or drop."""
    root = tmp_path_factory.mktemp("images")
    names = ["cat/1.jpg", "cat/1.png", "cat/a.b.v2.JPEG", "dog/deep.er/x%.jpg", "dog/x.jpg", "ant/a\nb.c/ü.jpg"]
    names.append(os.fsdecode(b"dog/latin-\xfc.jpg"))
    for number, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        make = png if file.suffix == ".png" else jpeg
        file.write_bytes(make(np.random.default_rng(number), 20 + number, 10))
    for ignored in ("cat/.hidden.jpg", "cat/notes.txt", "top.jpg"):
        (root / ignored).write_bytes(b"")
    (root / ".git").mkdir()
    (root / "void").mkdir()
    return root, names


def test_an_image_folder_becomes_shards_that_webdataset_reads(folder, tmp_path):
    root, names = folder
    summary = prepare.build(f"imagefolder:{root}", tmp_path / "out", shard_size=4, threads=1)
    data = Index.open(tmp_path / "out")
    assert summary["shards"] == 2 and data.class_names == ["ant", "cat", "dog", "void"]
    read = []
    for shard in data.shards:
        with open(shard, "rb") as file:
            members = ({**member, "__url__": ""} for member in tariterators.tar_file_iterator(file))
            read += tariterators.group_by_keys(members)
    assert len(read) == len(data) == len(names)
    for row, sample in enumerate(read):
        image = next(sample[extension] for extension in ("jpg", "jpeg", "png") if extension in sample)
        assert data.key(row) == sample["__key__"] and data.read(row) == image
        assert int(sample["cls"]) == data.records["label"][row]
    origin = {(root / name).read_bytes(): name for name in names}
    for row in range(len(data)):
        name = origin.pop(data.read(row))
        assert data.class_names[data.records["label"][row]] == name.split("/")[0]
        assert data.key(row).startswith(name.split("/")[0] + "/")
    assert not origin


def test_the_same_source_makes_the_same_bytes_and_another_seed_another_order(folder, tmp_path):
    def content(name: str, **options) -> dict[str, bytes]:
        prepare.build(f"imagefolder:{folder[0]}", tmp_path / name, threads=1, **options)
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    assert content("a") == content("b")
    assert content("c", seed=1)["index.npy"] != content("d")["index.npy"]


def test_indexing_our_own_shards_gives_the_same_identity(folder, tmp_path):
    prepare.build(f"imagefolder:{folder[0]}", tmp_path / "a", threads=1)
    prepare.build(f"webdataset:{tmp_path}/a/*.tar", tmp_path / "b", classes=4, threads=1)
    assert Index.open(tmp_path / "a").fingerprint == Index.open(tmp_path / "b").fingerprint


def test_a_folder_name_that_webdataset_skips_is_an_error_not_a_loss(tmp_path):
    for name in ("__x__", "y"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "1.jpg").write_bytes(SMALL)
    refuse(f"imagefolder:{tmp_path}/images", tmp_path / "out", "WebDataset skips", "1 of 2 samples")


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
        assert data.class_names == [f"class {i}" for i in range(classes)]
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


def test_synthetic_images_are_like_imagenets_and_a_function_of_seed_and_number():
    """Mean size within 15 % of ImageNet's 110 KB (sd 45 KB, so 2.5 standard errors at n = 48)."""
    made = list(synthetic(48, 1000, 0, 2).samples)
    assert [sample.label for sample in made] == list(range(48))
    assert np.mean([len(sample.image) for sample in made]) == pytest.approx(110e3, rel=0.15)
    sizes = Counter(Image.open(io.BytesIO(sample.image)).size for sample in made)
    assert sizes.most_common(1)[0][0] == (500, 375) and len(sizes) >= 3
    assert len({sample.image for sample in made}) == 48
    assert made[:9] == list(synthetic(9, 1000, 0, 1).samples)
    assert made[0].image != next(synthetic(1, 1000, 1, 1).samples).image


def test_synthetic_classes_can_be_told_apart():
    """Nearest class mean of the mean colour, 10 classes: far above the 10 % of chance, and not trivial."""
    made = list(synthetic(120, 10, 0, 2).samples)
    colour = np.array([np.asarray(Image.open(io.BytesIO(s.image)).resize((1, 1))).ravel() for s in made], float)
    label = np.array([sample.label for sample in made])
    means = np.array([colour[:60][label[:60] == c].mean(0) for c in range(10)])
    nearest = ((colour[60:, None] - means) ** 2).sum(2).argmin(1)
    assert (nearest == label[60:]).mean() > 0.4


KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline import index, prepare
def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
moment, images, out = sys.argv[1:]
if moment == "check":
    prepare._decoder = kill
elif moment == "half an index":
    index.json.dumps = kill
else:
    os.rename = kill
prepare.build(f"imagefolder:{images}", Path(out), threads=1)
"""


@pytest.mark.parametrize("moment", ["check", "half an index", "rename"])
def test_a_killed_run_leaves_no_output_and_the_next_one_starts_afresh(folder, tmp_path, moment):
    killed = subprocess.run([sys.executable, "-c", KILLED, moment, folder[0], tmp_path / "out"], cwd=ROOT)
    assert killed.returncode == -9
    (leftover,) = tmp_path.iterdir()
    assert leftover.name == ".out.partial" and (leftover / "shard-000000.tar").exists()
    (leftover / "stale.tar").touch()
    prepare.build(f"imagefolder:{folder[0]}", tmp_path / "out", threads=1)
    prepare.build(f"imagefolder:{folder[0]}", tmp_path / "fresh", threads=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "out"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "fresh").iterdir()
    }


@pytest.mark.parametrize("limit", [30_000, 200])
def test_a_write_that_fails_is_one_line_and_leaves_nothing(tmp_path, limit):
    """A limit on file sizes stands for the full disk: in a shard, and in the index of existing shards."""
    tar(tmp_path / "a.tar", samples(30))
    source = "synthetic:5" if limit == 30_000 else f"webdataset:{tmp_path}/a.tar"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        refuse(source, tmp_path / "out", "cannot build", "File too large", "free disk space", threads=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its file to the collector
            gc.collect()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch):
    for module in ("sklearn.datasets", "nvidia.dali"):
        monkeypatch.setitem(sys.modules, module, None)
    refuse("digits", tmp_path / "out", "scikit-learn", "'.[demo]'")
    refuse("synthetic:5", tmp_path / "out", "scikit-learn", "'.[demo]'")
    tar(tmp_path / "a.tar", samples(3))
    refuse(f"webdataset:{tmp_path}/a.tar", tmp_path / "out", "DALI is not installed", "cuda13")
