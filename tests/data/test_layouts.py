"""Layouts that people bring: a flat folder with a list, names that shards repeat, labels in JSON, names or captions."""

import gzip
import io
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.idx_files import NAMES, packed
from support.images import jpeg, tar
from support.prepared import quarantine, refuse

from pipeline.data import prepare
from pipeline.data.index import Index

RNG = np.random.default_rng(0)
IMAGES = [jpeg(RNG, 20 + i, 30) for i in range(6)]
FILES = [f"ILSVRC2012_val_0000000{i + 1}.JPEG" for i in range(6)]
WNIDS = ["n03", "n01", "n02", "n01", "n03", "n02"]  # of each file, in the order of the files


@pytest.fixture
def flat(tmp_path) -> Path:
    (tmp_path / "val").mkdir()
    for name, image in zip(FILES, IMAGES, strict=True):
        (tmp_path / "val" / name).write_bytes(image)
    return tmp_path / "val"


def by_key(folder: Path) -> dict[str, int]:
    data = Index.open(folder)
    return {data.key(row): int(data.records["label"][row]) for row in range(len(data))}


LISTS = {
    "names, one a line": "\n".join(WNIDS),
    "file and name": "\n".join(f"{file} {name}" for file, name in zip(FILES, WNIDS, strict=True)),
    "in any order, with tabs": "\n".join(f"{f}\t{n}" for f, n in reversed([*zip(FILES, WNIDS, strict=True)])),
    "as Kaggle has it": "ImageId,PredictionString\n"
    + "\n".join(f"{f.partition('.')[0]},{n} 1 2 3 4" for f, n in zip(FILES, WNIDS, strict=True)),
    "numbers from 0": "\n".join(f"{f} {int(n[1:]) - 1}" for f, n in zip(FILES, WNIDS, strict=True)),
}


@pytest.mark.parametrize("case", LISTS)
def test_a_flat_folder_takes_its_labels_from_a_list(flat, tmp_path, case):
    (tmp_path / "list.txt").write_text(LISTS[case] + "\n")
    facts = prepare.build(f"imagefolder:{flat}", tmp_path / "out", threads=1, labels=tmp_path / "list.txt")
    expected = {f.partition(".")[0]: int(n[1:]) - 1 for f, n in zip(FILES, WNIDS, strict=True)}
    assert by_key(tmp_path / "out") == expected
    names = None if "numbers" in case else ("n01", "n02", "n03")
    assert Index.open(tmp_path / "out").class_list.names == names
    assert facts["files"]["found"] == facts["files"]["used"] == 6


def test_the_devkits_numbers_are_those_of_a_list_of_names(flat, tmp_path):
    """They count from 1 in an order of their own; taken as they are, every label would be wrong."""
    own_order = ["n03", "n01", "n02"]
    (tmp_path / "truth.txt").write_text("".join(f"{own_order.index(name) + 1}\n" for name in WNIDS))
    options = {"labels": tmp_path / "truth.txt"}
    refuse(f"imagefolder:{flat}", tmp_path / "out", "count from 1", "--class-order FILE", **options)
    (tmp_path / "order.txt").write_text("\n".join(own_order))
    prepare.build(
        f"imagefolder:{flat}", tmp_path / "out", threads=1, class_order=str(tmp_path / "order.txt"), **options
    )
    names = Index.open(tmp_path / "out").class_list.names
    assert names == tuple(own_order)
    found = by_key(tmp_path / "out")
    assert [names[found[file.partition(".")[0]]] for file in FILES] == WNIDS


