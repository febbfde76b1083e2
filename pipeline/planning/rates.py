"""What a pair of views costs on this machine, stage by stage: measured, or read from where it was written down."""

import dataclasses
import itertools
import json
import math
import os
import platform
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cache
from cache import Manifest, UserError
from cache import codec as codecs
from cache.codec.fidelity import drift
from pipeline.config import Plan, TrainStudent
from pipeline.data import order, prepare
from pipeline.data.index import Index, open_data
from pipeline.labels import epochs
from pipeline.networks import models
from pipeline.networks import teacher as answers
from pipeline.networks.placed import placed
from pipeline.system import device as devices
from pipeline.system.terminal import progress
from pipeline.training import trainee as trainees
from pipeline.training.meter import Clock
from pipeline.training.objectives import Distillation
from pipeline.views import plan
from pipeline.views import policy as policies
from pipeline.views.batch import AHEAD, Batch
from pipeline.views.loader import Loader

IMAGES = 64  # synthetic ones, where there is no data set
_SECONDS, _ROUNDS = 2.0, 3  # that a stage is timed for, in so many turns
_KEPT = 4  # batches that the networks see again and again
_PIXELS = 16 * 224**2  # of a batch on a CPU, per view: larger ones are no faster there, and take minutes
_CODED = 512  # pairs
_MOST_CALLS = 10_000
_SPREAD = 2.5  # of a logit, about ResNet-34's on ImageNet
_MAX_BYTES, _MAX_TEXT, _MOST = 1 << 20, 300, 10**9
_LEAST = 1e-9  # seconds: a divisor
_KNOWN = {
    "device": ("cpu", "cuda"),
    "decoder": ("cpu", "gpu", "gpu-hw", "gpu-both"),
    "precision": ("fp32", "bf16", "fp16"),
}
_FIX = "give a file that pipeline plan --json wrote"
_SAMPLES = 1024  # of a data set that is measured on


@dataclass(frozen=True)
class Cost:
    """Of one pair of views, with the machine's share to itself."""

    seconds: float
    """Wall clock."""
    cpu_seconds: float
    """Of all threads."""


@dataclass(frozen=True)
class Rates:
    """Costs per pair of views in one process with one device and its share of the cores."""

    teacher: str
    student: str
    classes: int
    policy: str
    size: int
    """Side of a view in pixels."""
    batch_size: int
    """Pairs per step."""
    measured_batch: int
    """Pairs per step that the networks were timed with."""
    precision: str
    decoder: str
    device: str
    """cpu or cuda."""
    hardware: str
    cores: int
    data: str
    """What the images were."""
    load: Cost
    """Reading, decoding, JDA and two crops."""
    teach: Cost
    """The teacher's forward pass on both views."""
    learn: Cost
    """A student's step: forward, loss from stored labels, backward, optimiser."""
    digest: float
    """CPU seconds of the checksums of both views' pixels."""
    code: float
    """CPU seconds of coding and packing labels; one thread does it."""
    check: float
    """CPU seconds of decoding labels again and comparing, where the teacher pass does."""
    unpack: float
    """CPU seconds of unpacking stored labels."""
    fit: float
    """Seconds of choosing the code, per pair that it is fitted to."""
    image_bytes: float
    """Of an encoded image."""
    label_bytes: float
    """Of a pair's labels on disk, before what lies beside them."""
    row_bytes: float
    """Of a pair's labels in memory."""


# --- measured


def measure(config: Plan) -> Rates:
    """Time each stage for two seconds or more, on `config.data` or a little synthetic data. Raises UserError."""
    with tempfile.TemporaryDirectory(prefix="jda-plan-") as folder:
        data = config.data
        if not data:
            data = Path(folder) / "data"
            prepare.build(f"synthetic:{IMAGES}", data, classes=config.classes)
        try:
            return Stages(config, open_data(config, data, "train"), Path(folder)).rates(_SECONDS)
        except torch.OutOfMemoryError:
            raise UserError(
                "the GPU's memory does not hold a step",
                found=f"--batch-size {config.batch_size}",
                fix="take a smaller --batch-size, or --precision bf16",
            ) from None


