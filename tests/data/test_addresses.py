"""What a user may write for a place leads there, or the line says what is wrong with it."""

import errno
import os
import resource
from pathlib import Path

import pytest
from support.images import tar
from support.prepared import SMALL, refuse, samples

from cache.errors import UserError
from pipeline.data import prepare, shards
from pipeline.data.addresses import local, resolved
from pipeline.data.index import Index
from pipeline.data.shards import Reader


def test_a_file_url_is_a_path_and_a_file_of_just_that_name_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a b.tar", "file:x.tar", "pipe:y.tar", "p::q.tar", "c%20d.tar"):
        (tmp_path / name).touch()
    assert resolved(f"file://{tmp_path}/a%20b.tar") == f"{tmp_path}/a b.tar"
    assert resolved(f"file://localhost{tmp_path}/a b.tar") == f"{tmp_path}/a b.tar"
    assert resolved(f"file://{tmp_path}/c%20d.tar") == f"{tmp_path}/c%20d.tar"
    assert resolved(f"file:{tmp_path}/a b.tar") == f"{tmp_path}/a b.tar"
    for name in ("file:x.tar", "pipe:y.tar", "p::q.tar", "s3://bucket/x.tar", "https://host/{0..9}.tar"):
        assert resolved(name) == name
    assert resolved("~/x.tar") == os.path.expanduser("~/x.tar")
    for address in ("pipe:cat x.tar", "a.tar::b.tar", "ftp://h/x.tar", "file://other/x.tar"):
        with pytest.raises(UserError, match=r"unknown kind of address; found .*expected a path, file:/path"):
            resolved(address)
    with pytest.raises(UserError, match="another machine"):
        local("s3://bucket/folder")


def test_a_folder_means_its_tars_and_brackets_may_be_part_of_a_name(tmp_path):
    for name in ("a.tar", "b.tar", "c[1].tar", "d{x,y}.tar"):
        tar(tmp_path / name, samples(1, name[0]))
    (tmp_path / "e_stats.json").write_text("{}")
    names = {
        pattern: [os.path.basename(name) for name in Reader().expand(f"{tmp_path}/{pattern}")] for pattern in NAMED
    }
    assert names == NAMED
    prepare.build(f"webdataset:file:{tmp_path}", tmp_path / "out", threads=1)
    assert len(Index.open(tmp_path / "out")) == 4
    facts = prepare.build(f"webdataset:{tmp_path}/[abe]*", tmp_path / "some", threads=1)
    assert facts["good"] == 2 and facts["files"]["left_out"] == {"not a tar": {"json": 1}}
    refuse(f"webdataset:{tmp_path}/e*", tmp_path / "none", "no tar matches", "1 json", "e_stats.json")
    (tmp_path / "empty").mkdir()
    refuse(f"webdataset:{tmp_path}/empty", tmp_path / "none", "no shard in the folder", "*.tar")


NAMED = {
    "": ["a.tar", "b.tar", "c[1].tar", "d{x,y}.tar"],
    "c[1].tar": ["c[1].tar"],
    "d{x,y}.tar": ["d{x,y}.tar"],
    "{a,b}.tar": ["a.tar", "b.tar"],
    "[ab].tar": ["a.tar", "b.tar"],
}


def test_a_fifo_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")
    refuse(f"webdataset:{tmp_path}/*.tar", tmp_path / "out", "pipe.tar", "no regular file")


@pytest.fixture
def many(tmp_path) -> Path:
    for number in range(40):
        tar(tmp_path / f"{number:02d}.tar", [(f"k{number}.jpg", SMALL), (f"k{number}.cls", b"0")])
    prepare.build(f"webdataset:{tmp_path}/*.tar", tmp_path / "out", threads=1)
    return tmp_path / "out"


def test_more_shards_than_the_machine_lets_a_process_open_are_read(many):
    """With room for 24 descriptors beside those that are open; then with two, as others took the rest meanwhile."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 25, limits[1]))
    try:
        for left in (None, 2):
            data = Index.open(many)
            if left:
                with pytest.raises(OSError):
                    while True:
                        taken.append(os.open(os.devnull, os.O_RDONLY))
                for _ in range(left):
                    os.close(taken.pop())
            assert [data.read(row) for row in range(40)] == [SMALL] * 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in taken:
            os.close(descriptor)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_limit_of_the_machine_is_no_damaged_sample(many, monkeypatch, code):
    data = Index.open(many)

    def refused(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(shards.os, "open", refused)
    with pytest.raises(UserError, match="a limit of this machine, no damage") as caught:
        data.read(0)
    assert type(caught.value) is UserError  # and not BadSample, which is skipped
