"""`pipeline bench end-to-end`: a student's step with stored labels, against cross-entropy alone and a live teacher.

All arms train ResNet-18 on the same pairs of 224-pixel views, step by step interleaved: `ce`, labels only; `stored`,
CCD from a store; `live`, CCD with the teacher in the loop, the paper's way. Batches come from memory, so that the
figures are those of the step; `loaded` is `stored` with its batches from the loader, and says how long it waited. From
these follows after how many epochs, or students, the teacher pass has paid for itself.
"""

import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

import cache
from bench import harness
from cache import UserError
from pipeline import answers, labels, loop, models, order, precompute, prepare, views
from pipeline import device as devices
from pipeline.config import Bench, PrecomputeTeacher, TrainStudent
from pipeline.device import Normalise
from pipeline.index import Index
from pipeline.loader import Batch, load
from pipeline.objectives import CrossEntropy, Distillation, Objective
from pipeline.report import progress

STUDENT, TEACHER = "timm/resnet18", "timm/resnet34"
ARMS = ("ce", "stored", "live", "loaded")
_IMAGENET = 1_281_167
_CLASSES = 1000


def run(config: Bench) -> dict:
    """Run the benchmark, print its tables and write `config.json`."""
    names = tuple(config.arms.split(",")) if config.arms else ARMS
    if unknown := set(names) - set(ARMS):
        raise UserError(f"unknown arm {min(unknown)}", expected=", ".join(ARMS))
    machine, device = harness.machine(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch_size = config.batch_size if device.type == "cuda" else min(config.batch_size, 16)
    with tempfile.TemporaryDirectory(dir=_folder(config)) as folder:
        student = _job(Path(folder), config, batch_size)
        arms = {name: _arm(name, student, device) for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        phases: dict[str, dict[str, list[float]]] = {name: {} for name in names}
        with progress("end-to-end", (config.rounds + 1) * len(names), "steps") as advance:
            for number in range(config.rounds + 1):
                for name, step in arms.items():
                    split = step()
                    if number:  # the first compiles and allocates
                        times[name].append(sum(split.values()))
                        for phase, seconds in split.items():
                            phases[name].setdefault(phase, []).append(seconds)
                    advance(1)
        teacher_s = _teacher_seconds(student, device, batch_size, config.rounds)
    rows = [
        {
            "arm": name,
            "ms/step": 1e3 * statistics.median(mine),
            "q1": 1e3 * float(np.percentile(mine, 25)),
            "q3": 1e3 * float(np.percentile(mine, 75)),
            "× ce": statistics.median(a / b for a, b in zip(mine, times["ce"], strict=True)) if "ce" in times else 1.0,
            **{f"{phase} ms": 1e3 * statistics.median(each) for phase, each in phases[name].items()},
        }
        for name, mine in times.items()
    ]
    tables = {"step": rows}
    if {"stored", "live"} <= times.keys():
        tables["break-even"] = [_break_even(times, teacher_s, batch_size)]
    found = harness.document(
        "end-to-end",
        machine=machine,
        options=vars(config) | {"batch_size": batch_size, "student": STUDENT, "teacher": TEACHER},
        unit="steps",
        reference="ce",
        arms={},
        tables=tables,
    )
    for title, table in tables.items():
        harness.show_table(f"end-to-end: {title}, {batch_size} pairs on {device}", table)
    if config.json:
        harness.write(config.json, found)
    return found


def _folder(config: Bench) -> Path:
    folder = harness.work(config.work)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _job(folder: Path, config: Bench, batch_size: int) -> TrainStudent:
    """Data of ImageNet's size and shape, a teacher with random weights, and a store of one view."""
    data = config.data
    if not data:
        data = folder / "data"
        prepare.build(f"synthetic:{max(4 * batch_size, 64)}", data, classes=_CLASSES)
    index = Index.open(data, "train")
    weights = folder / "teacher.safetensors"
    models.save_weights(models.create(TEACHER, index.classes, seed=0).module, weights)
    store = str(folder / "labels.zarr")
    precompute.run(
        PrecomputeTeacher(
            data=data, teacher=f"{TEACHER}@{weights}", store=store, views=1, codec="int8", batch_size=batch_size
        )
    )
    return TrainStudent(
        data=data,
        store=store,
        student=STUDENT,
        out=folder / "run",
        batch_size=batch_size,
        live_teacher=f"{TEACHER}@{weights}",
        check_share=0.0,
        lr=1e-3,
    )


def _arm(name: str, config: TrainStudent, device: torch.device) -> Callable[[], dict[str, float]]:
    """A step of an arm, which says the seconds of its phases."""
    index, store = Index.open(config.data, "train"), cache.open(str(config.store))
    policy, decoder = labels.replayed(store.manifest)
    precision = devices.arithmetic("auto", device)
    network = models.create(config.student, index.classes, seed=0)
    trainee, forward = loop.prepare(config, network, device, precision)
    trainee.module.train()
    normalise = Normalise(network.mean or policy.mean, network.std or policy.std, device)
    objective: Objective
    if name == "ce":
        objective = CrossEntropy()
    elif name == "live":
        assert config.live_teacher
        teacher = models.create(config.live_teacher, index.classes)
        objective = Distillation(config, 0, teacher=answers.Teacher(teacher, policy, device, precision))
    else:
        config = dataclasses.replace(config, live_teacher=None)
        found = next(iter(labels.epochs(store, iter([0]), device, "auto", config.out.parent)))
        objective = Distillation(config, 0, labels=found)

    def requests():
        for part in itertools.islice(_endless(config, index), 4 if name != "loaded" else None):
            yield part, views.of(index.records[part], store.manifest.seed, 0, policy)

    batches: Iterator[Batch] = load(index, requests(), policy, threads=devices.threads(config), decoder=decoder)
    if name != "loaded":
        batches = itertools.cycle(list(batches))

    def step() -> dict[str, float]:
        clock = loop.Clock(device, True)
        batch = next(batches)
        clock.lap("wait")
        loop._step(config, trainee, forward, normalise, objective, batch, precision, False, clock)
        return clock.times

    return step


def _endless(config: TrainStudent, index: Index) -> Iterator[np.ndarray]:
    for epoch in itertools.count():
        for _, part in order.steps(epoch, index.good, config.batch_size, 1):
            if len(part) == config.batch_size:
                yield part


def _teacher_seconds(config: TrainStudent, device: torch.device, batch_size: int, rounds: int) -> float:
    """Median time of the teacher on a batch of pairs."""
    index = Index.open(config.data, "train")
    policy, _ = labels.replayed(cache.open(str(config.store)).manifest)
    assert config.live_teacher
    network = models.create(config.live_teacher, index.classes)
    teacher = answers.Teacher(network, policy, device, devices.arithmetic("auto", device))
    size = policy.base.size
    images = torch.zeros((2, batch_size, size, size, 3), dtype=torch.uint8)
    batch = Batch(np.arange(batch_size), torch.zeros(batch_size, dtype=torch.int64), images, None)
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        teacher(batch).cpu()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _break_even(times: dict[str, list[float]], teacher_s: float, batch_size: int) -> dict:
    """A view of ImageNet-1k costs the teacher once its forward pass, and saves live − stored at each use."""
    saved = statistics.median(a - b for a, b in zip(times["live"], times["stored"], strict=True))
    batches = _IMAGENET / batch_size
    return {
        "teacher pass of one view, hours": teacher_s * batches / 3600,
        "saved per epoch, hours": saved * batches / 3600,
        "epochs until a view has paid": teacher_s / saved if saved > 0 else float("inf"),
    }
