"""What a pair of views costs on this machine: a small job of each kind, run for real, or a file that says."""

import contextlib
import dataclasses
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import cache
from cache import UserError, outside
from cache import codec as codecs
from cache.codec.fidelity import measure as fidelity
from pipeline.config import Plan, PrecomputeTeacher, TrainStudent
from pipeline.data import index as indexes
from pipeline.data import prepare
from pipeline.data.index import Index, open_data
from pipeline.labels import precompute
from pipeline.networks import models, weights
from pipeline.system import cores, machine
from pipeline.system import device as devices
from pipeline.system.terminal import progress
from pipeline.training import train_student
from pipeline.views import policy as policies
from pipeline.views.policy import Policy

_BATCHES, _VIEWS = 4, 2  # of the small job
_PIXELS = 16 * 224**2  # of a batch on a CPU, per view: larger ones are no faster there, and take minutes
_STEPS = 12  # that a student's dry run may take
_SPREAD = 2.5  # of a logit, about ResNet-34's on ImageNet
_MAX_BYTES, _MOST, _LEAST = 1 << 20, 10**9, 1e-9
_FIX = "give a file that pipeline plan --json wrote"


@dataclass(frozen=True)
class Rates:
    """Seconds per pair of views in one process with one device and its share of the cores, all stages together."""

    teacher: str
    student: str
    classes: int
    policy: str
    size: int
    """Side of a view in pixels."""
    batch_size: int
    """Pairs per step."""
    measured_batch: int
    """Pairs per step that were timed."""
    precision: str
    device: str
    """cpu or cuda."""
    hardware: str
    cores: int
    data: str
    """What the images were."""
    labels: str
    """What the labels' sizes are those of."""
    teach: float
    """Seconds of the teacher pass: reading, decoding, both views, the teacher, coding."""
    stored: float
    """Seconds of a student's step on stored labels, with the waiting for its images."""
    live: float
    """The same beside a live teacher."""
    stored_wait: float
    """Share of `stored` that is spent waiting for images."""
    live_wait: float
    image_bytes: float
    """Of an encoded image."""
    label_bytes: float
    """Of a pair's labels on disk, before what lies beside them."""
    row_bytes: float
    """Of a pair's labels in memory."""


