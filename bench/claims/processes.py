"""What the claims train and label, each in a process of its own, two side by side."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cache
from cache import UserError
from cache.codec.fidelity import divergence
from pipeline.config import Evaluate, Machine, PrecomputeTeacher, TrainStudent, TrainTeacher
from pipeline.data.index import Index
from pipeline.labels import epochs, precompute
from pipeline.networks import models
from pipeline.networks.placed import Placed, placed
from pipeline.system import device as devices
from pipeline.system.terminal import progress
from pipeline.training import evaluate, train_student, train_teacher
from pipeline.views import plan
from pipeline.views import policy as policies
from pipeline.views.loader import Loader
from pipeline.views.policy import Policy

PROCESSES = 2
_BATCH = 32  # images of one pass that answers


@dataclass(frozen=True)
class Trained:
    """A teacher."""

    spec: str
    """NAME@WEIGHTS."""
    fingerprint: str
    top1: float
    """A share."""


def workers() -> Executor:
    return ProcessPoolExecutor(PROCESSES, get_context("spawn"), initializer=_start)


def _start() -> None:
    """One thread of torch: on a CPU sums depend on their number. A process without its parent ends."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = parent_process()
    assert parent

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@dataclass(frozen=True)
class Job:
    """Something for another process."""

    make: Callable[[], tuple | None]
    """Called when it is due: function and arguments; None: it was done before."""
    needs: tuple[tuple, ...] = ()
    """Names of those to be done first."""


def each(pool: Executor, jobs: Mapping[tuple, Job]) -> Iterator[tuple[tuple, Any]]:
    """(name, result) of every job as it ends, failed ones last. Of those that may run the first go first, and only
    what runs is handed out."""
    waiting, running, done = dict(jobs), {}, set()
    while waiting or running:
        for name, job in list(waiting.items()):
            if len(running) == PROCESSES:
                break
            if done.issuperset(job.needs):
                del waiting[name]
                if made := job.make():
                    running[pool.submit(*made)] = name
                else:
                    done.add(name)
                    yield name, None
        ended = wait(running, return_when=FIRST_COMPLETED).done if running else ()
        for future in sorted(ended, key=lambda f: f.exception() is not None):
            name = running.pop(future)
            try:
                result = future.result()
            except BrokenProcessPool:
                raise UserError("a process was killed", fix="free memory; run again to go on") from None
            yield name, result
            done.add(name)


@contextlib.contextmanager
def _quiet():
    """The one progress bar is the benchmark's."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def trained(config: TrainTeacher | None, asked: Evaluate, size: int | None = None) -> Trained:
    """Train a teacher if it is not there. It sees images resized to `size` pixels, if that is given."""
    with _quiet():
        if config and not (config.out / "model.safetensors").exists():
            train_teacher.run(config)
        index, policy = Index.open(asked.data), policies.load(asked.policy)
        network, device = models.create(asked.model, index.classes), devices.pick(asked)
        there = placed(network, device, "fp32", policy, size)
        top1 = evaluate.evaluate(there, index, policy, asked.batch_size, asked)["top1"]
        return Trained(asked.model, network.fingerprint, top1)


def labelled(config: PrecomputeTeacher) -> dict:
    """What the store's first view says of w, and the bytes on disk of a pair's labels."""
    with _quiet():
        precompute.run(config)
    store = cache.open(config.store)
    weight = store.load_plane(0).weight
    pairs = store.manifest.samples * store.manifest.views
    return {
        "mean w": float(np.nanmean(weight)),
        "sd of w": float(np.nanstd(weight)),
        "bytes per pair": store.label_bytes() / pairs + cache.BESIDE_BYTES,
    }


def student(config: TrainStudent, judged_by: Path | None = None) -> dict:
    """Of the last epoch: top1, loss, …, as `evaluate` has them; where there are logits of a teacher to be `judged_by`,
    f32 (val samples, C), also kl, the mean KL(teacher ‖ student) at T = 1 in nats."""
    with _quiet():
        found = train_student.run(config)["val"]
        return found | {"kl": _kl(config, judged_by)} if judged_by else found


def _kl(config: TrainStudent, judged_by: Path) -> float:
    assert config.store and config.val
    policy, _ = epochs.replayed(cache.open(config.store).manifest)
    index = Index.open(config.val)
    network = models.trained(f"{config.student}@{config.out / 'model.safetensors'}", index.classes)
    there = placed(network, devices.pick(config), "fp32", policy)
    return divergence(np.load(judged_by), answers(there, index, policy, config), 1)


@torch.inference_mode()
def answers(network: Placed, index: Index, policy: Policy, machine: Machine) -> np.ndarray:
    """Logits f32 (good samples, C) of their evaluation views, in the order of the index. Raises UserError for one that
    cannot be read."""
    network.module.eval()
    decoder = devices.decoder("auto", network.device)
    loader = Loader(index, policy, threads=devices.threads(machine), decoder=decoder, max_bad=0)
    requests = plan.requests(index, policy, 0, plan.cut(None, index.good, _BATCH))
    found = []
    with (
        progress("answers", len(index.good), "images") as advance,
        closing(loader.batches(requests, pairs=False)) as batches,
    ):
        for batch in batches:
            found.append(network(batch.original).float().cpu().numpy())
            advance(len(batch.rows))
    return np.concatenate(found)