class Stages:
    """The stages of both jobs, each by itself, ready to be timed as often as one likes."""

    def __init__(self, config: Plan, index: Index, folder: Path):
        """`folder` takes a small store. Raises UserError for networks that do not exist or do not fit the data."""
        self.config, self.index = config, index
        self.device, self.policy = devices.pick(config), policies.load(config.policy)
        self.precision = devices.arithmetic(config.precision, self.device)
        self.decoder, self.threads = devices.decoder("auto", self.device), share_of_cores(config)
        self.batch_size = config.batch_size
        if self.device.type == "cpu":
            self.batch_size = min(self.batch_size, max(_PIXELS // self.policy.base.size**2, 1))
        student = models.create(config.student, index.classes, seed=0)
        teacher = models.create(config.teacher, index.classes, seed=0)
        self.teacher = answers.Teacher(teacher, self.policy, self.device, self.precision)
        self._student = placed(student, self.device, self.precision, self.policy)
        self._folder = folder
        self._rows = np.sort(np.random.default_rng(0).permutation(index.good)[:_SAMPLES])
        logits = simulated(index.classes)
        started = time.perf_counter()
        self.codec = codecs.auto(logits)
        self._fit, self._logits = (time.perf_counter() - started) / len(logits), logits
        self._batches: list[Batch] = []
        self._step = self._trainee()

    def rates(self, seconds: float) -> Rates:
        """Each stage timed for some `seconds`, in turns: a machine that is busy for a moment slows them all."""
        self._batches, _ = self._loaded(2)
        again = itertools.cycle(self._batches)
        timed = {
            "load": lambda calls: self._loaded(calls)[1],
            "teach": lambda calls: self._spent(lambda: self.teacher(next(again)), calls),
            "learn": lambda calls: self._spent(lambda: self._step(next(again)), calls),
        }
        with progress("measuring", (1 + _ROUNDS) * len(timed), "slots") as advance:
            calls, spent = {}, {name: np.zeros(3) for name in timed}
            for name, stage in timed.items():
                stage(1)  # compiles, allocates
                wall, *_ = stage(1)
                calls[name] = min(max(math.ceil(seconds / _ROUNDS / max(wall, 1e-6)), 1), _MOST_CALLS)
                advance(1, name)
            for _ in range(_ROUNDS):
                for name, stage in timed.items():
                    spent[name] += stage(calls[name])
                    advance(1, name)
        costs = {name: Cost(float(wall / pairs), float(cpu / pairs)) for name, (wall, cpu, pairs) in spent.items()}
        config, index, cuda = self.config, self.index, self.device.type == "cuda"
        return Rates(
            teacher=self.teacher.name,
            student=self._student.network.name,
            classes=index.classes,
            policy=self.policy.name,
            size=self.policy.base.size,
            batch_size=config.batch_size,
            measured_batch=self.batch_size,
            precision=self.precision,
            decoder=self.decoder,
            device=self.device.type,
            hardware=torch.cuda.get_device_name(self.device) if cuda else _processor(),
            cores=self.threads,
            data=str(config.data) if config.data else f"{IMAGES} synthetic photographs of 500 x 375",
            load=costs["load"],
            teach=costs["teach"],
            learn=costs["learn"],
            fit=self._fit,
            image_bytes=float(index.records["size"][self._rows].mean()),
            row_bytes=float(self.codec.row_bytes),
            **self._labels(),
        )

    def _loaded(self, calls: int) -> tuple[list[Batch], tuple[float, float, int]]:
        """Batches for the networks, and what so many of them cost."""
        loader = Loader(self.index, self.policy, threads=self.threads, decoder=self.decoder)
        with closing(loader.batches(plan.requests(self.index, self.policy, 0, self._parts()))) as made:
            # As much is under way when the clock starts as when it stops.
            kept = list(itertools.islice(made, AHEAD + 3))[-_KEPT:]
            return kept, self._spent(lambda: next(made), calls)

    def _parts(self) -> Iterator[plan.Part]:
        """Batches without end and of one size, whatever that of the data set."""
        orders = (order.permutation(0, epoch, self._rows) for epoch in itertools.count())
        rows = itertools.chain.from_iterable(orders)
        for view in itertools.count():
            yield view, np.fromiter(itertools.islice(rows, self.batch_size), np.int64)

    def _trainee(self) -> Callable[[Batch], object]:
        """A student's step as `pipeline.training.loop` takes it, on labels from a store."""
        store = self._store()
        out = self._folder
        config = TrainStudent(
            data=self.index.path, student=self.config.student, out=out, store=str(store.path), lr=1e-3
        )
        found = next(iter(epochs.epochs(store, iter([0]), self.device, "auto", out)))
        objective = Distillation(config, 0, labels=found)
        trainee, forward = trainees.prepare(config, self._student)
        clock = Clock(self.device, False)
        trainee.module.train()

        def step(batch: Batch) -> object:
            batch = dataclasses.replace(batch, rows=np.searchsorted(self._rows, batch.rows))
            return trainees.take_step(config, trainee, forward, objective, batch, False, clock)

        return step

    def _store(self) -> cache.Store:
        """One view of labels of the samples measured on; whose they are does not matter to the time they take."""
        index, teacher, count = self.index, self.teacher, len(self._rows)
        manifest = Manifest(
            **teacher.on(index, self.policy),
            samples=count,
            seed=0,
            views=1,
            decoder={},
            codec=self.codec.config,
            block_rows=count,
            versions={},
            fidelity={},
        )
        key_hash = index.records["key_hash"][self._rows]
        store = cache.create(str(self._folder / "labels.zarr"), manifest, np.zeros(count, np.uint8), key_hash)
        logits = np.resize(self._logits, (count, 2, index.classes))
        pairs = self.codec.encode(logits, store.stream(0, np.arange(count)))
        store.write_block(0, 0, pairs, np.ones(count, np.float32), np.zeros((count, 2), np.uint32))
        return store

    def _labels(self) -> dict[str, float]:
        """Costs of digests and codes per pair, each of one thread, and what labels take on disk."""
        codec, logits, batch = self.codec, self._logits, self._batches[0]
        stream = np.arange(len(logits), dtype=np.uint64)
        rows = codec.encode(logits, stream)
        packed = codec.pack(rows, stream)
        pixels = batch.images.cpu().numpy()
        return {
            "digest": _cpu(lambda: [zlib.crc32(view) for views in pixels for view in views]) / len(batch.rows),
            "code": _cpu(lambda: codec.pack(codec.encode(logits, stream), stream)) / len(logits),
            "check": _cpu(lambda: drift(codec, logits, rows, stream)) / len(logits),
            "unpack": _cpu(lambda: codec.unpack(packed, stream)) / len(logits),
            "label_bytes": len(packed) / len(logits),
        }

    def _spent(self, call: Callable[[], object], calls: int) -> tuple[float, float, int]:
        """Wall and CPU seconds, and pairs, of calls that take a batch each; a GPU is waited for at the end, as in
        training."""
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - wall, time.process_time() - cpu, calls * self.batch_size


def share_of_cores(config: Plan) -> int:
    """Threads as asked for, or this machine's cores divided among its GPUs."""
    gpus = torch.cuda.device_count() if devices.pick(config).type == "cuda" else 1
    return config.threads or max(len(os.sched_getaffinity(0)) // gpus, 1)


def simulated(classes: int) -> np.ndarray:
    """Logits f32 (512, 2, C) with the spread and about the spectrum of an ImageNet teacher's, original and augmented.

    At 1000 classes their code takes the 40-odd bytes per vector of `bench.labels.simulated`'s, whose head is trained.
    """
    rng, width = np.random.default_rng(0), min(classes, 512)
    spectrum = np.arange(1, width + 1) ** -0.5
    spectrum *= _SPREAD / np.linalg.norm(spectrum)
    features = rng.standard_normal((_CODED, 1, width)) + 0.5 * rng.standard_normal((_CODED, 2, width))
    return ((features * spectrum) @ rng.standard_normal((width, classes))).astype(np.float32)


def _cpu(call: Callable[[], object]) -> float:
    """CPU seconds of a call, of all threads; the smallest of three."""
    times = []
    for _ in range(3):
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return min(times)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


# --- read


def read(path: Path) -> Rates:
    """The rates in a file that `pipeline plan --json` wrote. Raises UserError naming the key that is wrong."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read rates {path}", found=error.strerror, fix="check --rates") from None
    if len(data) > _MAX_BYTES:
        raise UserError(f"rates {path}", found=f"more than {_MAX_BYTES:,} bytes", expected="some kilobytes", fix=_FIX)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):  # bytes that are no text are a ValueError too
        raise UserError(f"cannot parse rates {path}", expected="JSON", fix=_FIX) from None
    if not isinstance(document, dict) or "rates" not in document:
        raise UserError(f"rates {path}", found=_shown(document), expected="a mapping with the key rates", fix=_FIX)
    return _of(Rates, document["rates"], f"rates {path}")


def _of(kind: type, value: object, where: str) -> Any:
    """A flat dataclass from plain data: every key there and none other, every value of its type and in range."""
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    if not isinstance(value, dict):
        raise UserError(where, found=_shown(value), expected=f"a mapping of {', '.join(fields)}", fix=_FIX)
    for name in fields:
        if name not in value:
            raise UserError(f"{where}: missing key {name}", fix=_FIX)
    for name in value:
        if name not in fields:
            raise UserError(f"{where}: unknown key {_shown(name)}", fix=_FIX)
    return kind(**{name: _value(fields[name], value[name], f"{where}: {name}", name) for name in fields})


def _value(kind: object, value: object, where: str, name: str) -> object:
    if kind is Cost:
        return _of(Cost, value, where)
    if kind is str:
        if not isinstance(value, str) or not value.isprintable() or len(value) > _MAX_TEXT:
            raise UserError(where, found=_shown(value), expected="a short text", fix=_FIX)
        if value not in (known := _KNOWN.get(name, (value,))):
            raise UserError(where, found=_shown(value), expected=" or ".join(known), fix=_FIX)
        return value
    low = 1 if kind is int else _LEAST if name == "seconds" else 0
    # NaN compares false; true and false are no numbers here.
    if type(value) not in (int, kind) or not low <= value <= _MOST:  # pyright: ignore[reportOperatorIssue]
        expected = f"a {'whole ' if kind is int else ''}number from {low:g} to {_MOST:,}"
        raise UserError(where, found=_shown(value), expected=expected, fix=_FIX)
    return value


def _shown(value: object) -> str:
    if isinstance(value, int) and abs(value) > _MOST:  # which may have thousands of digits
        return f"a number of {value.bit_length():,} bits"
    return f"{value!a:.60}"
