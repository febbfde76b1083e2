"""hf:// data sets: tars and Parquet files behind a hub give the index of local ones, and refusals say what to do."""

import json
import os
from pathlib import Path

import pytest
from support.parquet_files import NAMES, built, class_label, samples, tarred, write
from support.prepared import refuse
from support.remote_servers import hurry
from support.sites import hub

from cache.errors import UserError
from pipeline.data import prepare
from pipeline.data.index import Index
from pipeline.data.shards import Reader

REPOSITORY, TOKEN = "lab/small", "hf_very-secret"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A repository as timm/imagenet-1k-wds is, and one of Parquet files in data/."""
    folder, rows = tmp_path_factory.mktemp("hub"), samples()
    (folder / "data").mkdir()
    for number in range(2):
        part = rows[number * 6 : number * 6 + 6]
        tarred(folder / f"small-train-000{number}.tar", part)
        write(folder / "data" / f"train-0000{number}-of-00002.parquet", part, class_label())
    info = {
        "name": "small",
        "class_names": NAMES,
        "splits": {
            "train": {
                "name": "train",
                "num_samples": 12,
                "filenames": ["small-train-0000.tar", "small-train-0001.tar"],
                "shard_lengths": [6, 6],
            }
        },
    }
    (folder / "_info.json").write_text(json.dumps(info))
    return folder


@pytest.fixture
def secret(monkeypatch, tmp_path):
    hurry(monkeypatch)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.parametrize(
    "pattern",
    [
        "webdataset:hf://datasets/lab/small/small-train-{0000..0001}.tar",
        "webdataset:hf://datasets/lab/small/small-*.tar",
        "webdataset:hf://datasets/lab/small@main",
        "parquet:hf://datasets/lab/small/data/train-*.parquet",
        "parquet:hf://datasets/lab/small/data/",
    ],
)
def test_a_hub_gives_the_index_of_local_tars_and_its_cdn_no_token(secret, files, tmp_path, monkeypatch, pattern):
    expected = built(f"webdataset:{files}/small-train-*.tar", tmp_path / "local")
    with hub(files, REPOSITORY, TOKEN) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.hub.url)
        found = built(pattern, tmp_path / "out")
        assert found.fingerprint == expected.fingerprint and found.class_list.names == tuple(NAMES)
        assert [found.read(row) for row in range(12)] == [expected.read(row) for row in range(12)]
    assert served.hub.sent("authorization") == {f"Bearer {TOKEN}"}
    assert served.cdn.seen and served.cdn.sent("authorization") == {None}
    assert all(TOKEN not in path.read_text("latin1") for path in (tmp_path / "out").iterdir())


def test_a_refusal_says_what_to_do(secret, files, tmp_path, monkeypatch):
    tar, listed = "webdataset:hf://datasets/lab/small/small-train-0000.tar", "webdataset:hf://datasets/lab/small"
    with hub(files, REPOSITORY, "another") as served:
        monkeypatch.setenv("HF_ENDPOINT", served.hub.url)
        terms = f"accept the data set's terms at {served.hub.url}/datasets/lab/small"
        for source in (tar, listed):
            refuse(source, tmp_path / "out", "HTTP 401", terms, "set HF_TOKEN")
    with hub(files, REPOSITORY, gated=True) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.hub.url)
        for source in (tar, listed):
            refuse(source, tmp_path / "out", "HTTP 403", "with the account that HF_TOKEN is of")
        assert len(served.hub.seen) == 2  # once each: waiting changes nothing
        monkeypatch.setenv("HF_ENDPOINT", "http://hub.example.test")
        refuse(tar, tmp_path / "out", "a token over plain http", "https")
    with hub(files, REPOSITORY, TOKEN) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.hub.url)
        refuse("webdataset:hf://datasets/lab/none/a.tar", tmp_path / "out", "HTTP 404", "is there")
        refuse("webdataset:hf://datasets/lab/small/*.zip", tmp_path / "out", "no shard matches")
    monkeypatch.setenv("HF_ENDPOINT", "127.0.0.1:1")
    refuse(tar, tmp_path / "out", "unusable HF_ENDPOINT")
    for address in ("hf://lab/small/a.tar", "hf://datasets/small", "hf://spaces/lab/small/a.tar"):
        with pytest.raises(UserError, match="expected hf://datasets/OWNER/NAME/FILES"):
            Reader().expand(address)


def test_without_the_library_braces_still_do(secret, files, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with hub(files, REPOSITORY, TOKEN) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.hub.url)
        refuse("webdataset:hf://datasets/lab/small/*.tar", tmp_path / "out", "pip install huggingface_hub")
        assert len(built("webdataset:hf://datasets/lab/small/small-train-{0000,0001}.tar", tmp_path / "out")) == 12


def test_counts_beside_the_shards_are_held_against_them(files, tmp_path):
    """And a folder without names counts its classes; the user's word goes before either."""
    for name in ("small-train-0000.tar", "small-train-0001.tar"):
        os.link(files / name, tmp_path / name)
    info = {"num_classes": 7, "filenames": ["small-train-0000.tar", "small-train-0001.tar"], "shard_lengths": [6, 5]}
    (tmp_path / "_info.json").write_text(json.dumps(info))
    facts = prepare.build(f"webdataset:{tmp_path}", tmp_path / "out", threads=1)
    assert "note: _info.json says 5 samples for small-train-0001.tar, which has 6" in facts["notes"]
    assert Index.open(tmp_path / "out").classes == 7
    assert built(f"webdataset:{tmp_path}", tmp_path / "own", classes=3).classes == 3
    for content in ("[]", "{", '{"splits": 3}', '{"splits": {"a": 1}, "class_names": [1]}', "\0"):
        (tmp_path / "_info.json").write_text(content)
        assert built(f"webdataset:{tmp_path}", tmp_path / f"odd{abs(hash(content))}").classes == 3
