"""`pipeline bench views`: what it saves to make several views of a sample from one decode.

- `views 1`, `views 4`: the loader in a teacher pass, digests and all, with `--views-per-decode`;
- `repeat 1`, `repeat 4`: what a student's steps are made of, pixels and labels gathered from a store, with `--repeat`.

All make pairs of views of the same samples. The store that students read is made by a teacher that costs nothing.
"""

import gc
import io
import itertools
import os
import tempfile
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import torch

from bench import harness
from bench.loader import arms, suite
from bench.loader.arms import POLICY, SEED, Job
from cache import UserError
from cache.errors import did_you_mean
from pipeline.config import Bench
from pipeline.system import machine as machines
from pipeline.views import plan
from pipeline.views.batch import AHEAD

TOGETHER = 4
_EPOCHS = 4000  # more than a slot comes to
ARMS = tuple(f"{what} {count}" for what in ("views", "repeat") for count in (1, TOGETHER))


def run(config: Bench) -> dict:
    """Run the benchmark, print its tables and write `config.json`."""
    names = config.arms.split(",") if config.arms else list(ARMS)
    for name in names:
        if name not in ARMS:
            raise UserError(f"unknown arm {name}", expected=", ".join(ARMS), fix=did_you_mean(name, ARMS))
    index = arms.opened(config.data) if config.data else suite._synthetic(config.work)
    job = Job(index.path, config.batch_size, config.threads or len(os.sched_getaffinity(0)))
    # So many batches are on their way, and leave by the request. What an epoch costs beside its batches (labels read,
    # the first batch's pixels compared) comes every so many batches with --repeat: whole groups of epochs are timed.
    group = TOGETHER * -(-len(index.good) // job.batch_size)
    warm, timed = TOGETHER * (AHEAD + 2), group * -(-config.pairs // (group * job.batch_size))
    machine = machines.describe()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=_made(config))))
        store = folder / "labels.zarr"
        if any(name.startswith("repeat") for name in names):
            teach(job, store)
        hosts = {name: stack.enter_context(harness.host()) for name in names}
        for host in hosts.values():
            host.submit(arms.request, job, 0)  # imports torch, in all of them at once and before any timed round
        slots = harness.compare(
            {name: partial(_hosted, host, job, name, store, warm, timed) for name, host in hosts.items()},
            config.rounds or harness.ROUNDS,
        )
    found = harness.document(
        "views",
        machine=machine,
        options={**vars(config), "data": index.path, "samples": len(index.good), **vars(job)},
        unit="pairs",
        reference=names[0],
        arms=harness.summarise(slots, names[0]),
        tables={"saved": saved(slots)},
    )
    harness.show(found)
    if rows := found["tables"]["saved"]:
        harness.show_table("views: saved", rows)
    if config.json:
        harness.write(config.json, found)
    return found


def _hosted(host: ProcessPoolExecutor, *arguments) -> harness.Slot:
    return host.submit(slot, *arguments).result()


def _made(config: Bench) -> Path:
    folder = harness.work(config.work)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def saved(slots: dict[str, list[harness.Slot]]) -> list[dict]:
    """Rows of what M views of a decode give against one, round by round: by the clock, and in CPU time."""
    rows = []
    for what in ("views", "repeat"):
        one, many = (slots.get(f"{what} {count}") for count in (1, TOGETHER))
        if not one or not many:
            continue
        rate = harness.spread(b.rate / a.rate for a, b in zip(one, many, strict=True))
        cost = harness.spread(
            a.cpu_seconds / a.items / (b.cpu_seconds / b.items) for a, b in zip(one, many, strict=True)
        )
        option = "--views-per-decode" if what == "views" else "--repeat"
        row = {"option": f"{option} {TOGETHER}", "× pairs/s": rate["median"], "q1": rate["q1"], "q3": rate["q3"]}
        rows.append(row | {"× pairs per CPU s": cost["median"], "CPU q1": cost["q1"], "CPU q3": cost["q3"]})
    return rows


# --- arms


def slot(job: Job, name: str, store: Path, warm: int, timed: int) -> harness.Slot:
    """One slot of an arm, started anew."""
    what, count = name.split()
    batches = (teaching if what == "views" else learning)(job, int(count), store)
    try:
        with closing(batches):
            return harness.measure(batches, warm=warm, timed=timed)
    finally:
        gc.collect()


def teaching(job: Job, together: int, _: Path) -> Generator[int, None, None]:
    """The pairs of each batch, as a teacher gets them: so many views of a block's samples before the next ones."""
    from pipeline.views.loader import Loader

    index = arms.opened(job.data)
    views = [tuple(range(first, first + together)) for first in range(0, TOGETHER, together)]
    parts = (part for view in itertools.cycle(views) for part in plan.cut(view, index.good, job.batch_size))
    loader = Loader(index, POLICY, threads=job.threads)
    for batch in loader.batches(plan.requests(index, POLICY, SEED, parts), digests=True):
        yield len(batch.rows)


def learning(job: Job, repeat: int, store: Path) -> Generator[int, None, None]:
    """The pairs of each batch, as a student gets them, with their labels gathered."""
    from pipeline.replay import Replay

    replay = Replay(
        job.data,
        str(store),
        batch_size=job.batch_size,
        epochs=_EPOCHS,
        seed=SEED,
        device="cpu",
        threads=job.threads,
        repeat=repeat,
    )
    with replay:
        for batch in replay:
            assert batch.stored
            batch.stored.plane.gather(batch.made.rows)
            yield len(batch)


def teach(job: Job, store: Path) -> None:
    """A store of `TOGETHER` views, int8, by a teacher that costs nothing."""
    from pipeline.labels.precompute import precompute

    directions = torch.randn(3, arms.opened(job.data).classes, generator=torch.Generator().manual_seed(0))

    def teacher(images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) @ directions

    options = {"batch_size": job.batch_size, "threads": job.threads, "block_rows": 4 * job.batch_size}
    said = io.StringIO()  # that such a teacher guesses
    with redirect_stdout(said), redirect_stderr(said):
        precompute(
            job.data, teacher, store, views=TOGETHER, views_per_decode=TOGETHER, codec="int8", device="cpu", **options
        )
