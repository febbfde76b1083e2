"""`pipeline bench engine`: what the GPU loader's threads cost the host per batch, so that its bound can be told.

The loader's own code runs over DALI's CPU decoder; its kernels are planned and their arguments laid out, and then not
launched. Of each stage the CPU time of its thread is taken, which neither waits nor other processes lengthen. One
thread does all of it but reading and digests, batch after batch, while the GPU decodes and computes: where a batch
takes longer than that thread, the thread is hidden.

What a launch costs is the one thing of the host's that needs a GPU; their number is told.
"""

import os
import statistics
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from itertools import count, islice
from typing import Any
from unittest import mock

import numpy as np
import torch

from bench import harness
from bench.loader import arms, suite
from bench.loader.arms import POLICY, SEED, Job
from cache import Plane
from pipeline.config import Bench
from pipeline.data import dali
from pipeline.data.index import Index
from pipeline.data.skipped import Skipped
from pipeline.system import machine as machines
from pipeline.views import batch as batches
from pipeline.views import on_gpu, plan

STAGES: tuple[str, ...] = (
    "views drawn",
    "bytes fed",
    "images taken",
    "kernels planned",
    "arguments laid out",
    "all else",
)
_BATCH = 256
_WARM = 2
_WORKERS = 2, 4, 16
_ROWS, _CODE_BYTES = 100_000, 344  # of a plane: the default budget's, 34.4 MB, far beyond a core's cache


class Stages:
    """CPU time of the calling thread by stage; what a stage calls that is one itself is not its own."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self._open: list[str] = []
        self._since = time.thread_time()

    def _turn(self) -> None:
        now = time.thread_time()
        self.seconds[self._open[-1] if self._open else "all else"] += now - self._since
        self._since = now

    def take(self) -> dict[str, float]:
        """What was spent since the last call."""
        self._turn()
        found, self.seconds = self.seconds, dict.fromkeys(STAGES, 0.0)
        return found

    def of(self, stage: str, function: Callable) -> Callable:
        @wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            self._turn()
            self._open.append(stage)
            try:
                return function(*arguments, **options)
            finally:
                self._turn()
                self._open.pop()

        return timed


class Nowhere(on_gpu.Host):
    """Memory that takes no time to clear."""

    device = torch.device("meta")


def run(config: Bench) -> dict:
    """Measure, print the tables and write `config.json`."""
    index = arms.opened(config.data) if config.data else suite._synthetic(config.work)
    machine = machines.describe()
    threads = config.threads or len(os.sched_getaffinity(0))
    size, rounds = _BATCH, config.rounds or harness.ROUNDS
    rows, launches = stages(index, size, threads, rounds)
    rows += beside(index, size, rounds)
    tables = {"stages": rows, "bounds": bounds(rows, size), "launches": [{"of kernels": "median", "count": launches}]}
    found = harness.document(
        "engine",
        machine=machine,
        options={**vars(config), "data": index.path, "samples": len(index.good), "batch_size": size},
        unit="batches",
        reference="",
        arms={},
        tables=tables,
    )
    for title, table in tables.items():
        harness.show_table(f"engine: {title}, {size} pairs of {POLICY.base.size} pixels", table)
    if config.json:
        harness.write(config.json, found)
    return found


def stages(index: Index, size: int, threads: int, rounds: int) -> tuple[list[dict], float]:
    """Rows of what the loader's own thread spends on a batch, and how many kernels it launches."""
    spent, launches = Stages(), []
    job = Job(index.path, size, threads)
    parts = (arms.part_of(job, step) for step in count())
    requests = plan.requests(index, POLICY, SEED, (part for part in parts if len(part[1]) == size))
    # The requests are drawn where they are asked for.
    draw = spent.of("views drawn", lambda: next(requests))
    loader = batches.Job(index, POLICY, threads, Skipped(index, 0.0), pairs=True, digests=False)
    planned = on_gpu.jda_gpu

    def laid_out(work: list, device: torch.device) -> None:
        launches.append(len(work))
        np.concatenate([records.view(np.int64) for _, records, _, _ in work])

    with ExitStack() as stack:
        for where, name, made in (
            (on_gpu, "here", Nowhere),
            (dali.Batches, "schedule", spent.of("bytes fed", dali.Batches.schedule)),
            (on_gpu._Decoders, "take", spent.of("images taken", on_gpu._Decoders.take)),
            (planned, "pairs", spent.of("kernels planned", planned.pairs)),
            (planned, "_launch", spent.of("arguments laid out", laid_out)),
        ):
            stack.enter_context(mock.patch.object(where, name, made))
        engine = on_gpu.on_gpu("gpu", loader, (draw() for _ in count()))
        stack.callback(engine.close)
        found = []
        for _ in islice(engine, _WARM + rounds):
            found.append(spent.take())
    rows = [_row(stage, "loader", [each[stage] for each in found[_WARM:]]) for stage in STAGES]
    rows.append(_row("together", "loader", [sum(each.values()) for each in found[_WARM:]]))
    return rows, statistics.median(launches)


def beside(index: Index, size: int, rounds: int) -> list[dict]:
    """Rows of what other threads spend on a batch: those that read and digest, and the one that trains."""
    rng = np.random.default_rng(0)
    rows = [rng.permutation(index.good)[:size] for _ in range(rounds)]
    views = rng.integers(0, 256, (2, size, POLICY.base.size, POLICY.base.size, 3), dtype=np.uint8)
    codes = rng.integers(0, 256, (_ROWS, _CODE_BYTES), dtype=np.uint8)
    plane = Plane(0, codes, np.ones(_ROWS, np.float32), np.zeros(_ROWS, np.uint32), np.ones(_ROWS, bool))
    some = [rng.integers(0, _ROWS, size) for _ in range(rounds)]
    jobs = {
        ("bytes read", "readers"): lambda at: [index.read(int(row)) for row in rows[at]],
        ("pixels digested", "workers"): lambda _: [zlib.crc32(view) for pair in views for view in pair],
        ("labels gathered", "training"): lambda at: plane.gather(some[at]),
    }
    found = []
    for (stage, thread), job in jobs.items():
        job(0)
        found.append(_row(stage, thread, [_cpu(lambda at=at, job=job: job(at)) for at in range(rounds)]))
    return found


def _cpu(call: Callable[[], object]) -> float:
    before = time.thread_time()
    call()
    return time.thread_time() - before


def _row(stage: str, thread: str, seconds: list[float]) -> dict:
    ms = harness.spread(1e3 * one for one in seconds)
    return {"stage": stage, "thread": thread, "CPU ms": ms["median"], "q1": ms["q1"], "q3": ms["q3"]}


def bounds(rows: list[dict], size: int) -> list[dict]:
    """Pairs per second that no faster GPU would pass, where launches cost nothing."""
    ms = {row["stage"]: row["CPU ms"] for row in rows}
    found = {"the loader's thread": ms["together"], f"{batches._READERS} readers": ms["bytes read"] / batches._READERS}
    for workers in _WORKERS:
        found[f"{workers} workers, in a teacher pass"] = ms["pixels digested"] / workers
    return [{"bound": name, "ms per batch": one, "pairs/s": round(1e3 * size / one)} for name, one in found.items()]
