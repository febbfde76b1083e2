"""A source becomes shards and an index, whole or not at all; what is damaged is quarantined with its cause."""

import gc
import io
import os
import resource
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from google_crc32c import value as crc32c
from PIL import Image, PngImagePlugin
from support.images import encode, jpeg, pixels, png, png_claiming, tar
from support.prepared import RNG, SMALL, quarantine, refuse, samples
from support.processes import exit_code
from webdataset import tariterators

from pipeline.config import Prepare
from pipeline.data import examine, index, prepare
from pipeline.data.index import Index, key_hash
from pipeline.data.records import MAX_SIDE


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


def test_every_kind_of_image_is_indexed_with_its_own_size_bytes_and_label(tmp_path):
    """Sizes as stored, before any EXIF rotation; the reference is tarfile and Pillow's full decode."""
    rotated = Image.Exif()
    rotated[0x0112] = 6
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
    assert data.classes == summary["classes"] == len(images) and data.class_list.names is None
    for row, (name, image) in enumerate(images.items()):
        record = data.records[row]
        opened = Image.open(io.BytesIO(image))
        opened.load()
        assert data.read(row) == image and data.key(row) == name.split(".")[0]
        assert (record["width"], record["height"]) == opened.size
        assert record["label"] == row and record["crc"] == crc32c(image) and record["status"] == 0
        assert record["key_hash"] == key_hash(name.split(".")[0])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "dataset.json",
        "index.npy",
        "ledger.json",
        "quarantine.jsonl",
    ]
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")} == before


WHOLE_PNG = png(RNG, 60, 40)
WHOLE_JPEG = jpeg(RNG, 200, 150)
TEXT = PngImagePlugin.PngInfo()
TEXT.add_text("comment", "IEND\xae\x42\x60\x82")
BAD_IMAGES = {
    "zero bytes": (b"", "empty file"),
    "text": (b"not an image", "not an image that is read (JPEG, PNG, WEBP, BMP, GIF, TIFF, PPM, AVIF)"),
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
            assert record["crc"] == crc32c(expected[key][1]) and data.read(row) == expected[key][1]
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
    "label",
    [
        ("cls", b"2.0"),
        ("cls", b" +2\n"),
        ("cls", b"\xef\xbb\xbf2"),
        ("json", b'{"label": "2"}'),
        ("json", b'{"label": 2.0, "cls": 0}'),
        ("json", b'\xef\xbb\xbf{"cls": 2}'),
        ("json", b"2"),
    ],
)
def test_a_number_that_is_whole_is_a_label(tmp_path, label):
    tar(tmp_path / "a.tar", [("odd.jpg", SMALL), (f"odd.{label[0]}", label[1]), *samples(3)])
    summary = prepare.build(f"webdataset:{tmp_path}/a.tar", tmp_path / "out", threads=1)
    assert summary["quarantined"] == 0 and Index.open(tmp_path / "out").records["label"].tolist() == [2, 0, 1, 2]


NO_NUMBER = "label is not a whole number"


@pytest.mark.parametrize(
    ("label", "cause", "found"),
    [
        (None, "no label", "members jpg"),
        (("cls", b""), NO_NUMBER, "''"),
        (("cls", b"cat"), NO_NUMBER, "'cat'"),
        (("cls", b"1.5"), NO_NUMBER, "'1.5'"),
        (("cls", b"\xff"), NO_NUMBER, "bytes that are no text"),
        (("txt", b"1"), "no label", "members jpg, txt"),
        (("cls", b"1_0"), NO_NUMBER, "'1_0'"),
        (("cls", b"9" * 4000), NO_NUMBER, "'" + "9" * 39 + "…"),
        (("cls", b"-1"), "label outside [0, 3)", "-1"),
        (("json", b'{"label": true}'), NO_NUMBER, "True"),
        (("json", b'{"label": 2.5}'), NO_NUMBER, "2.5"),
        (("json", b'{"label": NaN}'), NO_NUMBER, "nan"),
        (("json", b'{"label": -Infinity}'), NO_NUMBER, "-inf"),
        (("json", b'{"cls": 99999999999}'), NO_NUMBER, "99999999999"),
        (("json", b"{"), NO_NUMBER, "bytes that are no JSON"),
        (("json", b"[" * 100_000), NO_NUMBER, "bytes that are no JSON"),
        (("json", b'{"caption": "cat", "a": 1}'), "no label in the JSON", "keys a, caption"),
        (("json", b"[1]"), NO_NUMBER, "[1]"),
        (("json", b'{"label": -5}'), "label outside [0, 3)", "-5"),
    ],
)
def test_a_sample_without_a_usable_label_is_quarantined(tmp_path, label, cause, found):
    odd = [("odd.jpg", SMALL)] + ([(f"odd.{label[0]}", label[1])] if label else [])
    tar(tmp_path / "a.tar", odd + samples(3))
    prepare.build(f"webdataset:{tmp_path}/a.tar", tmp_path / "out", threads=1)
    (line,) = quarantine(tmp_path / "out")
    assert (line["key"], line["cause"], line["found"]) == ("odd", cause, found)
    data = Index.open(tmp_path / "out")
    assert data.classes == 3 and data.good.tolist() == [1, 2, 3]
    assert data.records["height"].tolist() == [0, 17, 17, 17] and data.records["width"].tolist() == [0, 24, 24, 24]


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


def test_unusable_sources_and_flags_are_errors(tmp_path):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.tar").mkdir()
    for source in ("", "imagenet:/x", "imagefolder:", "webdataset:", "digits:1", "synthetic:0", "synthetic:many"):
        refuse(source, out, "unknown source", "imagefolder:PATH")
    refuse(f"webdataset:{tmp_path}/none-*.tar", out, "no shard matches")
    refuse(f"webdataset:{tmp_path}/folder.tar", out, "no shard in the folder", "*.tar")
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


def test_an_image_folder_becomes_shards_that_webdataset_reads(folder, tmp_path):
    root, names = folder
    summary = prepare.build(f"imagefolder:{root}", tmp_path / "out", shard_size=4, threads=1)
    data = Index.open(tmp_path / "out")
    assert summary["shards"] == 2 and data.class_list.names == ("ant", "cat", "dog", "void")
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
        assert data.class_list.name(data.records["label"][row]) == name.split("/")[0]
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


def _killed(moment: str, images: Path, out: Path) -> None:
    def kill(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    where, name = {"check": (examine, "decode"), "half an index": (index.json, "dumps"), "rename": (os, "rename")}[
        moment
    ]
    setattr(where, name, kill)
    prepare.build(f"imagefolder:{images}", out, threads=1)


@pytest.mark.parametrize("moment", ["check", "half an index", "rename"])
def test_a_killed_run_leaves_no_output_and_the_next_one_starts_afresh(folder, tmp_path, moment):
    assert exit_code(_killed, moment, folder[0], tmp_path / "out") == -signal.SIGKILL
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