def test_what_is_wrong_with_a_flat_folder_is_one_line(flat, tmp_path):
    out, listed = tmp_path / "out", tmp_path / "list.txt"
    refuse(f"imagefolder:{flat}", out, "6 images in it, such as ILSVRC2012_val_00000001.JPEG", "--labels FILE")
    for text, words in (
        ("n01\nn02\n", ("2 lines, the first 'n01'", "6 labels")),
        ("\n".join(f"{file} n01" for file in FILES[:4]), ("lacks an image", FILES[4], "1 more")),
        (f"{FILES[0]} n01\n{FILES[0]} n02", ("two labels", "n01 and n02")),
        ("\n".join(f"{file} -1" for file in FILES), ("out of range", "-1 to -1")),
    ):
        listed.write_text(text)
        refuse(f"imagefolder:{flat}", out, *words, labels=listed)
    refuse(f"imagefolder:{flat}", out, "cannot read --labels", labels=tmp_path / "none")
    refuse("digits", out, "--labels means nothing to digits", labels=listed)


def test_names_that_shards_repeat_are_told_apart_by_the_shard(tmp_path):
    """The index is that of tars with the longer names, and a key is found again in the tar."""
    for shard in range(2):
        members = [
            (f"{i}.{e}", IMAGES[3 * shard + i] if e == "jpg" else b"1") for i in range(3) for e in ("jpg", "cls")
        ]
        tar(tmp_path / f"part-{shard}.tar", members)
        tar(tmp_path / f"long-{shard}.tar", [(f"part-{shard}/{name}", data) for name, data in members])
    source, out = f"webdataset:{tmp_path}/part-*.tar", tmp_path / "out"
    refuse(source, out, "duplicate key '0'", "part-0.tar and in", "--key shard/name")
    prepare.build(source, out, threads=1, key="shard/name")
    prepare.build(f"webdataset:{tmp_path}/long-*.tar", tmp_path / "long", threads=1)
    assert Index.open(out).fingerprint == Index.open(tmp_path / "long").fingerprint
    assert list(by_key(out)) == [f"part-{shard}/{i}" for shard in range(2) for i in range(3)]


@pytest.mark.parametrize(("key", "value"), [("class_id", 2), ("meta.label", 2), ("meta.label", "2"), ("a.b", 2)])
def test_a_label_under_any_key_of_a_json(tmp_path, key, value):
    inner = {"class_id": value, "meta": {"label": value}, "a.b": value, "label": "a caption"}
    members = [("a.jpg", IMAGES[0]), ("a.json", json.dumps(inner).encode()), ("b.jpg", IMAGES[1]), ("b.json", b"{}")]
    tar(tmp_path / "a.tar", members)
    prepare.build(f"webdataset:{tmp_path}/a.tar", tmp_path / "out", threads=1, label_key=key)
    assert Index.open(tmp_path / "out").records["label"].tolist() == [2, -1]
    (line,) = quarantine(tmp_path / "out")
    assert (line["key"], line["cause"]) == ("b", f"no {key} in the JSON")


@pytest.mark.parametrize("extension", ["cls", "txt"])
def test_a_list_makes_names_of_texts(tmp_path, extension):
    names = ["red", "blue", "green", "blue"]
    members = [m for i, n in enumerate(names) for m in ((f"{i}.jpg", IMAGES[i]), (f"{i}.{extension}", n.encode()))]
    tar(tmp_path / "a.tar", members)
    (tmp_path / "order.txt").write_text("blue\ngreen\nred\n")
    options = {"class_order": str(tmp_path / "order.txt")}
    prepare.build(f"webdataset:{tmp_path}/a.tar", tmp_path / "out", threads=1, **options)
    assert Index.open(tmp_path / "out").records["label"].tolist() == [2, 0, 1, 0]


