"""What people bring, each with what is right: CASES names a folder that holds folders/, tars/ and images/."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import command

from pipeline.data.decode import as_rgb, decode
from pipeline.data.index import Index

CASES = os.environ.get("CASES")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CASES, reason="CASES names no folder")]

GOOD = 0
REFUSED = 2
FOLDERS = {
    "other_names": (GOOD, "18 found = 18 used"),
    "split": (REFUSED, "look like splits", "folders/split/train"),
    "loose": (GOOD, "left out: 3 outside class folders: 3 jpg"),
    "formats": (GOOD, "18 found = 18 used + 0 quarantined + 0 left out"),
    "webp_only": (GOOD, "3 found = 3 used", "of one class"),
    "webp_class": (GOOD, "15 found = 15 used"),
    "linked_folder": (GOOD, "24 found = 24 used"),
    "stray_folders": (GOOD, "20 found = 18 used", "1 of 4 classes have no sample: notes", "__MACOSX/._000.jpg"),
    "one_folder": (GOOD, "all samples are of one class"),
    "fifo": (GOOD, "19 found = 18 used", "1 not a regular file: 1 FIFO"),
    "numbers/train": (GOOD, "numbered in lexical order", "1, 10, 2", "1, 2, 10", "--class-order"),
    "odd_files": (GOOD, "27 found = 21 used + 3 quarantined", "empty file", "truncated", "a page", "2 hidden", "1 db"),
}
TARS = {
    "dots.tar": (GOOD, "24 found = 12 used + 12 quarantined", "its extension is v1.0.jpg", "6 images under one key"),
    "joined.tar": (GOOD, "24 found = 24 used"),
    "symlinks.tar": (GOOD, "20 found = 20 used"),
    "hardlinks.tar": (GOOD, "20 found = 20 used"),
    "no_extension.tar": (GOOD, "left out: 3 without a dot in the name"),
    "one_label_255.tar": (GOOD, "252 of 256 classes have no sample"),
    "labels_from_1.tar": (GOOD, "no sample has label 0"),
    "brackets[1].tar": (GOOD, "12 found = 12 used"),
    "image_jpg.tar": (REFUSED, "its extension is image.jpg"),
    "webp.tar": (GOOD, "8 found = 8 used"),
    "crawl/*": (REFUSED, "keys caption, key, url, width", "left out: 1 not a tar"),
    "crawl": (REFUSED, "keys caption, key, url, width"),
    "packed.tar.gz": (REFUSED, "not an uncompressed tar"),
    "cut.tar": (GOOD, "tar ends early", "5 found = 4 used + 1 quarantined"),
    **{f"labels/{name}.tar": (GOOD, "12 found = 12 used") for name in ("cls_float", "cls_plus", "cls_byte_order_mark")},
    **{f"labels/{name}.tar": (GOOD, "12 found = 12 used") for name in ("json_text", "json_float", "json_bare")},
    "labels/cls_names.tar": (REFUSED, "found 'blue'", "--class-order FILE"),
    "labels/txt.tar": (REFUSED, "found members jpg, txt"),
    "labels/index.tar": (REFUSED, "found members jpg, index"),
    "labels/label_cls.tar": (REFUSED, "found members jpg, label.cls"),
    "labels/json_class_id.tar": (REFUSED, "found keys class_id"),
}
IMAGES = {  # what becomes of the sample "odd"
    "grey16.png": "16-bit",
    "claims_9400.jpg": "pixels per byte",
    "claims_60000.jpg": "over 89478485 pixels",
    "rgb16.png": None,
    "cut_with_end.jpg": None,
    "webp_named.jpg": None,
    "arithmetic.jpg": None,
    "cmyk.jpg": None,
    "progressive.jpg": None,
    "one_pixel.png": None,
    "palette.png": None,
}
ADDRESSES = {
    "file:{}/tars/a.tar": (GOOD, "12 found = 12 used"),
    "file://{}/tars/a.tar": (GOOD, "12 found = 12 used"),
    "pipe:cat {}/tars/a.tar": (REFUSED, "an unknown kind of address"),
    "{}/tars/a.tar::{}/tars/b.tar": (REFUSED, "an unknown kind of address"),
    "hf://{}": (REFUSED, "expected hf://datasets/OWNER/NAME/FILES"),
}


def check(capsys, tmp_path: Path, source: str, expected: int, *words: str) -> None:
    code, out, err = command(capsys, "prepare", source, "--out", tmp_path / "out")
    assert code == expected and "Traceback" not in err, (code, out, err)
    assert err.count("\n") == (code == REFUSED), err
    assert all(word in out + err for word in words), (out, err)


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(capsys, tmp_path, case):
    check(capsys, tmp_path, f"imagefolder:{CASES}/folders/{case}", *FOLDERS[case])


@pytest.mark.parametrize("case", TARS)
def test_tars(capsys, tmp_path, case):
    check(capsys, tmp_path, f"webdataset:{CASES}/tars/{case}", *TARS[case])


def test_a_label_beyond_the_classes_is_quarantined(capsys, tmp_path):
    source = f"webdataset:{CASES}/tars/one_label_255.tar"
    code, out, _ = command(capsys, "prepare", source, "--out", tmp_path / "out", "--classes", 3)
    assert code == GOOD and "14 found = 12 used + 2 quarantined" in out and "no sample" not in out


@pytest.mark.parametrize("case", ADDRESSES)
def test_addresses(capsys, tmp_path, case):
    check(capsys, tmp_path, f"webdataset:{case.replace('{}', str(CASES))}", *ADDRESSES[case])


@pytest.mark.parametrize("case", IMAGES)
def test_images(capsys, tmp_path, case):
    check(capsys, tmp_path, f"webdataset:{CASES}/images/{case}.tar", GOOD, IMAGES[case] or "14 found = 14 used")
    data = Index.open(tmp_path / "out")
    if IMAGES[case]:
        assert len(data.good) == 6
        return
    (row,) = (row for row in range(len(data)) if data.key(row) == "odd")
    encoded = data.read(row)
    found = decode(as_rgb(encoded) if data.records["cmyk"][row] else encoded)
    (tmp_path / "odd").write_bytes(encoded)
    if case != "cut_with_end.jpg":
        assert np.array_equal(found, np.asarray(Image.open(tmp_path / "odd").convert("RGB")))
        return
    (line,) = (tmp_path / "out" / "warned.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "odd"


def test_a_val_set_of_other_names_is_refused(capsys, tmp_path):
    for name in ("split/train", "other_names"):
        command(capsys, "prepare", f"imagefolder:{CASES}/folders/{name}", "--out", tmp_path / name)
    options = ("--out", tmp_path / "run", "--policy", f"{CASES}/training/policy.yaml", "--epochs", 1, "--no-jda")
    data = ("--data", tmp_path / "split/train", "--val", tmp_path / "other_names", "--teacher", "cifar/resnet8")
    code, _, err = command(capsys, "train-teacher", *data, *options)
    assert code == REFUSED and "--val has other classes than --data; found 'ant' as class 0, expected 'blue'" in err
    (tmp_path / "map.yaml").write_text("ant: red\nbee: green\ncow: blue\n")
    code, out, err = command(capsys, "train-teacher", *data, *options, "--class-map", tmp_path / "map.yaml")
    assert code == GOOD and "top-1" in out, err
