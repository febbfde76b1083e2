"""IDX files are read for the arrays they hold, and damage in them is found."""

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.idx_files import NAMES, packed
from support.prepared import refuse

from cache.errors import UserError
from pipeline.data import prepare
from pipeline.data.index import Index
from pipeline.data.sources import idx


def written(folder: Path, suffix: str = "", channels: tuple[int, ...] = ()) -> dict:
    rng = np.random.default_rng(0)
    arrays = {}
    for (split, what), name in NAMES.items():
        count = 7 if split == "train" else 3
        array = rng.integers(0, 256, (count, 6, 5, *channels)) if what == "images" else np.arange(count) % 4
        arrays[split, what] = array.astype(np.uint8)
        data = packed(arrays[split, what])
        (folder / f"{name}{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    (folder / "README").touch()
    return arrays


@pytest.mark.parametrize(("suffix", "channels"), [("", ()), (".gz", ()), ("", (3,))])
def test_pixels_and_labels_survive_unchanged(tmp_path, suffix, channels):
    (tmp_path / "in").mkdir()
    arrays = written(tmp_path / "in", suffix, channels)
    facts = prepare.build(f"idx:{tmp_path}/in", tmp_path / "out", threads=1)
    assert facts["splits"] == {"train": 7, "val": 3} and facts["classes"] == 4
    assert facts["files"]["used"] == 4 and facts["files"]["left_out"] == {
        "no part of the data set": {"without extension": 1}
    }
    for split in ("train", "val"):
        data = Index.open(tmp_path / "out", split)
        for row in range(len(data)):
            number = int(data.key(row).removeprefix(f"{split}/"))
            image = np.asarray(Image.open(io.BytesIO(data.read(row))))
            assert np.array_equal(image, arrays[split, "images"][number])
            assert data.records["label"][row] == arrays[split, "labels"][number]


def test_what_is_missing_or_does_not_fit_is_named(tmp_path):
    root, out = tmp_path / "in", tmp_path / "out"
    refuse(f"idx:{root}", out, "cannot read", "No such file")
    root.mkdir()
    written(root)
    for name, data, words in (
        ("train-labels-idx1-ubyte", packed(np.zeros(6, np.uint8)), ["6 labels", "7, one for each image"]),
        ("train-images-idx3-ubyte", packed(np.zeros((7, 6), np.uint8)), ["2 and 1 dimensions"]),
        ("t10k-images-idx3-ubyte", b"\0\0\x08\3" + b"\xff" * 12, ["bytes announced"]),
        ("t10k-images-idx3-ubyte", b"<html>", ["IDX of unsigned bytes"]),
    ):
        before = (root / name).read_bytes()
        (root / name).write_bytes(data)
        refuse(f"idx:{root}", out, "damaged IDX file", *words)
        (root / name).write_bytes(before)
    (root / "emnist-train-images-idx3-ubyte").touch()
    refuse(f"idx:{root}", out, "emnist-train-images-idx3-ubyte, train-images", "expected one train-images-idx3-ubyte")


@given(st.data(), st.booleans())
@settings(deadline=None, max_examples=100)
def test_no_damage_escapes_as_another_exception(tmp_path_factory, data, zipped):
    whole = packed(np.arange(60, dtype=np.uint8).reshape(3, 4, 5))
    damaged = bytearray(gzip.compress(whole) if zipped else whole)
    del damaged[data.draw(st.integers(0, len(damaged))) :]
    for _ in range(data.draw(st.integers(0, 3)) if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"x-idx3-ubyte{'.gz' if zipped else ''}"
    path.write_bytes(damaged)
    try:
        found = idx._read(str(path))
    except UserError as error:
        assert "\n" not in str(error) and "fix: " in str(error)
    else:
        assert found.dtype == np.uint8 and found.size == len(whole) - 16
