"""Machines as people have them: systems, versions and processors, read-only data, little shared memory, no mmap."""

import ast
import errno
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba import njit
from support.stores import fill, make

import cache
from cache import UserError
from cache.store import planes, shared
from kernels.jda import simd
from pipeline.data.index import Index

ROOT = Path(__file__).parents[2]
SOURCES = [path for room in ("pipeline", "cache", "kernels", "bench") for path in sorted((ROOT / room).rglob("*.py"))]
GONE = {  # from the standard library, in 3.12, 3.13 and 3.14, by their release notes
    *("asynchat", "asyncore", "distutils", "imp", "smtpd"),
    *("aifc", "audioop", "cgi", "cgitb", "chunk", "crypt", "imghdr", "lib2to3", "mailcap", "msilib", "nis", "nntplib"),
    *("ossaudiodev", "pipes", "sndhdr", "spwd", "sunau", "telnetlib", "uu", "xdrlib"),
}


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_another_system_is_told_so_before_anything_of_linux_is_imported(system):
    code = f"""
import sys
import pipeline
from pipeline import __main__
sys.platform = {system!r}
sys.modules.update(dict.fromkeys(("fcntl", "resource", "tyro", "torch")))
print(__main__.main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "2\n", done.stderr
    assert done.stderr.startswith(f"error: this runs on Linux only; found {system}, expected linux; fix: ")
    assert done.stderr.count("\n") == 1


def test_the_text_is_that_of_python_3_11_and_imports_nothing_that_later_ones_lack():
    for path in SOURCES:
        tree = ast.parse(path.read_text(), str(path), feature_version=(3, 11))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {name.partition(".")[0] for name in names} & GONE, path


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.11", "3.14"])
def test_types_hold_for_the_oldest_and_the_newest_python(version):
    """With pyright's own description of each version's standard library."""
    command = [Path(sys.executable).parent / "pyright", "--pythonversion", version, "cache", "pipeline/system"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


COMPILED = """
import sys
from llvmlite import binding
binding.initialize_all_targets()
binding.initialize_all_asmprinters()
target = binding.Target.from_triple("aarch64-unknown-linux-gnu").create_target_machine(cpu="generic")
module = binding.parse_assembly(sys.stdin.read())
module.triple, module.data_layout = "aarch64-unknown-linux-gnu", str(target.target_data)
module.verify()
print(binding.__name__, len(target.emit_object(module)))
"""


@pytest.mark.parametrize("name", ["look_up", "weigh_rows"])
def test_the_vector_code_compiles_for_aarch64(name):
    """As it is written, before any processor's own instructions: those of AVX-512 are in `_look_up` alone."""
    options = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "_nrt": False}  # the kernel alone
    if name == "look_up":
        function = njit("void(u1[::1], i8, u1[:, ::1], u1[::1])", **options)(
            lambda row, at, lut, out: simd._look_up_scalar(row, at, lut, out)
        )
    else:
        function = njit("void(u1[::1], UniTuple(i8, 4), i4[::1], u1[::1])", **options)(
            lambda pixels, rows, taps, out: simd.weigh_rows(pixels, 0, rows, taps, 0, 1, out, 0, rows)
        )
    (text,) = function.inspect_llvm().values()
    assert "llvm.x86" not in text
    plain = [line for line in text.splitlines() if not line.startswith(("target ", "attributes "))]
    plain = [line.replace("#0", "").replace("#1", "").replace("#2", "").replace("#3", "") for line in plain]
    done = subprocess.run([sys.executable, "-c", COMPILED], input="\n".join(plain), capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout.split()[1]) > 500, done.stderr[-1500:]


@pytest.fixture
def unmapped(monkeypatch):
    """No file can be mapped, as on some file systems in user space; memory can."""
    real = mmap.mmap

    def refuse(number, *arguments, **options):
        if number == -1:
            return real(number, *arguments, **options)
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(mmap, "mmap", refuse)


def test_without_mmap_an_index_is_read_and_a_mapped_plane_refused(mixed, tmp_path, unmapped):
    index = Index.open(mixed.path)
    assert type(index.records) is np.ndarray and index.records.tobytes() == mixed.records.tobytes()
    assert index.fingerprint == mixed.fingerprint
    store = fill(make(tmp_path / "s"))
    (plane,) = planes.planes(store, [0])
    assert len(plane.codes) == store.manifest.samples
    with pytest.raises(UserError, match=r"cannot map a plane in .*found No such device.*fix: .*disk that maps files"):
        list(planes.planes(store, [0], mode="mmap", folder=tmp_path))
    with pytest.raises(UserError, match=r"cannot map a plane in .*No such device"):
        shared.load(store, 0, shared.Share("j", 0, 1, tmp_path))


@pytest.fixture
def disk(tmp_path):
    """A file system of 64 MB."""
    (tmp_path / "disk").mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(tmp_path / "disk")], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no right to mount: {done.stderr.strip()}")
    try:
        yield tmp_path / "disk"
    finally:
        subprocess.run(["umount", str(tmp_path / "disk")], check=True)


@pytest.mark.parametrize(("samples", "fits"), [(50, True), (2_000_000, True), (3_000_000, False)])
def test_64_mb_of_shared_memory_take_planes_that_fit_twice(disk, tmp_path, samples, fits):
    """Of int8 with 5 classes: 18 bytes a sample and 8 beside, so that 1,290,555 samples fit; see the next line."""
    store = make(tmp_path / "s", samples=50)
    bytes_per_sample = store.codec.row_bytes + 8
    most = (64 << 20) // (2 * bytes_per_sample)
    wanted = {50: 50, 2_000_000: most - 1, 3_000_000: most + 1}[samples]
    object.__setattr__(store.manifest, "samples", wanted)
    assert shared.room(store, shared.Share("j", 0, 1, disk)) is fits


def test_a_read_only_folder_of_data_is_read(disk, mixed):
    shutil.copytree(mixed.path, disk / "data")
    for shard in mixed.shards:
        shutil.copy(shard, disk)
    meta = (disk / "data" / "dataset.json").read_text()
    (disk / "data" / "dataset.json").write_text(meta.replace(str(Path(mixed.shards[0]).parent), str(disk)))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    index = Index.open(disk / "data")
    assert all(index.read(int(row)) == mixed.read(int(row)) for row in index.good)
    assert cache.exists(disk / "data")  # something is there, and it is no store
    with pytest.raises(OSError, match="Read-only"):
        (disk / "data" / "x").touch()
