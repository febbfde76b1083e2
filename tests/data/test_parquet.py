"""Parquet files of the Hugging Face Hub's form give the index of a tar of the same samples, in bounded memory."""

import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from support.parquet_files import NAMES, built, class_label, samples, tarred, write
from support.prepared import quarantine, refuse

from cache.errors import UserError
from pipeline.data import prepare
from pipeline.data.index import Index
from pipeline.data.ledger import Ledger
from pipeline.data.sources import parquet as source
from pipeline.data.sources.base import Options


def test_two_files_give_the_index_of_a_tar_of_the_same_samples(tmp_path):
    rows = samples()
    write(tmp_path / "train-00000-of-00002.parquet", rows[:7], class_label())
    write(tmp_path / "train-00001-of-00002.parquet", rows[7:], class_label())
    expected = built(f"webdataset:{tarred(tmp_path / 'a.tar', rows)}", tmp_path / "tar", classes=3)
    facts = prepare.build(f"parquet:{tmp_path}", tmp_path / "out", threads=1)
    found = Index.open(tmp_path / "out")
    assert found.fingerprint == expected.fingerprint and found.class_list.names == tuple(NAMES)
    assert [found.read(row) for row in range(12)] == [row[1] for row in rows]
    assert facts["files"]["found"] == facts["files"]["used"] == 12
    assert len(found.shards) == 1 and facts["classes"] == 3


@pytest.mark.parametrize("rule", ["name", "shard/name", "shard/row"])
@pytest.mark.parametrize("named", [True, False])
def test_keys_are_paths_or_file_and_row(tmp_path, rule, named):
    rows = [(name if named else None, data, label) for name, data, label in samples(6)]
    write(tmp_path / "a.parquet", rows[:4], class_label(), group=3)
    write(tmp_path / "b.parquet", rows[4:], class_label(), group=3)
    found = built(f"parquet:{tmp_path}/*.parquet", tmp_path / "out", key=rule)
    stem = [name.rpartition(".")[0] for name, _, _ in samples(6)]
    by_row = [f"a/{i:08d}" for i in range(4)] + [f"b/{i:08d}" for i in range(2)]
    expected = by_row
    if named and rule == "name":
        expected = stem
    if named and rule == "shard/name":
        expected = [f"{'a' if i < 4 else 'b'}/{name}" for i, name in enumerate(stem)]
    assert [found.key(row) for row in range(6)] == expected


def test_one_name_in_two_files_is_refused_with_the_option_that_tells_them_apart(tmp_path):
    rows = samples(4)
    for name in "ab":
        write(tmp_path / f"{name}.parquet", rows, class_label())
    refuse(f"parquet:{tmp_path}/*.parquet", tmp_path / "out", "duplicate key 'n00_0'", "--key shard/name")
    assert len(built(f"parquet:{tmp_path}/*.parquet", tmp_path / "out", key="shard/name")) == 8


@pytest.mark.parametrize(
    ("label", "values", "kind", "options", "expected", "names"),
    [
        ("labels", [2, 0, 1, 2], pa.int32(), {}, [2, 0, 1, 2], None),
        ("fine_label", [2, 0, 1, 2], pa.int64(), {"classes": 9}, [2, 0, 1, 2], None),
        ("species", [2, 0, 1, 2], pa.uint8(), {"label_key": "species"}, [2, 0, 1, 2], None),
        ("label", ["cow", "ant", "bee", "cow"], None, {}, [2, 0, 1, 2], tuple(NAMES)),
        ("label", ["3", "0", "1", "3"], None, {}, [3, 0, 1, 3], None),
    ],
)
def test_labels_of_any_column_and_type(tmp_path, label, values, kind, options, expected, names):
    rows = [(name, data, value) for (name, data, _), value in zip(samples(4), values, strict=True)]
    write(tmp_path / "a.parquet", rows, label=label, kind=kind)
    found = built(f"parquet:{tmp_path}/a.parquet", tmp_path / "out", **options)
    assert found.records["label"].tolist() == expected and found.class_list.names == names
    assert found.classes == options.get("classes", max(expected) + 1)


