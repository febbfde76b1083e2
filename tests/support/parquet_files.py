"""Parquet files as `datasets` writes them, and the same samples as a tar."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet
from support.images import jpeg, png, tar

from pipeline.data import prepare
from pipeline.data.index import Index

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = ["ant", "bee", "cow"]


def samples(count: int = 12) -> list[tuple[str, bytes, int]]:
    """File name, image, label."""
    rng = np.random.default_rng(0)
    images = [jpeg(rng, 20 + i, 30) if i % 2 else png(rng, 16, 20 + i) for i in range(count)]
    return [(f"n{i:02d}_{i}.{'JPEG' if i % 2 else 'png'}", image, i % 3) for i, image in enumerate(images)]


def write(
    path: Path,
    rows: list,
    features: dict | None = None,
    label: str = "label",
    group: int = 5,
    kind=None,
    page: int = 1024,
) -> Path:
    """A file as `datasets` writes it: rows of (path, bytes, label), features in the metadata; rows per page at most."""
    images = pa.array([None if data is None else {"bytes": data, "path": name} for name, data, _ in rows], IMAGE)
    table = pa.table({"image": images, label: pa.array([row[2] for row in rows], kind)})
    if features is not None:
        info = {"info": {"features": {"image": {"_type": "Image"}, **features}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    parquet.write_table(table, path, row_group_size=group, write_batch_size=page)
    return path


def class_label(name: str = "label") -> dict:
    return {name: {"names": NAMES, "_type": "ClassLabel"}}


def tarred(path: Path, rows: list, key=lambda i, name: name.rpartition(".")[0]) -> Path:
    """The same samples as a tar, by Python's own tarfile."""
    members = []
    for i, (name, data, label) in enumerate(rows):
        members += [(f"{key(i, name)}.jpg", data), (f"{key(i, name)}.cls", b"%d" % label)]
    tar(path, members)
    return path


def built(source: str, out: Path, **options) -> Index:
    prepare.build(source, out, threads=1, **options)
    return Index.open(out)
