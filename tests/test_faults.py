"""A stage that is stopped or finds the disk full leaves nothing half-made, and the same command again is as if nothing
had been. A training's stops are in tests/training/test_signals.py, its disk in tests/test_cli.py."""

import io
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.commands import command, refused
from support.processes import before, exit_code
from support.stores import files

import cache
from cache.store.objects import Files
from pipeline.__main__ import main
from pipeline.data.index import Index
from pipeline.demo import POLICY


def stopping(arguments: list[str], event: str, at: int, number: int) -> None:
    """The command, in this process, which sends itself a signal at the `at`-th event."""
    sys.stderr = sys.stdout = io.StringIO()
    seen = itertools.count(1)

    def happened() -> None:
        if next(seen) == at:
            os.kill(os.getpid(), number)

    if event == "put":
        Files._put = before(Files._put, happened)
    else:
        sys.addaudithook(lambda name, about: happened() if name == "open" and ".partial" in str(about[0]) else None)
    sys.argv = ["pipeline", *arguments]
    sys.exit(main())


def stopped(arguments: list, event: str, at: int, number: int) -> int | None:
    """Exit code of the command in a child that stops itself."""
    return exit_code(stopping, [str(argument) for argument in arguments], event, at, number)


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)]


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_prepare_stopped_while_it_writes_and_run_again(tmp_path, capsys, number, code):
    """At its first and a later file; OUT is not there, and then it is the one of a run that nobody stopped."""
    source = ("prepare", "synthetic:10", "--shard-size", 2, "--classes", 3)
    assert command(capsys, *source, "--out", tmp_path / "whole")[0] == 0
    for at in (1, 4):
        out = tmp_path / f"out{at}"
        assert stopped([*source, "--out", out], "open", at, number) == code
        assert not out.exists()
        assert command(capsys, *source, "--out", out)[0] == 0
        ours, whole = Index.open(out), Index.open(tmp_path / "whole")
        assert ours.records.tobytes() == whole.records.tobytes() and ours.fingerprint == whole.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out1", "out4", "whole"]  # no remains


def teacher_pass(digits, teacher, store, *options) -> list:
    return ["precompute-teacher", "--data", digits, "--teacher", teacher, "--store", store, "--views", 2, "--policy",
            POLICY, "--codec", "int8", "--block-rows", 64, "--device", "cpu", "--threads", 1, *options]  # fmt: skip


@pytest.fixture(scope="module")
def whole(digits, teacher, tmp_path_factory) -> Path:
    from pipeline import cli

    store = tmp_path_factory.mktemp("whole") / "labels.zarr"
    assert cli.main([str(word) for word in teacher_pass(digits, teacher, store)]) == 0
    return store


@pytest.mark.parametrize(("number", "code"), SIGNALS[:2])  # SIGKILL: tests/labels/test_precompute.py
def test_a_teacher_pass_stopped_between_blocks_and_run_again(digits, teacher, whole, tmp_path, capsys, number, code):
    store = tmp_path / "labels.zarr"
    assert stopped(teacher_pass(digits, teacher, store), "put", 20, number) == code
    missing = cache.open(store).missing_blocks()
    assert 0 < len(missing) < cache.open(whole).manifest.blocks * 2
    assert command(capsys, *teacher_pass(digits, teacher, store))[0] == 0
    assert files(store) == files(whole)


def test_a_teacher_pass_goes_on_with_another_batch_size_and_threads(digits, teacher, whole, tmp_path, capsys):
    """Pixels are the same bit for bit; logits may differ in their last bits, and w with them."""
    store = tmp_path / "labels.zarr"
    stopped(teacher_pass(digits, teacher, store), "put", 20, signal.SIGKILL)
    options = ("--batch-size", 7, "--views-per-decode", 2)
    assert command(capsys, *teacher_pass(digits, teacher, store, *options))[0] == 0
    for view in range(2):
        ours, theirs = (cache.open(place).load_plane(view) for place in (store, whole))
        np.testing.assert_array_equal(ours.digest, theirs.digest)
        np.testing.assert_allclose(ours.weight, theirs.weight, atol=1e-5)
        assert (ours.codes != theirs.codes).mean() < 0.01


@pytest.fixture
def disk(tmp_path):
    """A file system of 200 kB that can grow."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options: str) -> None:
        done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no right to mount: {done.stderr.strip()}")

    mount("-t", "tmpfs", "-o", "size=200k", "tmpfs")
    try:
        yield folder, lambda size: mount("-o", f"remount,size={size}")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset's writer, half closed
def test_a_full_disk_while_shards_a_copy_or_a_page_is_written(disk, digits, whole, tmp_path, capsys):
    """One line each; nothing is left in the way, and with room the same command does it."""
    folder, grow = disk
    commands = {
        "data": ("prepare", "synthetic:60", "--out", folder / "data"),
        "copy.zarr": ("store", "copy", whole, "--to", folder / "copy.zarr"),
        "page.html": ("inspect", whole, "--data", digits, "--out", folder / "page.html", "--samples", 1),
    }
    (folder / "filler").write_bytes(bytes(180_000))
    for name, words in commands.items():
        error = refused(capsys, *words)
        assert "No space left" in error and "fix: " in error, error
        assert name == "copy.zarr" or not (folder / name).exists()
    grow("40m")
    for name, words in commands.items():
        code, _, err = command(capsys, *words)
        assert code == 0 and (folder / name).exists(), err
    assert files(folder / "copy.zarr") == files(whole)
    assert {path.name for path in folder.iterdir()} == {"filler", *commands}