def test_a_list_of_names_numbers_texts(tmp_path):
    (tmp_path / "order.txt").write_text("cow\nant\nbee\n")
    rows = [(name, data, NAMES[label]) for name, data, label in samples(6)]
    write(tmp_path / "a.parquet", rows)
    found = built(f"parquet:{tmp_path}/a.parquet", tmp_path / "out", class_order=str(tmp_path / "order.txt"))
    assert found.records["label"].tolist() == [1, 2, 0, 1, 2, 0] and found.class_list.rule == "file"


def test_rows_without_image_or_label_are_quarantined_and_all_are_accounted_for(tmp_path):
    rows = samples()
    rows[1], rows[4] = (rows[1][0], None, 1), (rows[4][0], rows[4][1], None)
    rows[7], rows[9] = (rows[7][0], rows[7][1], -1), (rows[9][0], rows[9][1][:40], 0)
    write(tmp_path / "a.parquet", rows, class_label())
    facts = prepare.build(f"parquet:{tmp_path}/a.parquet", tmp_path / "out", threads=1)
    causes = [line["cause"] for line in quarantine(tmp_path / "out")]
    assert sorted(causes) == ["damaged", "empty file", "label outside [0, 3)", "no label"]
    files = facts["files"]
    assert (files["found"], files["used"], sum(files["quarantined"].values())) == (12, 8, 4)


def test_a_row_group_is_not_held_in_memory(tmp_path):
    """One row group of 64 MB of noise, which does not compress, in pages of 1 MB: less than a quarter of it is held."""
    rng = np.random.default_rng(0)
    rows = [(f"k{i}.jpg", rng.bytes(1 << 18), 0) for i in range(256)]
    write(tmp_path / "a.parquet", rows, class_label(), group=256, page=4)
    del rows
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        ledger = Ledger()
        found = source.parquet(f"{tmp_path}/a.parquet", Options(), ledger)[""]
        total = sum(len(sample.image) for sample in found.samples)
        assert total == 1 << 26 and ledger.found == 256
        assert 1 << 20 < pool.max_memory() < 1 << 24, pool.max_memory()
    finally:
        pa.set_memory_pool(before)


def test_what_is_wrong_is_one_line(tmp_path, monkeypatch):
    rows, out = samples(4), tmp_path / "out"
    write(tmp_path / "train-0.parquet", rows, class_label())
    write(tmp_path / "test-0.parquet", rows, class_label())
    refuse(f"parquet:{tmp_path}/*.parquet", out, "files of several splits", "test, train")
    (tmp_path / "no.parquet").write_bytes(b"PAR1 no")
    refuse(f"parquet:{tmp_path}/no.parquet", out, "cannot read the Parquet file", "no.parquet")
    cut = (tmp_path / "train-0.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(cut[: len(cut) // 2])
    refuse(f"parquet:{tmp_path}/cut.parquet", out, "cannot read the Parquet file", "cut.parquet")
    parquet.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "text.parquet")
    refuse(f"parquet:{tmp_path}/text.parquet", out, "no column of images", "text, label")
    refuse(f"parquet:{tmp_path}/train-0.parquet", out, "no column kind", "image, label", label_key="kind")
    write(tmp_path / "x.parquet", rows, label="kind")
    refuse(f"parquet:{tmp_path}/x.parquet", out, "no column of labels", "--label-key")
    refuse(f"parquet:{tmp_path}/train-0.parquet", out, "classes of its own", "--class-order", class_order="natural")
    refuse(f"imagefolder:{tmp_path}", out, "--label-key means nothing to imagefolder", label_key="kind")
    refuse(f"webdataset:{tmp_path}/*.tar", out, "--key shard/row means nothing", key="shard/row")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refuse(f"parquet:{tmp_path}/train-0.parquet", out, "needs pyarrow", "pip install '.[parquet]'")


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_no_damage_escapes_as_another_exception(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.parquet"
    write(path, samples(4), class_label())
    damaged = bytearray(path.read_bytes())
    del damaged[data.draw(st.integers(0, len(damaged))) :]
    for _ in range(data.draw(st.integers(0, 3)) if damaged else 0):
        damaged[data.draw(st.integers(max(0, len(damaged) - 600), len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        rows = list(source.parquet(str(path), Options(), Ledger())[""].samples)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert len(rows) <= 4
