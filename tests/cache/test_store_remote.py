"""A store on a server of the S3 protocol is the store in a folder, also while the network fails."""

import logging
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import obstore
import pytest
import zarr
from moto.server import ThreadedMotoServer
from obstore.store import S3Store, from_url
from support.remote_servers import Remote, hurry, serve
from support.stores import VIEWS, assert_exact, content, files, fill, key_hash, make, manifest, status, zipped
from zarr.storage import ObjectStore

import cache
from cache import UserError
from cache.store import retry
from pipeline.config import PrecomputeTeacher, TrainStudent
from pipeline.demo import POLICY
from pipeline.labels import precompute
from pipeline.training import train_student

BUCKET = "s3://labels"


@pytest.fixture(scope="module")
def there() -> Iterator[dict[str, str]]:
    """The environment that leads to a bucket that can be written to."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    moto.start()
    endpoint = "http://{}:{}".format(*moto.get_host_and_port())
    environment = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
    environment |= {"AWS_ENDPOINT_URL": endpoint, "NO_PROXY": "127.0.0.1"}
    try:
        with mock.patch.dict(os.environ, environment):
            urllib.request.urlopen(urllib.request.Request(f"{endpoint}/labels", method="PUT")).close()
        yield environment
    finally:
        moto.stop()


@pytest.fixture
def server(there, monkeypatch) -> None:
    """For the test alone, as other servers of this file have an environment too."""
    for name, value in there.items():
        monkeypatch.setenv(name, value)


def objects(url: str) -> dict[str, bytes]:
    bucket = from_url(url, client_options={"allow_http": True})
    listed = obstore.list(bucket).collect()
    return {entry["path"]: obstore.get(bucket, entry["path"]).bytes().to_bytes() for entry in listed}


@pytest.mark.parametrize("packs", [False, True])
def test_a_store_made_on_a_server_is_the_one_made_in_a_folder(server, tmp_path, monkeypatch, packs):
    changes = zipped(monkeypatch) if packs else {}
    url = f"{BUCKET}/deep/{packs}/s.zarr"
    assert not cache.exists(url)
    store = make(url, **changes)
    assert store.path == url and store.missing_blocks() == [(v, block) for v in range(VIEWS) for block in range(3)]
    assert cache.exists(url)
    fill(store)
    local = fill(make(tmp_path / "s", **changes))
    assert objects(url) == files(tmp_path / "s")
    store = cache.open(url + "/")
    assert store.path == url
    for view in range(VIEWS):
        assert_exact(store, view)
        for name in ("codes", "weight", "digest", "good"):
            np.testing.assert_array_equal(*(getattr(s.load_plane(view), name) for s in (store, local)))
    assert store.label_bytes() == local.label_bytes()
    group = zarr.open_group(ObjectStore(from_url(url, client_options={"allow_http": True}), read_only=True), mode="r")
    np.testing.assert_array_equal(group["key_hash"][:], key_hash())
    np.testing.assert_array_equal(group["weight"][1], local.load_plane(1).weight)


def test_a_copy_to_a_server_and_back_is_byte_identical(server, tmp_path):
    local = fill(make(tmp_path / "s"))
    there = cache.copy(local, f"{BUCKET}/copied/s.zarr")
    assert there.path == f"{BUCKET}/copied/s.zarr" and there.missing_blocks() == []
    assert objects(f"{BUCKET}/copied/s.zarr") == files(tmp_path / "s")
    back = cache.copy(there, tmp_path / "back")
    assert files(tmp_path / "back") == files(tmp_path / "s")
    assert_exact(back, 1)


def test_a_copy_to_a_server_that_was_killed_goes_on_where_it_was(server, tmp_path, monkeypatch):
    local, url = fill(make(tmp_path / "s")), f"{BUCKET}/killed/s.zarr"
    put, puts, read, read_block = cache.store.objects.Files.put, [], [], cache.Store.read_block

    def failing(self, key, data):
        puts.append(key)
        if len(puts) == 12:
            raise UserError("killed")
        put(self, key, data)

    monkeypatch.setattr(cache.store.objects.Files, "put", failing)
    with pytest.raises(UserError, match="killed"):
        cache.copy(local, url)
    left = cache.open(url).missing_blocks()
    assert 0 < len(left) < VIEWS * local.manifest.blocks
    monkeypatch.setattr(cache.Store, "read_block", lambda self, *at: (read.append(at), read_block(self, *at))[1])
    cache.copy(local, url)
    assert sorted(read) == left and objects(url) == files(tmp_path / "s")


def test_a_store_on_a_server_grows(server, tmp_path):
    url, new = f"{BUCKET}/grown", dict(samples=60, views=3, dataset="larger")
    store = fill(make(url))
    fill(cache.extend(store, manifest(**new), status(60), key_hash(60)))
    fill(make(tmp_path / "s", **new))
    assert objects(url) == files(tmp_path / "s")


def test_a_store_on_a_server_is_not_overwritten(server):
    url = f"{BUCKET}/twice"
    make(url)
    before = objects(url)
    with pytest.raises(UserError, match=f"{url} exists; fix: "):
        make(url)
    with (
        mock.patch.object(cache.store.making, "exists", lambda place: False),
        pytest.raises(UserError, match=f"{url} exists; found a store that another process has just made"),
    ):
        make(url, seed=1)
    assert objects(url) == before


def test_a_server_without_conditional_writes_will_do(server, monkeypatch):
    monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    store = fill(make(f"{BUCKET}/plain"))
    assert_exact(store, 1)
    with mock.patch.object(cache.store.making, "exists", lambda place: False), pytest.raises(UserError, match="exists"):
        make(f"{BUCKET}/plain", seed=1)
    assert cache.open(f"{BUCKET}/plain").manifest == store.manifest


@pytest.fixture
def at_once(monkeypatch) -> None:
    """No error may be waited for that the next try would meet again."""
    monkeypatch.setattr(retry.time, "sleep", lambda seconds: pytest.fail("tried again"))


def test_what_is_missing_on_a_server_is_named(server, at_once):
    with pytest.raises(UserError, match=f"no store at {BUCKET}/none; fix: "):
        cache.open(f"{BUCKET}/none")
    for url in ("s3://nobucket/s", "s3://nobucket"):
        with pytest.raises(UserError, match=f"no store at {url}; fix: "):
            cache.open(url)
        with pytest.raises(UserError, match=f"cannot (read|write) store {url}; found NoSuchBucket; fix: "):
            make(url)
    store = fill(make(f"{BUCKET}/harmed"))
    bucket = S3Store("labels", prefix="harmed", client_options={"allow_http": True})
    obstore.delete(bucket, "weight/c/1/2")
    with pytest.raises(
        UserError, match=rf"array weight, view 1, block 2; found no {BUCKET}/harmed/weight/c/1/2; fix: "
    ):
        store.load_plane(1)
    obstore.delete(bucket, "commit/c/1/2")
    assert store.missing_blocks() == [(1, 2)]
    assert_exact(fill(store), 1)
    obstore.delete(bucket, "zarr.json")
    with pytest.raises(UserError, match="is not a store"):
        cache.open(f"{BUCKET}/harmed")


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Remote]:
    folder = tmp_path_factory.mktemp("served")
    fill(make(folder / "s.zarr"))
    with serve(folder) as served:
        yield served


@pytest.fixture
def remote(served, monkeypatch) -> Remote:
    """A finished store behind a proxy that makes faults; it passes on reads alone."""
    for name, value in served.environment.items():
        monkeypatch.setenv(name, value)
    return served


@pytest.fixture
def impatient(monkeypatch) -> None:
    hurry(monkeypatch)


@pytest.mark.parametrize("kind", ["reset", "503", "short", "cut", "reset in body"])
def test_a_plane_is_exact_though_a_tenth_of_the_requests_fail(remote, impatient, kind):
    remote.faults.clear()
    remote.faults.rate, remote.faults.kinds = 0.1, (kind,)
    for _ in range(3):
        store = cache.open(f"{remote.s3}/s.zarr")
        for view in range(VIEWS):
            assert_exact(store, view)
    assert remote.faults.made[kind] > 5


@pytest.mark.parametrize("kind", ["503", "short", "reset"])
def test_a_server_that_fails_for_good_is_no_damage(remote, impatient, kind):
    remote.faults.clear()
    store = cache.open(f"{remote.s3}/s.zarr")
    remote.faults.rate, remote.faults.kinds = 1, (kind,)
    for read in (lambda: store.load_plane(1), lambda: cache.open(f"{remote.s3}/s.zarr"), store.missing_blocks):
        with pytest.raises(UserError, match=r"^cannot read store s3://tars-\d+/s\.zarr; found [^\n]*; fix: check"):
            read()
    with pytest.raises(UserError, match=r"^cannot write store s3://.*; found [^\n]*; fix: "):
        store.write_block(0, 0, *content(store, 0, 0))
    remote.faults.clear()
    assert_exact(store, 1)


def test_no_credentials_are_said_to_be_missing(server, monkeypatch, at_once):
    """Nobody answers at the address where a cloud machine would find its own."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(retry.CLIENT["retry_config"], "max_retries", 0)
    with pytest.raises(UserError, match=r"cannot read store s3://.*; found no AWS credentials; fix: "):
        cache.open(f"{BUCKET}/x")


def test_teacher_and_student_work_on_a_store_behind_a_url(server, digits, teacher, tmp_path, monkeypatch):
    """Labels and weights are those of a store in a folder."""

    def job(store: str, out: Path) -> bytes:
        common = {"data": digits, "device": "cpu", "batch_size": 16, "store": store}
        code = {"codec": "subspace", "kl_budget": 1e-5, "block_rows": 64}
        for views in (1, 2):  # the second run adds a view
            precompute.run(PrecomputeTeacher(**common, **code, teacher=teacher, views=views, policy=POLICY))
        train_student.run(TrainStudent(**common, student="cifar/resnet8", out=out, epochs=2, lr=0.05))
        return (out / "model.safetensors").read_bytes()

    url = f"{BUCKET}/job/labels.zarr"
    assert job(url, tmp_path / "a") == job(str(tmp_path / "labels.zarr"), tmp_path / "b")
    assert objects(url) == files(tmp_path / "labels.zarr")
