"""`pipeline bench loader`: view pairs per second of this loader and its alternatives, and where its CPU time goes."""

import io
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from bench import harness
from bench.harness import Slot
from bench.loader import arms
from bench.loader.arms import ARMS, POLICY, SEED, Job
from cache import UserError
from cache.errors import did_you_mean
from kernels import jda
from kernels.jda.ops import BOUNDS, Op
from pipeline.config import Bench
from pipeline.data import prepare
from pipeline.data.index import Index
from pipeline.system import machine as machines
from pipeline.views import drawing

OURS = "jda-distill"
_SYNTHETIC = "synthetic:512"
_SIZE = (500, 375)  # width, height: ImageNet's most usual size
# Names of the threads of `pipeline.views.loader` and of DALI's pool, which in its graph only decodes.
_STAGES = {"decode": "decode()", "pair kernel": "pair()", "reading": "read"}  # the calls and threads that they are


def run(config: Bench) -> dict:
    """Run the loader benchmark, print its tables, write `config.json`; returns the document."""
    names = _names(config.arms)
    index = Index.open(config.data, split="train") if config.data else _synthetic(config.work)
    job = Job(index.path, config.batch_size, config.threads or len(os.sched_getaffinity(0)))
    # A DataLoader starts with two batches on their way per worker, and DALI with two more than this loader has asked
    # for: as many go by untimed. The workers then finish in step, so whole rounds of them are timed.
    rounds_of_workers = -(-config.pairs // (job.batch_size * job.threads))
    warm, timed = max(4, 2 * job.threads), rounds_of_workers * job.threads
    machine = machines.describe()
    with ExitStack() as stack:
        hosts = {name: stack.enter_context(harness.host()) for name in names}
        for host in hosts.values():
            host.submit(arms.request, job, 0)  # imports torch, in all of them at once and before any timed round
        slots = harness.compare(
            {name: partial(_hosted, host, job, name, warm, timed) for name, host in hosts.items()},
            config.rounds or harness.ROUNDS,
        )
    reference = OURS if OURS in names else names[0]
    found = harness.document(
        "loader",
        machine=machine,
        options={**vars(config), "data": index.path, "samples": len(index.good), **vars(job)},
        unit="pairs",
        reference=reference,
        arms=harness.summarise(slots, reference),
        tables={"stages": stages(index)} | ({"profile": profile(slots[OURS])} if OURS in slots else {}),
    )
    harness.show(found)
    if OURS in slots:
        harness.show_table(f"CPU time of {OURS}, by stage", found["tables"]["profile"])
    harness.show_table(f"single calls on {_SIZE[0]}x{_SIZE[1]}, one thread, median", found["tables"]["stages"])
    if config.json:
        harness.write(config.json, found)
    return found


def _hosted(host: ProcessPoolExecutor, job: Job, name: str, warm: int, timed: int) -> Slot:
    try:
        return host.submit(arms.slot, job, name, warm, timed).result()
    except BrokenProcessPool:
        fix = "free memory, or leave it out by --arms"
        raise UserError(f"the process of arm {name} was killed", fix=fix) from None


def profile(slots: list[Slot]) -> list[dict]:
    """Rows of where the CPU time of a pair goes, by the call or thread that spent it, over all slots together."""
    items = sum(slot.items for slot in slots)
    total = sum(slot.cpu_seconds for slot in slots)
    spent = {stage: sum(slot.thread_cpu_seconds.get(name, 0.0) for slot in slots) for stage, name in _STAGES.items()}
    spent["rest"] = total - sum(spent.values())
    return [
        {"stage": stage, "CPU ms/pair": 1e3 * seconds / items, "share %": 100 * seconds / (total or 1.0)}
        for stage, seconds in (*spent.items(), ("total", total))
    ]


def stages(index: Index) -> list[dict]:
    """Rows of ms per call on one image of `_SIZE`: Pillow's decode, each JDA operation, crop and resize, a pair."""
    data = _photograph(index)
    image = np.array(Image.open(io.BytesIO(data)))
    height, width = (np.full(1024, side) for side in image.shape[:2])
    drawn = drawing.draw(SEED, np.arange(1024, dtype=np.uint64), 0, height, width, POLICY)
    mean = drawn[0].copy()
    mean["flip"] = 0
    mean["box"][:, 2:] = drawn["box"][:, 0, 2:].mean(axis=0)
    mean["box"][:, :2] = (image.shape[:2] - mean["box"][0, 2:]) // 2
    program = jda.program_of(POLICY.table)
    out = np.empty((2, 1, POLICY.base.size, POLICY.base.size, 3), np.uint8)
    calls = {
        "Pillow decode": lambda: Image.open(io.BytesIO(data)).load(),
        "no operation (copies)": partial(jda.apply, image, "imagenet", 0, 0),
        **{_shown(op): partial(jda.apply, image, (op,), 1, 0) for op in dict.fromkeys(POLICY.table)},
        "crop and resize, mean box": partial(jda.pair, image, program, mean, -1, out[:1], 0),
    }
    rows = [{"call": name, "ms": harness.median_ms(call)} for name, call in calls.items()]
    times = [harness.median_ms(partial(jda.pair, image, program, view, -1, out, 0), 0.0) for view in drawn[:128]]
    return [*rows, {"call": f"pair, mean of {len(times)} views", "ms": float(np.mean(times))}]


def _shown(op: Op) -> str:
    return f"{op.name} {op.magnitude:.4g}" if op.name in BOUNDS else op.name


def _photograph(index: Index) -> bytes:
    """The first good image of `_SIZE`, or the first good one as a JPEG of `_SIZE`."""
    good = index.records[index.good]
    fits = (good["width"] == _SIZE[0]) & (good["height"] == _SIZE[1]) & (good["cmyk"] == 0)
    data = index.read(int(index.good[fits.argmax()]))
    image = Image.open(io.BytesIO(data))
    if image.size == _SIZE and image.mode == "RGB":
        return data
    file = io.BytesIO()
    image.convert("RGB").resize(_SIZE).save(file, "JPEG", quality=95)
    return file.getvalue()


def _names(chosen: str | None) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in chosen.split(","))) if chosen is not None else list(ARMS)
    for name in names:
        if name not in ARMS:
            raise UserError(f"unknown arm {name}", fix=did_you_mean(name, ARMS))
    return names


def _synthetic(work: Path | None) -> Index:
    """The synthetic data set, prepared where it is not there, damaged or of another version."""
    out = harness.work(work) / _SYNTHETIC.replace(":", "-")
    try:
        return Index.open(out)
    except UserError:
        shutil.rmtree(out, ignore_errors=True)
    prepare.build(_SYNTHETIC, out)
    return Index.open(out)
