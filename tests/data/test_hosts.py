"""Hosts that want a token, signed URLs, proxies and private authorities; secrets stay where they belong."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.commands import command
from support.parquet_files import built, class_label, samples, tarred, write
from support.prepared import quarantine, refuse
from support.remote_servers import hurry, serve
from support.sites import Signed, proxy, site, tls, wants

from cache.errors import UserError, redacted
from pipeline.data import prepare, tokens
from pipeline.data.index import BadSample, Index
from pipeline.data.shards import Reader

SECRET = "c0ffee-5ecret"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder, rows = tmp_path_factory.mktemp("hosts"), samples()
    for number in range(2):
        tarred(folder / f"a-{number}.tar", rows[number * 6 : number * 6 + 6])
        write(folder / f"a-{number}.parquet", rows[number * 6 : number * 6 + 6], class_label())
    return folder


@pytest.fixture
def local(files, tmp_path) -> Index:
    return built(f"webdataset:{files}/a-*.tar", tmp_path / "local")


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    hurry(monkeypatch)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", tokens.VARIABLE):
        for spelling in (name, name.lower()):
            monkeypatch.delenv(spelling, raising=False)


def signed(url: str, signature: str, *, start: str = "20990101T000000Z") -> str:
    query = f"X-Amz-Date={start}&X-Amz-Expires=60&X-Amz-SignedHeaders=host&X-Amz-Signature={signature}%2B%2F%3D"
    return f"{url}?{query}"


def test_a_signed_url_that_expires_midway_and_a_fresh_one(files, local, tmp_path):
    """Of a tar, of Parquet, and of lists of them; what was begun leaves nothing, and the index is the local one."""
    check = Signed({f"{SECRET}+/=": 3, "fresh+/=": 1000})
    with site(files, check) as host:
        lists = {}
        for signature in (SECRET, "fresh"):
            lists[signature] = tmp_path / f"{signature}.txt"
            urls = [signed(f"{host.url}/a-{number}.tar", signature) for number in range(2)]
            lists[signature].write_text("\n".join([*urls, ""]))
        refuse(f"webdataset:@{lists[SECRET]}", tmp_path / "out", "a-1.tar?…", "signature has expired", "a fresh URL")
        found = built(f"webdataset:@{lists['fresh']}", tmp_path / "out")
        assert found.fingerprint == local.fingerprint and found.read(7) == local.read(7)
        assert (tmp_path / "out" / "dataset.json").stat().st_mode & 0o77 == 0
        with pytest.raises(UserError, match=r"cannot read shard http://127.*a-0.parquet\?….*signature has expired"):
            built(f"parquet:{signed(f'{host.url}/a-0.parquet', SECRET)}", tmp_path / "none")
        urls = ",".join(signed(f"{host.url}/a-{number}.parquet", "fresh") for number in range(2))
        assert built(f"parquet:{{{urls}}}", tmp_path / "parquet").fingerprint == local.fingerprint
        check.valid["fresh+/="] = 0
        with pytest.raises(BadSample, match="expired") as caught:
            found.read(0)
        assert "fresh" not in str(caught.value) and "X-Amz" not in str(caught.value)


def test_the_time_of_a_signature_is_read_from_it():
    long_ago, soon = "20200101T000000Z", time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    assert tokens.expired(signed("http://h/a", "x", start=long_ago)) and not tokens.expired(signed("http://h/a", "x"))
    assert not tokens.expired(signed("http://h/a", "x", start=soon))
    for query, expected in (
        (f"X-Goog-Date={long_ago}&X-Goog-Expires=10", True),
        ("se=2020-01-01T00:00:00Z&sig=x", True),
        ("se=2099-01-01&sig=x", False),
        ("Expires=1577836800&Signature=x", True),
        ("Expires=4070908800&Signature=x", False),
        ("Expires=soon", False),
        ("token=x", False),
    ):
        assert tokens.expired(f"https://h/a.tar?{query}") is expected, query


def test_a_signature_that_is_refused_but_not_over_says_so(files, tmp_path):
    with site(files, lambda *_: (403, {}, b"<Error><Code>SignatureDoesNotMatch</Code></Error>")) as host:
        url = signed(f"{host.url}/a-0.tar", SECRET)
        refuse(f"webdataset:{url}", tmp_path / "out", "not accepted: SignatureDoesNotMatch", "a fresh URL")
        old = signed(f"{host.url}/a-0.tar", SECRET, start="20200101T000000Z")
        refuse(f"webdataset:{old}", tmp_path / "out", "the signature has expired")


def test_a_token_goes_to_the_host_it_is_named_with_and_to_no_other(files, local, tmp_path, monkeypatch):
    with site(files, wants(SECRET)) as host, site(files) as other:
        refuse(f"webdataset:{host.url}/a-0.tar", tmp_path / "out", "HTTP 401", "JDA_BEARER_TOKENS=host=token")
        monkeypatch.setenv("JDA_BEARER_TOKENS", f"elsewhere.test=no {host.host}={SECRET}")
        found = built(f"webdataset:{{{host.url}/a-0.tar,{other.url}/a-1.tar}}", tmp_path / "out")
        assert sorted(found.records["key_hash"].tolist()) == sorted(local.records["key_hash"].tolist())
        assert other.seen and other.sent("authorization") == {None}

        def away(path: str, _: dict):
            return 302, {"Location": f"{other.url}{path}"}, b""

        with site(files, away) as moved:
            monkeypatch.setenv("JDA_BEARER_TOKENS", f"{moved.host}={SECRET}")
            assert Reader().read(f"{moved.url}/a-0.tar", 0, 512) == (files / "a-0.tar").read_bytes()[:512]
            assert moved.sent("authorization") == {f"Bearer {SECRET}"} and other.sent("authorization") == {None}
    for value, words in (
        (f"data.example.test={SECRET}", "a token over plain http"),
        (SECRET, "JDA_BEARER_TOKENS cannot be read"),
    ):
        monkeypatch.setenv("JDA_BEARER_TOKENS", value)
        with pytest.raises(UserError, match=words) as caught:
            Reader().read("http://data.example.test/a.tar", 0, 9)
        assert SECRET not in str(caught.value)


def test_through_a_proxy_unless_the_host_needs_none(files, local, tmp_path, monkeypatch):
    with site(files) as host, proxy(int(host.host.rpartition(":")[2])) as between:
        for name in ("HTTP_PROXY", "http_proxy"):
            monkeypatch.setenv(name, between.url)
        found = built("webdataset:http://data.example.test/a-{0,1}.tar", tmp_path / "out")
        assert found.fingerprint == local.fingerprint
        assert len(between.seen) == len(host.seen) > 3 and between.seen[0][1].startswith("http://data.example.test/")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        Reader().length(f"{host.url}/a-0.tar")
        assert len(host.seen) == len(between.seen) + 1


def test_tls_of_a_private_authority_through_a_proxy(files, local, tmp_path, monkeypatch):
    with tls(files, "data.example.test", tmp_path) as host, proxy(int(host.host.rpartition(":")[2])) as between:
        for name in ("HTTPS_PROXY", "https_proxy"):
            monkeypatch.setenv(name, between.url)
        monkeypatch.setenv("JDA_BEARER_TOKENS", f"data.example.test={SECRET}")
        source = "webdataset:https://data.example.test/a-{0,1}.tar"
        refuse(source, tmp_path / "out", "a certificate that is not trusted", "SSL_CERT_FILE")
        assert host.seen == []  # nor has the token left
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        assert built(source, tmp_path / "out").fingerprint == local.fingerprint
        assert {(method, path) for method, path, _ in between.seen} == {("CONNECT", "data.example.test:443")}
        assert host.sent("authorization") == {f"Bearer {SECRET}"}


def test_a_bucket_in_the_name_of_its_host(files, local, tmp_path, monkeypatch):
    """AWS_VIRTUAL_HOSTED_STYLE_REQUEST: the endpoint names the bucket, and the path is the key alone."""
    with serve(files) as served:
        bucket = served.s3.removeprefix("s3://")
        port = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])
        with proxy(port) as between:
            for name in ("HTTP_PROXY", "http_proxy"):
                monkeypatch.setenv(name, between.url)
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{bucket}.s3.amazonaws.com")
            monkeypatch.setenv("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "true")
            found = built(f"webdataset:{served.s3}/a-*.tar", tmp_path / "out")
        assert found.fingerprint == local.fingerprint
        assert all(path.startswith(f"http://{bucket}.s3.amazonaws.com/") for _, path, _ in between.seen)
        assert any(path.endswith("com/a-0.tar") for _, path, _ in between.seen)


def test_secrets_are_in_no_output(files, tmp_path, capsys, monkeypatch):
    """Of commands that work, that meet damage, and that fail; in files, on the terminal and on stderr."""
    for number in range(2):
        (tmp_path / f"a-{number}.tar").write_bytes((files / f"a-{number}.tar").read_bytes())
    damaged = bytearray((tmp_path / "a-1.tar").read_bytes())
    damaged[700:900] = bytes(200)
    (tmp_path / "a-1.tar").write_bytes(damaged)

    def check(path: str, headers: dict):
        return wants(SECRET)(path, headers) or Signed({f"{SECRET}+/=": 1})(path, headers)

    said = ""
    with site(tmp_path, check) as host:
        (tmp_path / "list").write_text("".join(signed(f"{host.url}/a-{n}.tar\n", SECRET)[:-1] for n in (0,)) + "\n")
        urls = [signed(f"{host.url}/a-{number}.tar", SECRET) for number in range(2)]
        monkeypatch.setenv("JDA_BEARER_TOKENS", f"{host.host}={SECRET}")
        source = f"webdataset:{{{','.join(urls)}}}"
        code, out, err = command(capsys, "prepare", source, "--out", tmp_path / "data")
        assert code == 0 and "quarantined" in out and "dataset.json keeps signed URLs" in out, err
        said += out + err
        for wrong in (f"{urls[0]}x#y", f"https://me:{SECRET}@host/a.tar", urls[0].replace("a-0", "none")):
            code, out, err = command(capsys, "prepare", f"webdataset:{wrong}", "--out", tmp_path / "no")
            assert code == 2 and err.count("\n") == 1, err
            said += out + err
        monkeypatch.delenv("JDA_BEARER_TOKENS")
        code, out, err = command(capsys, "verify", tmp_path / "none.zarr", "--data", tmp_path / "data")
        assert code == 2
        said += out + err
    kept = "".join(path.read_text("latin1") for path in (tmp_path / "data").iterdir() if path.name != "dataset.json")
    meta = json.loads((tmp_path / "data" / "dataset.json").read_text())
    shown = json.dumps({name: value for name, value in meta.items() if name != "shards"})
    assert len(quarantine(tmp_path / "data")) == 1
    for text in (said, kept, shown):
        assert SECRET not in text and "X-Amz" not in text


def test_a_text_without_its_secrets():
    for text, expected in (
        ("read https://h/a.tar?sig=1%2F2&b=3; found x", "read https://h/a.tar?…; found x"),
        ("'http://h:80/a?b'", "'http://h:80/a?…'"),
        ("https://me:secret@h/a.tar", "https://…@h/a.tar"),
        ("s3://bucket/a?.tar and what?", "s3://bucket/a?.tar and what?"),
        ("is it https://h/a.tar? yes", "is it https://h/a.tar? yes"),
    ):
        assert redacted(text) == expected


def test_the_hub_is_listed_through_proxy_and_authority_too():
    """huggingface_hub takes them from the same variables: its client trusts the environment."""
    code = "from huggingface_hub.utils import get_session; print(get_session()._trust_env)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_the_number_of_requests_for_a_signed_shard(files, tmp_path):
    """Its length takes a byte, for the signature is for GET alone."""
    check = Signed({f"{SECRET}+/=": 1000})
    with site(files, check) as host:
        prepare.build(f"webdataset:{signed(f'{host.url}/a-0.tar', SECRET)}", tmp_path / "out", threads=1)
        assert {method for method, _, _ in host.seen} == {"GET"}