def measure(config: Plan) -> Rates:
    """Run each kind of job in a temporary folder, on some samples of `config.data` or synthetic ones. UserError."""
    policy, device = policies.load(config.policy), devices.pick(config)
    batch = config.batch_size
    if device.type == "cpu":
        batch = min(batch, max(_PIXELS // policy.base.size**2, 1))
    with tempfile.TemporaryDirectory(prefix="jda-plan-") as folder:
        index = _samples(config, _BATCHES * batch, Path(folder))
        try:
            return _measure(config, index, policy, device, min(batch, len(index)), Path(folder))
        except torch.OutOfMemoryError:
            raise UserError(
                "the GPU's memory does not hold a step",
                found=f"--batch-size {config.batch_size}",
                fix="take a smaller --batch-size, or --precision bf16",
            ) from None


def teacher_of(config: Plan) -> str:
    """The teacher as rates name it."""
    name = config.teacher.partition("@")[0]
    return f"{name} at {config.teacher_size} pixels" if config.teacher_size else name


def _measure(config: Plan, index: Index, policy: Policy, device: torch.device, batch: int, folder: Path) -> Rates:
    threads, store = _threads(config, device), folder / "labels.zarr"
    shared = {"data": index.path, "batch_size": batch, "device": config.device, "threads": threads}
    teacher = config.teacher
    if "@" not in teacher:  # weights do not matter to the time
        teacher = f"{teacher}@{folder / 'teacher.safetensors'}"
        made = models.create(config.teacher, index.class_list, seed=0)
        weights.save(made.module, folder / "teacher.safetensors")
    models.create(config.student, index.classes)  # one that there is not is refused before the teacher works
    looks = PrecomputeTeacher(
        **shared,
        teacher=teacher,
        teacher_size=config.teacher_size,
        store=str(store),
        views=_VIEWS,
        policy=config.policy,
        precision="auto" if config.precision == "fp16" else config.precision,
    )
    learns = TrainStudent(
        **shared,
        student=config.student,
        store=str(store),
        out=folder / "run",
        lr=1e-3,
        epochs=-(-_STEPS * batch // len(index)),
        precision=config.precision,
        dry_run=True,
    )
    alive = dataclasses.replace(learns, live_teacher=teacher, teacher_size=config.teacher_size)
    with progress("measuring", 3, "jobs") as advance:
        taught = _quietly(lambda: precompute.run(looks))
        advance(1, "teacher pass")
        stored = _quietly(lambda: train_student.run(learns))
        advance(1, "student on stored labels")
        live = _quietly(lambda: train_student.run(alive))
        advance(1, "student beside a live teacher")
    known = cache.open(str(store)) if "@" in config.teacher else None  # random weights' labels are like no teacher's
    pairs = _VIEWS * len(index)
    if known:
        label_bytes, row_bytes = known.label_bytes() / pairs, known.codec.row_bytes
    else:
        label_bytes, row_bytes = _simulated_bytes(index.classes)
    return Rates(
        teacher=teacher_of(config),
        student=config.student.partition("@")[0],
        classes=index.classes,
        policy=policy.name,
        size=policy.base.size,
        batch_size=config.batch_size,
        measured_batch=batch,
        precision=devices.arithmetic(config.precision, device),
        device=device.type,
        hardware=machine.hardware(device),
        cores=threads,
        data=f"{len(index):,} images of {config.data or 'synthetic photographs, 500 x 375'}",
        labels="labels of the teacher" if known else "labels of a simulated teacher",
        teach=1 / taught["pairs_per_s"],
        stored=stored["step_s"] / batch,
        live=live["step_s"] / batch,
        stored_wait=stored["wait_share"],
        live_wait=live["wait_share"],
        image_bytes=float(index.records["size"].mean()),
        label_bytes=label_bytes,
        row_bytes=row_bytes,
    )


def _samples(config: Plan, count: int, folder: Path) -> Index:
    """A data set of `count` samples: synthetic, or a random part of `config.data`, whose shards it shares."""
    data = folder / "data"
    if not config.data:
        prepare.build(f"synthetic:{count}", data, classes=config.classes)
        return open_data(config, data, "train")
    whole = open_data(config, config.data, "train")
    rows = np.random.default_rng(0).permutation(whole.good)[:count]
    data.mkdir()
    records = whole.records[np.sort(rows)]
    indexes.write(data, records, whole.shards, [], source=f"part of {config.data}", classes=whole.class_list)
    return open_data(config, data, "train")


def _threads(config: Plan, device: torch.device) -> int:
    """Threads as asked for, or this machine's cores divided among its GPUs."""
    return config.threads or max(cores.share() // (torch.cuda.device_count() if device.type == "cuda" else 1), 1)


def _quietly(run: Callable[[], dict]) -> dict:
    """What a command returns, and none of what it says of a job that is none."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return run()


def _simulated_bytes(classes: int) -> tuple[float, float]:
    """Bytes of a pair on disk and in memory, of logits with the spread and about the spectrum of an ImageNet teacher.

    At 1000 classes their code takes the 40-odd bytes per vector of `bench.labels.simulated`'s, whose head is trained.
    """
    rng, width, count = np.random.default_rng(0), min(classes, 512), 512
    spectrum = np.arange(1, width + 1) ** -0.5
    spectrum *= _SPREAD / np.linalg.norm(spectrum)
    features = rng.standard_normal((count, 1, width)) + 0.5 * rng.standard_normal((count, 2, width))
    logits = ((features * spectrum) @ rng.standard_normal((width, classes))).astype(np.float32)
    held = count * 3 // 4
    codec = codecs.auto(logits[:held])
    found = fidelity(codec, logits[held:], np.arange(count - held, dtype=np.uint64))
    return 2 * found.bytes_per_vector, codec.row_bytes


def read(path: Path) -> Rates:
    """The rates in a file that `pipeline plan --json` wrote. Raises UserError naming the key that is wrong."""
    found = outside.document(path, f"rates {path}", _FIX, _MAX_BYTES)
    found = found.get("rates") if isinstance(found, dict) else found
    return Rates(**outside.record(found, f"rates {path}", _FIX, _RATES))


_KINDS = {str: (outside.text, 0, 300, True), int: (outside.whole, 1, _MOST), float: (outside.number, _LEAST, _MOST)}
_RATES: dict[str, tuple] = {field.name: _KINDS[field.type] for field in dataclasses.fields(Rates)}
_RATES |= dict.fromkeys(("stored_wait", "live_wait"), (outside.number, 0, _MOST))
