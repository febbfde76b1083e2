"""A teacher pass as jobs that know nothing of each other: they start and die at will, and one store is the result."""

import dataclasses
import os
import random
import signal
import urllib.request
from pathlib import Path

import obstore
import pytest
from moto.server import ThreadedMotoServer
from obstore.store import S3Store
from support.commands import refused
from support.processes import _stopping, before, forking
from support.stores import files

from cache import UserError
from pipeline.config import PrecomputeTeacher
from pipeline.demo import POLICY
from pipeline.labels import array, precompute

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "NO_PROXY": "127.0.0.1",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def single(digits, teacher, tmp_path_factory) -> PrecomputeTeacher:
    """The store of a single run, of 16 blocks."""
    config = PrecomputeTeacher(
        data=digits,
        teacher=teacher,
        store=str(tmp_path_factory.mktemp("single") / "labels.zarr"),
        views=2,
        codec="int8",
        policy=POLICY,
        batch_size=16,
        block_rows=24,
        device="cpu",
        threads=1,
    )
    precompute.run(config)
    return config


def job(config: PrecomputeTeacher, environment: dict[str, str], dies_at: int | None, ready) -> None:
    """One job of an array, which kills itself before so many objects are written.

    Where there is no store yet, none is made before all jobs are `ready` to: each writes some of it.
    """
    os.environ.update(environment)
    precompute.calibrate = before(precompute.calibrate, ready.wait)
    if dies_at is None:
        precompute.run(config)
    else:
        _stopping(precompute.run, config, "put", dies_at, signal.SIGKILL)


def run(configs: list, environment: dict[str, str], deaths: list[int | None]) -> list[int]:
    """All at once; exit codes."""
    ready = forking().Barrier(len(configs), timeout=600)
    started = zip(configs, deaths, strict=True)
    jobs = [forking().Process(target=job, args=(config, environment, at, ready)) for config, at in started]
    for process in jobs:
        process.start()
    for process in jobs:
        process.join()
    return [process.exitcode for process in jobs]


def array_of(config: PrecomputeTeacher, store: str, count: int) -> list[PrecomputeTeacher]:
    return [dataclasses.replace(config, store=store, array=f"{i}/{count}") for i in range(count)]


def test_one_of_three_jobs_that_survives_does_the_others_work(single, tmp_path):
    """Two die before they commit anything; and a job that comes when all is done does nothing."""
    store = str(tmp_path / "labels.zarr")
    first, *rest = array_of(single, store, 3)
    assert run([first, *rest], {}, [None, 1, 2]) == [0, -9, -9]
    assert files(tmp_path / "labels.zarr") == files(Path(single.store))
    assert precompute.run(rest[1])["pairs"] == 0


def test_jobs_begin_with_blocks_of_their_own_and_end_with_all():
    """Each block is the first choice of exactly one job, and each job's list is the whole one."""
    todo = [([view], block) for view in range(3) for block in range(7)]
    lists = [array.ordered(todo, array.Turn(i, 4)) for i in range(4)]
    assert all(sorted(work) == todo for work in lists)
    own = [[work for work in todo if (work[1] + work[0][0]) % 4 == i] for i in range(4)]
    assert [work[: len(mine)] for work, mine in zip(lists, own, strict=True)] == own
    assert sorted(work for mine in own for work in mine) == todo
    assert len({tuple(map(str, work[len(mine) :][:1])) for work, mine in zip(lists, own, strict=True)}) == 4
    assert array.ordered(todo, None) == todo


@pytest.mark.parametrize("text", ["3", "3/3", "-1/3", "a/b", "1/", "0/0", "1/3/5"])
def test_an_array_that_is_none_is_one_line(text):
    with pytest.raises(UserError, match=f"--array cannot be read; found {text}, expected I/N.*fix: "):
        array.turn(text)


def test_a_wrong_array_makes_no_store(capsys, single, tmp_path):
    arguments = ("--data", single.data, "--teacher", single.teacher, "--views", 2, "--policy", POLICY)
    refused(capsys, "precompute-teacher", *arguments, "--store", tmp_path / "s", "--array", "3/3", "--device", "cpu")
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_twelve_jobs_of_which_half_are_killed_fill_a_bucket(single):
    """Each before a random object, and half of those again; the bucket is the folder of a single run, byte for byte."""
    dice = random.Random(24)
    moto = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    moto.start()
    try:
        endpoint = "http://{}:{}".format(*moto.get_host_and_port())
        environment = ENVIRONMENT | {"AWS_ENDPOINT_URL": endpoint}
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/array", method="PUT")).close()
        jobs = array_of(single, "s3://array/labels", 12)
        deaths = [dice.randint(1, 60) if i % 2 else None for i in range(12)]
        codes = run(jobs, environment, deaths)
        assert all(code == 0 for code in codes[::2]) and -9 in codes[1::2], codes
        run(jobs[1::2], environment, [dice.randint(1, 60), None] * 3)
        options = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region": "us-east-1"}
        bucket = S3Store("array", endpoint=endpoint, client_options={"allow_http": True}, **options)
        found = {}
        for entry in obstore.list(bucket).collect():
            content = obstore.get(bucket, entry["path"]).bytes().to_bytes()
            found[entry["path"].removeprefix("labels/")] = content
    finally:
        moto.stop()
    assert found == files(Path(single.store))
