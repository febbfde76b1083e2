"""A store that is copied is the same, byte for byte, wherever it goes; one that is pruned is as if never larger."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from support.stores import assert_exact, chunk, content, files, fill, key_hash, make, manifest, status, zipped

import cache
from cache import UserError
from cache.store import objects
from pipeline import cli


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return Path(fill(make(tmp_path_factory.mktemp("whole") / "s.zarr")).path)


@pytest.fixture
def partial(tmp_path) -> cache.Store:
    """Without two of its blocks."""
    store = make(tmp_path / "partial.zarr")
    for view, block in store.missing_blocks()[:-2]:
        store.write_block(view, block, *content(store, view, block))
    return store


def test_a_copy_that_was_killed_resumes_and_reads_no_block_twice(whole, tmp_path, monkeypatch):
    store, to, puts, put = cache.open(whole), tmp_path / "copy.zarr", [], objects.Files.put

    def failing(self, key, data):
        puts.append(key)
        if len(puts) == 12:
            raise UserError("killed")
        put(self, key, data)

    monkeypatch.setattr(objects.Files, "put", failing)
    with pytest.raises(UserError, match="killed"):
        cache.copy(store, to)
    monkeypatch.undo()
    left = cache.open(to).missing_blocks()
    assert 0 < len(left) < 6
    read, read_block = [], cache.Store.read_block
    monkeypatch.setattr(cache.Store, "read_block", lambda self, *at: (read.append(at), read_block(self, *at))[1])
    seen = []
    cache.copy(store, to, lambda *done: seen.append(done))
    assert sorted(read) == left and seen[-1] == (6, 6)
    assert files(to) == files(whole)


def test_missing_blocks_stay_missing_and_are_added_later(partial, tmp_path):
    copied = cache.copy(partial, tmp_path / "copy.zarr")
    assert copied.missing_blocks() == partial.missing_blocks() != []
    fill(partial)
    assert cache.copy(partial, tmp_path / "copy.zarr").missing_blocks() == []
    assert files(tmp_path / "copy.zarr") == files(Path(partial.path))


def test_damage_is_not_copied(whole, tmp_path, monkeypatch):
    path = Path(shutil.copytree(whole, tmp_path / "s.zarr"))
    for name in ("pairs", "weight"):  # of two stores' blocks: each is sound in itself
        shutil.copy(chunk(path, name, 0, 0), chunk(path, name, 1, 1))
    with pytest.raises(UserError, match=r"damaged.*view 1, block 1"):
        cache.copy(cache.open(path), tmp_path / "copy.zarr")
    assert (1, 1) in cache.open(tmp_path / "copy.zarr").missing_blocks()


def test_another_store_or_anything_else_is_in_the_way(whole, tmp_path):
    make(tmp_path / "other.zarr", teacher_weights="w2")
    before = files(tmp_path / "other.zarr")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/mine").write_text("precious")
    for name, fact in (("other.zarr", "another zarr.json"), ("folder", "exists")):
        with pytest.raises(UserError, match=f"{fact}.*fix: "):
            cache.copy(cache.open(whole), tmp_path / name)
    with pytest.raises(UserError, match="onto itself"):
        cache.copy(cache.open(whole), whole)
    assert files(tmp_path / "other.zarr") == before and (tmp_path / "folder/mine").read_text() == "precious"


@pytest.mark.parametrize("packs", [False, True])
def test_a_pruned_store_is_one_of_fewer_views_and_can_grow_again(tmp_path, monkeypatch, packs):
    changes = zipped(monkeypatch) if packs else {}
    store = cache.prune(fill(make(tmp_path / "s", **changes)), 1)
    assert files(tmp_path / "s") == files(Path(fill(make(tmp_path / "one", views=1, **changes)).path))
    assert_exact(store, 0)
    for views in (0, 2):
        with pytest.raises(UserError, match=r"pruned to some of its views; found .*expected 1 to 1"):
            cache.prune(store, views)
    grown = cache.extend(store, manifest(**changes), status(), key_hash())
    assert grown.missing_blocks() == [(1, block) for block in range(3)]
    assert_exact(fill(grown), 1)


def test_pruning_that_was_killed_is_finished_by_pruning_again(whole, tmp_path, monkeypatch):
    path = Path(shutil.copytree(whole, tmp_path / "s"))

    def killed(*_):
        raise UserError("killed")

    for method in ("delete", "put"):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="killed"):
            patch.setattr(objects.Files, method, killed)
            cache.prune(cache.open(path), 1)
        assert_exact(cache.open(path), 0)
    cache.prune(cache.open(path), 1)
    assert files(path) == files(Path(fill(make(tmp_path / "one", views=1)).path))


def test_the_command_prints_prunes_and_copies(whole, tmp_path, capsys):
    path = str(shutil.copytree(whole, tmp_path / "s.zarr"))

    def ran(*arguments: str) -> tuple[int, str]:
        code = cli.main(["store", *arguments])
        said = capsys.readouterr()
        return code, " ".join((said.err if code else said.out).split())

    on_disk = sum(len(data) for data in files(whole).values())
    code, out = ran("info", path)
    assert code == 0 and "6 of 6" in out and f"{on_disk / (2 * 2 * 50):.1f} bytes per vector" in out
    code, out = ran("copy", path, "--to", str(tmp_path / "copy.zarr"))
    assert code == 0 and files(tmp_path / "copy.zarr") == files(whole)
    code, out = ran("prune", path, "--views", "1")
    assert code == 0 and cache.open(path).manifest.views == 1 and "freed" in out
    for wrong in (("copy", path), ("prune", path), ("info", path, "--views", "1"), ("prune", path, "--views", "3")):
        code, err = ran(*wrong)
        assert code == 2 and err.startswith("error: ") and "fix: " in err
    np.testing.assert_array_equal(cache.open(path).load_plane(0).weight, cache.open(whole).load_plane(0).weight)
