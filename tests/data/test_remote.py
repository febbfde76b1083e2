"""Shards on S3 and HTTP servers give what local ones give, through faults, within bounds of time and space."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from google_crc32c import value as crc32c
from support.images import jpeg, png, tar
from support.prepared import quarantine, refuse
from support.remote_servers import KINDS, Remote, hurry, serve

from cache.errors import UserError
from cache.store import retry
from pipeline.data import index, prepare, remote, shards
from pipeline.data.classes import Classes
from pipeline.data.index import BadSample, Index
from pipeline.data.shards import Reader

FILES = ["a/train-0.tar", "a/train-1.tar", "a/sub/train-2.tar", "odd/100%25 ü+{1}.tar"]


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> Path:
    """Tars of 12 samples each, of 1 to 100 KB, with a damaged image, a long name and a lacking label."""
    folder, rng = tmp_path_factory.mktemp("tars"), np.random.default_rng(0)
    for number, name in enumerate(FILES):
        members = []
        for i in range(12):
            image = jpeg(rng, 60 * i + 8, 40 * i + 8, quality=95) if i % 3 else png(rng, 30, 20)
            key = f"{'long/' * 40 if i == 5 else ''}{number}_{i}"
            members += [(f"{key}.jpg", image[: len(image) // (2 if i == 7 else 1)])]
            members += [(f"{key}.cls", b"%d" % (i % 4))] if i != 8 else []
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        tar(folder / name, members)
    return folder


@pytest.fixture(scope="module")
def servers(tars):
    with serve(tars) as servers:
        yield servers


@pytest.fixture
def served(servers, monkeypatch) -> Remote:
    """The servers without faults, nor waits after them."""
    servers.faults.clear()
    hurry(monkeypatch)
    return servers


@pytest.fixture
def impatient(monkeypatch) -> None:
    """A server that is silent for 0.2 s has stalled; a slow first byte takes more."""
    monkeypatch.setitem(retry.CLIENT["client_options"], "read_timeout", timedelta(seconds=0.2))


@pytest.fixture(scope="module")
def local(tars, tmp_path_factory) -> Index:
    out = tmp_path_factory.mktemp("local") / "data"
    prepare.build(f"webdataset:{tars}/a/train-*.tar", out, classes=4, threads=2)
    return Index.open(out)


def url(served: Remote, scheme: str, name: str = "a/train-1.tar") -> str:
    return f"{getattr(served, scheme)}/{name}"


def moved(local: Index, base: str, folder: Path, records: np.ndarray | None = None) -> Path:
    """The local data set with its shards below `base`, without preparing it again."""
    folder.mkdir()
    names = [f"{base}/a/{Path(shard).name}" for shard in local.shards]
    records = np.array(local.records) if records is None else records
    index.write(folder, records, names, [], source="", classes=Classes(4))
    return folder


def one_line(error: pytest.ExceptionInfo, *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message and "fix: " in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("rate", [0, 0.25])
@pytest.mark.parametrize("place", ["{s3}/a/train-*", "{s3}/a/train-{{0..1}}", "{http}/a/train-{{0,1}}"])
def test_preparing_remote_tars_gives_the_index_of_the_local_ones(served, local, tmp_path, monkeypatch, place, rate):
    """Every record, fingerprint and quarantined key; fetched by small ranges, and nothing else is left behind."""
    monkeypatch.setattr(shards, "_COPY_BYTES", 5_000)
    served.faults.rate = rate
    pattern = place.format(s3=served.s3, http=served.http)
    prepare.build(f"webdataset:{pattern}.tar", tmp_path / "out", classes=4, threads=2)
    made = Index.open(tmp_path / "out")
    assert made.records.tobytes() == local.records.tobytes() and made.fingerprint == local.fingerprint
    assert made.shards == [f"{pattern.partition('/train')[0]}/train-{i}.tar" for i in range(2)]
    lines = [[{**line, "shard": Path(line["shard"]).name} for line in quarantine(d.path)] for d in (made, local)]
    assert lines[0] == lines[1] and len(lines[0]) == 4
    assert sorted(path.name for path in made.path.iterdir()) == [
        *("dataset.json", "index.npy", "ledger.json", "quarantine.jsonl")
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert bool(served.faults.made) == (rate > 0)


def test_a_remote_shard_is_read_once_when_it_is_prepared(served, tars, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_COPY_BYTES", 50_000)
    prepare.build(f"webdataset:{served.http}/a/train-{{0..1}}.tar", tmp_path / "out", threads=2)
    parts = sum(-(-(tars / name).stat().st_size // 50_000) for name in FILES[:2])
    assert served.faults.requests == {"HEAD": 2, "GET": parts}


@pytest.mark.parametrize("scheme", ["s3", "http"])
@pytest.mark.parametrize("rate", [0, 0.3])
def test_remote_rows_are_the_local_bytes_in_the_order_asked_for_through_faults(
    served, impatient, local, tmp_path, scheme, rate
):
    """400 reads by 8 threads, in an order of their own; with the faults, some 170 of the requests fail."""
    data = Index.open(moved(local, getattr(served, scheme), tmp_path / "d"))
    served.faults.clear()
    served.faults.rate, served.faults.slow_s = rate, 0.3
    rows = np.random.default_rng(0).integers(0, len(local), 400).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(data.read, rows)) == [local.read(row) for row in rows]
    assert [data.key(row) for row in range(3)] == [local.key(row) for row in range(3)]
    seen = sum(served.faults.made.values()) / sum(served.faults.requests.values())
    assert abs(seen - rate) < 0.1 and set(served.faults.made) == (set(KINDS) if rate else set())


@pytest.mark.parametrize("scheme", ["s3", "http"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_fault_alone_is_repeated_until_it_passes(served, impatient, tars, kind, scheme):
    expected = (tars / "a/train-1.tar").read_bytes()
    served.faults.script.extend([kind] * 2)
    assert Reader().read(url(served, scheme), 1000, 50_000) == expected[1000:51_000]
    assert served.faults.requests["GET"] >= 3 and served.faults.made == {kind: 2}
    served.faults.clear()
    served.faults.script.extend([kind] * 2)
    assert Reader().length(url(served, scheme)) == len(expected)
    assert served.faults.requests["HEAD"] >= 3


@pytest.mark.parametrize(("scheme", "start"), [("s3", 26_000), ("http", 1000)])
def test_a_broken_body_is_resumed_where_the_server_tells_versions_apart(served, tars, scheme, start):
    """By ETag, which the S3 server sends and the HTTP server does not: there the range begins anew."""
    served.faults.script.append("cut")
    expected = (tars / "a/train-1.tar").read_bytes()[1000:51_000]
    assert Reader().read(url(served, scheme), 1000, 50_000) == expected
    assert served.faults.ranges == ["bytes=1000-50999", f"bytes={start}-50999"]


CAUSES = {
    "reset": "Connection reset by peer",
    "503": "HTTP 503 Service Unavailable",
    "slow": "time-out",
    "short": "43373 of 86746 bytes",
    "cut": "connection closed within the body",
    "reset in body": "Connection reset by peer",
}


@pytest.mark.parametrize("scheme", ["s3", "http"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_that_stays_is_one_line_in_few_tries(served, impatient, local, tmp_path, monkeypatch, kind, scheme):
    """At most 3 tries, each of 4 requests at most; a silent server has 0.2 s for each."""
    monkeypatch.setattr(retry, "TRIES", 3)
    data = Index.open(moved(local, getattr(served, scheme), tmp_path / "d"))
    served.faults.clear()
    served.faults.rate, served.faults.kinds = 1, (kind,)
    record = data.records[23]  # a large one
    with pytest.raises(BadSample) as error:
        data.read(23)
    place = f"byte {record['offset']} of shard {url(served, scheme)}; found"
    one_line(error, f"{record['key_hash']:016x}", place, CAUSES[kind], "(3 tries)")
    assert 3 <= served.faults.requests["GET"] <= 12 and set(served.faults.requests) == {"GET"}


def test_no_try_begins_after_the_time_of_patience(served, impatient, monkeypatch):
    monkeypatch.setattr(retry, "PATIENCE_S", 0.3)
    served.faults.rate, served.faults.kinds = 1, ("slow",)
    with pytest.raises(UserError) as error:
        Reader().read(url(served, "http"), 0, 100)
    one_line(error, "time-out", "byte 0")
    assert served.faults.requests["GET"] <= 4  # 0.2 s each, where the tries alone would allow 28


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_a_missing_object_is_said_at_once(served, local, tmp_path, scheme):
    folder = moved(local, url(served, scheme, "none"), tmp_path / "d")
    with pytest.raises(UserError) as error:
        Index.open(folder)
    one_line(error, f"{url(served, scheme, 'none')}/a/train-", "HTTP 404 Not Found: no such object, or no such bucket")
    assert served.faults.requests["HEAD"] <= 2  # one for each shard
    served.faults.clear()
    with pytest.raises(UserError) as error:
        Reader().read(url(served, scheme, "none.tar"), 0, 9)
    one_line(error, "none.tar", "NoSuchKey" if scheme == "s3" else "HTTP 404")
    assert served.faults.requests == {"GET": 1}


def test_what_is_wrong_with_a_bucket_or_its_credentials_is_said_at_once(served, tmp_path, monkeypatch):
    refuse("webdataset:s3://no-such-bucket/*.tar", tmp_path / "o", "cannot read", "no-such-bucket", "NoSuchBucket")
    refuse("webdataset:s3://no-such-bucket/a.tar", tmp_path / "o", "no-such-bucket/a.tar", "no such bucket")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    refuse(f"webdataset:{url(served, 's3')}", tmp_path / "o", "HTTP 403", "AWS_SKIP_SIGNATURE=true")
    monkeypatch.delenv("AWS_SKIP_SIGNATURE")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    refuse(f"webdataset:{url(served, 's3')}", tmp_path / "o", "no AWS credentials", "set AWS_ACCESS_KEY_ID")
    assert sum(served.faults.requests.values()) == 3


def test_a_server_that_is_down_is_one_line(served, local, tmp_path):
    """Nothing listens on port 1."""
    folder = moved(local, "http://127.0.0.1:1", tmp_path / "d")
    with pytest.raises(UserError) as error:
        Index.open(folder)
    one_line(error, "cannot read shard http://127.0.0.1:1/a/train-", "Connection refused", "tries")
    refuse("webdataset:http://127.0.0.1:1/a.tar", tmp_path / "out", "http://127.0.0.1:1/a.tar", "Connection refused")


def test_a_remote_shard_that_was_cut_or_changed_is_named(tars, local, tmp_path):
    with serve(tmp_path) as served:
        (tmp_path / "a").mkdir()
        shard = tmp_path / "a" / "train-1.tar"
        for name in FILES[:2]:
            (tmp_path / name).write_bytes((tars / name).read_bytes())
        data = Index.open(moved(local, served.http, tmp_path / "d"))
        row, whole = len(data) - 1, shard.read_bytes()
        offset, size = int(data.records["offset"][row]), int(data.records["size"][row])
        shard.write_bytes(whole[:offset] + b"?" + whole[offset + 1 :])
        with pytest.raises(BadSample) as error:
            data.read(row)
        one_line(error, f"sample {local.key(row)!r} at byte {offset} of shard {served.http}", "changed since")
        for length, got in ((offset + 5, 5), (offset, 0)):
            shard.write_bytes(whole[:length])
            with pytest.raises(BadSample) as error:
                data.read(row)
            one_line(error, f"sample {local.key(row)!r}", f"cut: {got} of {size} bytes")
        with pytest.raises(UserError) as error:
            Index.open(tmp_path / "d")
        one_line(error, f"{served.http}/a/train-1.tar is shorter", f"found {offset} bytes")


def test_a_preparation_that_fails_leaves_nothing(served, tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "TRIES", 2)
    monkeypatch.setattr(shards, "_COPY_BYTES", 30_000)
    served.faults.script.extend([""] * 8)  # the first requests pass
    served.faults.rate, served.faults.kinds = 1, ("503",)
    refuse(f"webdataset:{served.s3}/a/train-*.tar", tmp_path / "out", served.s3, "HTTP 503", "(2 tries)")
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_shrinks_while_it_is_prepared_is_named(served, tmp_path, monkeypatch):
    length = remote.Remote.length
    monkeypatch.setattr(remote.Remote, "length", lambda self, shard: length(self, shard) + 9)
    refuse(f"webdataset:{url(served, 'http')}", tmp_path / "out", url(served, "http"), "became shorter")


def test_names_of_any_kind_are_found(served, tars):
    """S3 keys are taken as they are, HTTP paths with percent signs, as servers know them."""
    for pattern in ("odd/*.tar", "odd/100%25*"):
        assert Reader().expand(f"{served.s3}/{pattern}") == [f"{served.s3}/{FILES[3]}"]
    expected = (tars / FILES[3]).read_bytes()
    for name in (f"{served.s3}/{FILES[3]}", f"{served.http}/odd/100%2525%20%C3%BC+%7B1%7D.tar"):
        assert Reader().read(name, 5, 4000) == expected[5:4005] and Reader().length(name) == len(expected)


def test_patterns_expand_to_sorted_shards_and_each_alternative_names_one(served, tars):
    def refused(pattern: str, *words: str) -> None:
        with pytest.raises(UserError) as error:
            Reader().expand(pattern)
        one_line(error, *words)

    expand, two = Reader().expand, ["/a/train-0.tar", "/a/train-1.tar"]
    assert expand(f"{served.s3}/*/train-?.tar") == [served.s3 + name for name in two]  # * stays within a folder
    assert expand(f"{served.s3}/a/{{sub/,}}train-[!1].tar") == [
        f"{served.s3}/a/sub/train-2.tar",
        f"{served.s3}/a/train-0.tar",
    ]
    for pattern in ("{1,0}", "*", "{0..1}", "?"):
        assert expand(f"{tars}/a/train-{pattern}.tar") == [str(tars) + name for name in two]
    assert expand(f"{served.http}/x-{{08..10}}.tar") == [f"{served.http}/x-{n}.tar" for n in ("08", "09", "10")]
    refused(f"{tars}/a/train-{{0..2}}.tar", "no shard matches", "train-2.tar")
    refused(f"{served.s3}/a/{{train,val}}-*.tar", "no shard matches", "val-*.tar")
    refused(f"{served.http}/a/*.tar", "wildcards need a server that lists", "{000..009}")
    for host in ("http:///a.tar", "https://host", "https://me:secret@host/a.tar", "s3://bucket", "s3://a b/c"):
        refused(host, "not the URL of a shard", "expected s3://bucket/key")
    refused("http://host/a.tar#b", "not the URL of a shard", "without user or fragment")


def test_a_bucket_of_google_or_azure_is_read_as_any_other(served, tars, monkeypatch):
    """Against a server of files, which answers what these clients ask for: GET and HEAD with a range."""
    key = '{"gcs_base_url": "%s", "disable_oauth": true, "client_email": "", "private_key": "", "private_key_id": ""}'
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", key % served.tagged)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "any")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", served.tagged)
    monkeypatch.setenv("AZURE_SKIP_SIGNATURE", "true")
    content = (tars / "a/train-0.tar").read_bytes()
    for scheme in ("gs", "az"):
        shard = f"{scheme}://a/train-0.tar"
        assert Reader().read(shard, 700, 1000) == content[700:1700]
        assert Reader().expand(f"{scheme}://a/train-{{0,1}}.tar") == [f"{scheme}://a/train-{n}.tar" for n in (0, 1)]


def test_a_server_without_ranges_is_refused_at_once(served):
    served.faults.script.append("no ranges")
    with pytest.raises(UserError) as error:
        Reader().read(url(served, "http"), 1, 2)
    one_line(error, "a server without range requests")
    assert served.faults.requests == {"GET": 1}


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_the_cache_serves_when_the_server_does_not(served, local, tmp_path, scheme):
    """A second process with the same cache asks the server for lengths alone."""
    folder, cache = moved(local, getattr(served, scheme), tmp_path / "d"), tmp_path / "cache"
    first = Index.open(folder, cache=cache)
    expected = [local.read(row) for row in range(len(local))]
    assert [first.read(row) for row in range(len(first))] == expected
    served.faults.clear()
    second = Index.open(folder, cache=cache)
    assert [second.read(row) for row in range(len(second))] == expected
    assert served.faults.requests == {"HEAD": 2}
    assert cache.stat().st_mode & 0o77 == 0  # nobody else's business


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "longer"])
def test_a_damaged_cache_entry_is_fetched_again(served, local, tmp_path, harm):
    folder, cache = moved(local, served.http, tmp_path / "d"), tmp_path / "cache"
    data = Index.open(folder, cache=cache)
    expected = local.read(4)
    data.read(4)
    (entry,) = cache.glob("*.range")
    harms = {"flip": b"?" + expected[1:], "cut": expected[:-1], "empty": b"", "longer": expected + b"?"}
    entry.write_bytes(harms[harm])
    served.faults.clear()
    assert data.read(4) == data.read(4) == expected
    assert served.faults.requests == {"GET": 1} and entry.read_bytes() == expected


def test_bytes_that_are_not_the_indexed_ones_are_not_kept(served, local, tmp_path):
    records = np.array(local.records)
    records["crc"][4] ^= 1
    folder = moved(local, served.http, tmp_path / "d", records)
    with pytest.raises(BadSample):
        Index.open(folder, cache=tmp_path / "cache").read(4)
    assert list((tmp_path / "cache").glob("*.range")) == []


def test_an_index_with_urls_keeps_them_as_they_are(served, local, tmp_path):
    folder = moved(local, served.s3, tmp_path / "d")
    assert json.loads((folder / "dataset.json").read_text())["shards"] == Index.open(folder).shards
    assert crc32c(Index.open(folder).read(0)) == local.records["crc"][0]
