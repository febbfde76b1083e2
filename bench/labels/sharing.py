"""What the processes of one machine take to share a plane: memory in all, and time until each has it.

Each process maps the plane that all of them unpack (`cache.store.shared`). A process has one core, as a rank of many
has, and so one thread; those of `PROCESSES` take turns, a round after another. Memory is the proportional set size of
the mappings, a page that eight processes map counting once, in planes; labels are compared by their CRC-32. The store
is of `SAMPLES` packed pairs of 1000 classes.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np

import cache
from bench import harness
from bench.labels.storage import plain_manifest
from cache import codec as codecs
from cache.store.blocks import Store

PROCESSES = (1, 2, 8)
ROUNDS = 5
SAMPLES = 65_536
_CLASSES, _DIRECTIONS, _BLOCK_ROWS = 1000, 64, 4096
_FOLDER = Path("/dev/shm")


def compare(work: Path | None) -> list[dict]:
    """A row for each number of processes: planes in memory, seconds with quartiles, whether labels are the same."""
    path = harness.work(work) / "shared-plane"
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        store = _written(path)
        plane = store.load_plane(0)
        size, crc = plane.codes.nbytes + 8 * len(plane.codes), zlib.crc32(plane.codes.tobytes())
        del plane
        rounds = [[_row(path, world, size, crc) for world in PROCESSES] for _ in range(ROUNDS)]
        return [_summary(list(rows)) for rows in zip(*rounds, strict=True)]
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _summary(rows: list[dict]) -> dict:
    seconds = harness.spread(row["seconds"] for row in rows)
    same = "same" * all(row["labels"] for row in rows)
    return rows[-1] | {"seconds": seconds["median"], "q1": seconds["q1"], "q3": seconds["q3"], "labels": same}


def _row(path: Path, world: int, size: int, crc: int) -> dict:
    job = f"bench-{world}-{time.time_ns()}"
    command = [sys.executable, "-m", "bench.labels.sharing", str(path), job]
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen([*command, str(rank), str(world)], stdin=pipe, stdout=pipe, text=True) for rank in range(world)
    ]
    try:
        for process in processes:
            _answer(process)  # it has imported what it needs
        begin = time.perf_counter()
        for process in processes:
            _go(process)
        for process in processes:
            _answer(process)
        seconds, held = time.perf_counter() - begin, 0
        same = all([_answer(process) == crc for process in processes])
        for process in processes:
            _go(process)
            held += _answer(process)
        return {"processes": world, "planes in memory": held / size, "seconds": seconds, "labels": "same" * same}
    finally:
        for process in processes:
            process.communicate("\n" * 3)


def _go(process: subprocess.Popen) -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def _answer(process: subprocess.Popen) -> int:
    assert process.stdout
    return json.loads(process.stdout.readline())


def _written(path: Path) -> Store:
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(_DIRECTIONS, _CLASSES)).astype(np.float32)
    logits = rng.normal(size=(_BLOCK_ROWS, 2, _DIRECTIONS)).astype(np.float32) @ mixed
    codec = codecs.fit("subspace", logits[:1024], kl=0.05)
    manifest = plain_manifest(SAMPLES, _CLASSES, codec, _BLOCK_ROWS)
    store = cache.create(path, manifest, np.zeros(SAMPLES, np.uint8), np.arange(SAMPLES, dtype=np.uint64))
    for view, block in store.missing_blocks():
        at = np.arange(*store.block_range(block))
        codes = codec.encode(logits, store.dither_keys(view, at))
        store.write_block(view, block, codes, np.ones(len(at), np.float32), np.zeros((len(at), 2), np.uint32))
    return store


def _process(path: str, job: str, rank: str, world: str) -> None:
    from cache.store import shared

    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(rank) % len(cores)]})
    store = cache.open(path)
    store.codec.decode(np.zeros((1, store.codec.row_bytes), np.uint8), np.zeros(1, np.uint64))  # compiles
    print(0, flush=True)
    input()
    plane = shared.load(store, 0, cache.Share(job, int(rank), int(world), _FOLDER))
    print(0, flush=True)
    print(zlib.crc32(plane.codes.tobytes()), flush=True)
    assert plane.weight.all() and plane.digest.all()  # every page of them is read
    input()
    mapping = Path("/proc/self/smaps").read_text().partition("jda-plane")[2]
    found = re.search(r"^Pss:\s+(\d+) kB", mapping, re.MULTILINE)
    print(1024 * int(found[1]) if found else 0, flush=True)
    input()


if __name__ == "__main__":
    _process(*sys.argv[1:])
