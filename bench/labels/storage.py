"""How fast one view's labels come off a disk: this store, zarr by three readers, and the disk itself.

The files are those of one raw store, `SAMPLES` rows of two times 256 random bytes, as large as one view of ImageNet-1k.
Every read is cold: the files' pages are dropped from memory before it.
"""

import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

import cache
from bench import harness
from bench.harness import Slot
from cache import Manifest, UserError
from cache import codec as codecs
from cache.store.blocks import Store

SAMPLES = 1_281_167
REFERENCE = "plain read"
_CLASSES = 128  # fp16: codes of 2 x 256 bytes
_GATHERED = 1024
_BLOCK_ROWS = 8192


def compare(work: Path | None, rounds: int, samples: int) -> dict:
    """`arms` for `harness.document` (items are bytes of `pairs`), a `table` of rates, and times of `access`."""
    path = harness.work(work) / f"plane-{samples}"
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(path.parent).free < 2 * samples * 4 * _CLASSES:
        raise UserError(f"no room for a plane under {path.parent}", expected=f"{samples * 8 * _CLASSES} bytes free")
    try:
        store, written = _written(path, samples)
        pairs = samples * store.codec.row_bytes
        arms = {
            REFERENCE: partial(_plain, path),
            "this store": partial(store.load_plane, 0),
            "zarr-python": partial(_zarr, path, None),
            "zarrs": partial(_zarr, path, "zarrs.ZarrsCodecPipeline"),
            "tensorstore": partial(_tensorstore, path),
        }
        slots = harness.compare({name: partial(_cold, path, pairs, arm) for name, arm in arms.items()}, rounds)
        found = harness.summarise(slots, REFERENCE)
        table = [
            {"reader": name, "MB/s": arm["rate"]["median"] / 1e6, "of plain read": arm["ratio"]["median"]}
            for name, arm in found.items()
        ]
        plane, rng = store.load_plane(0), np.random.default_rng(0)
        gather = harness.median_ms(lambda: plane.gather(rng.integers(0, samples, _GATHERED)))
        random = harness.median_ms(lambda: _random_rows(path, rng.integers(0, samples, _GATHERED)), 0.0)
        access = [
            {"access": f"{_GATHERED:,} random rows of a plane in memory", "ms": gather},
            {"access": f"{_GATHERED:,} random rows of the store by zarr-python", "ms": random},
            {"access": "a block written, 4 MB", "ms": 1e3 * _BLOCK_ROWS * store.codec.row_bytes / written},
        ]
        return {"arms": found, "table": table, "access": access}
    finally:
        shutil.rmtree(path, ignore_errors=True)


def plain_manifest(samples: int, classes: int, codec: codecs.Codec, block_rows: int) -> Manifest:
    """Of a store of one view of nothing in particular."""
    return Manifest(
        dataset="bench",
        samples=samples,
        classes=classes,
        teacher="bench",
        teacher_weights="bench",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        policy={},
        base={},
        seed=0,
        views=1,
        size=1,
        decoder={},
        codec=codec.config,
        block_rows=block_rows,
        versions={},
    )


def _written(path: Path, samples: int) -> tuple[Store, float]:
    """A full store of one view, and bytes per second of writing it to the disk."""
    codec = codecs.make("fp16", classes=_CLASSES)
    manifest = plain_manifest(samples, _CLASSES, codec, _BLOCK_ROWS)
    store = cache.create(path, manifest, np.zeros(samples, np.uint8), np.arange(samples, dtype=np.uint64))
    rng, seconds = np.random.default_rng(0), 0.0
    for view, block in store.missing_blocks():
        start, stop = store.block_range(block)
        count = stop - start
        codes = rng.integers(0, 256, (count, codec.row_bytes), np.uint8)
        begin = time.perf_counter()
        store.write_block(view, block, codes, np.ones(count, np.float32), np.zeros((count, 2), np.uint32))
        seconds += time.perf_counter() - begin
    begin = time.perf_counter()
    os.sync()
    return store, samples * codec.row_bytes / (seconds + time.perf_counter() - begin)


def _cold(path: Path, pairs: int, read: Callable[[], object]) -> Slot:
    """One read with none of the files in memory."""
    for file in path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    cpu = time.process_time()
    begin = time.perf_counter()
    read()
    seconds = time.perf_counter() - begin
    return Slot(pairs, seconds, time.process_time() - cpu, {}, *harness.memory_bytes())


def _plain(path: Path) -> None:
    """The label files, one after the other, into one buffer."""
    buffer = memoryview(bytearray(8 << 20))
    for file in sorted((path / "pairs").rglob("*")):
        if file.is_file():
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass


def _zarr(path: Path, pipeline: str | None) -> np.ndarray:
    import zarr

    with zarr.config.set({"codec_pipeline.path": pipeline} if pipeline else {}):
        if pipeline:
            import zarrs  # noqa: F401 - registers its pipeline
        return np.asarray(zarr.open_array(path, path="pairs", mode="r")[0])


def _tensorstore(path: Path) -> np.ndarray:
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path / 'pairs'}/"}}
    return tensorstore.open(spec, read=True).result()[0].read().result()


def _random_rows(path: Path, rows: np.ndarray) -> None:
    import zarr

    zarr.open_array(path, path="pairs", mode="r").oindex[0, np.unique(rows)]