def test_shards_of_img2dataset_as_they_lie(tmp_path):
    """An image, its metadata and its caption; tables and statistics beside the tars. A class is a name in either."""
    for shard in range(2):
        members = []
        for i in range(3):
            key, name = f"{shard:05d}{i:04d}", ["cat", "dog"][(shard + i) % 2]
            meta = {"caption": name, "url": "https://h/x.jpg", "key": key, "status": "success", "width": 20}
            members += [(f"{key}.jpg", IMAGES[3 * shard + i]), (f"{key}.json", json.dumps(meta).encode())]
            members += [(f"{key}.txt", name.encode())]
        tar(tmp_path / f"{shard:05d}.tar", members)
        (tmp_path / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")
    refuse(f"webdataset:{tmp_path}", tmp_path / "out", "no label in the JSON", "keys caption, ")
    (tmp_path / "order.txt").write_text("cat\ndog\n")
    for number, options in enumerate(({}, {"label_key": "caption"})):
        out = tmp_path / f"out{number}"
        facts = prepare.build(
            f"webdataset:{tmp_path}", out, threads=1, class_order=str(tmp_path / "order.txt"), **options
        )
        assert Index.open(out).records["label"].tolist() == [0, 1, 0, 1, 0, 1]
        left = facts["files"]["left_out"]
        assert left == {"beside an image and its label": {"txt" if options else "json": 6}}
    assert facts["files"]["found"] == 18


def as_png(images: np.ndarray) -> list[bytes]:
    out = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        out.append(file.getvalue())
    return out


def compared(idx: Path, arrays: dict, tmp_path: Path) -> None:
    """The index of IDX files against tars, and against a folder per class, of the same images as PNG."""
    prepare.build(f"idx:{idx}", tmp_path / "idx")
    for split in ("train", "val"):
        images, labels = as_png(arrays[split, "images"]), arrays[split, "labels"]
        members = []
        for i, image in enumerate(images):
            members += [(f"{split}/{i:08d}.png", image), (f"{split}/{i:08d}.cls", b"%d" % labels[i])]
            folder = tmp_path / "png" / split / str(labels[i])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i}.png").write_bytes(image)
        tar(tmp_path / f"{split}.tar", members)
        prepare.build(f"webdataset:{tmp_path}/{split}.tar", tmp_path / f"{split}-tar", classes=10)
        prepare.build(f"imagefolder:{tmp_path}/png/{split}", tmp_path / f"{split}-png")
        found, folders = Index.open(tmp_path / "idx", split), Index.open(tmp_path / f"{split}-png")
        assert found.fingerprint == Index.open(tmp_path / f"{split}-tar").fingerprint
        same = ["label", "size", "crc", "height", "width", "status", "cmyk"]
        rows = [sorted(index.records[same].tolist()) for index in (found, folders)]
        assert rows[0] == rows[1] and folders.classes == 10


def test_idx_files_give_the_index_of_png(tmp_path):
    (tmp_path / "in").mkdir()
    arrays = {}
    for (split, what), name in NAMES.items():
        count = 40 if split == "train" else 20
        array = RNG.integers(0, 256, (count, 28, 28)) if what == "images" else np.arange(count) % 10
        arrays[split, what] = array.astype(np.uint8)
        (tmp_path / "in" / f"{name}.gz").write_bytes(gzip.compress(packed(arrays[split, what])))
    compared(tmp_path / "in", arrays, tmp_path)


@pytest.mark.slow
def test_fashion_mnist_as_debian_has_it(tmp_path):
    """70,000 images of the package dataset-fashion-mnist, fetched by apt-get where it is not installed."""
    if not shutil.which("apt-get"):
        pytest.skip("no apt-get")
    done = subprocess.run(
        ["apt-get", "download", "dataset-fashion-mnist"], cwd=tmp_path, capture_output=True, text=True
    )
    packages = list(tmp_path.glob("*.deb"))
    if not packages:
        pytest.skip(f"no package: {done.stderr.strip()[-200:]}")
    subprocess.run(["dpkg-deb", "-x", packages[0], tmp_path / "root"], check=True)
    (folder,) = {path.parent for path in (tmp_path / "root").rglob("*ubyte*") if "images" in path.name}
    arrays = {}
    for key, name in NAMES.items():
        (path,) = folder.glob(f"{name}*")
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        shape = np.frombuffer(data, ">u4", data[3], 4).astype(int)
        arrays[key] = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
    assert len(arrays["train", "labels"]) == 60_000 and len(arrays["val", "labels"]) == 10_000
    compared(folder, arrays, tmp_path)
