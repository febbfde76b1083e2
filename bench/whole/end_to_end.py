"""`pipeline bench end-to-end`: a student's step with stored labels, against cross-entropy alone and a live teacher.

All arms train the student on the same pairs of views, step by step interleaved:

- `ce`: classes only;
- `stored`: CCD from stored labels, in the code that `precompute-teacher` chooses by default;
- `peer`: CCD from labels in TinyViT's format, the nearest to this store's: the top 100 probabilities, made dense logits
  on the device;
- `live`, `live-large`: CCD with a teacher in the loop, the paper's way;
- `loaded`: `stored` with its batches from the loader. The others' come from memory, so that their figures are those of
  the step, and the ceiling that the loader is held against.

The teachers' forward passes are timed in the same rounds. From all this follows after how many epochs, or students,
the teacher pass has paid for itself. Weights are random, and stored labels those of a simulated teacher
(`bench.labels.simulated`): nothing here depends on what they say.
"""

import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import cache
from bench import harness
from bench.labels import peers, simulated
from cache import Plane, UserError
from cache import codec as codecs
from cache.errors import did_you_mean
from kernels.reference import cosine_weight
from pipeline.config import Bench, PrecomputeTeacher, TrainStudent
from pipeline.data import order, prepare
from pipeline.data.index import Index
from pipeline.labels import epochs as labels
from pipeline.labels import precompute
from pipeline.networks import models
from pipeline.networks import teacher as answers
from pipeline.networks.placed import placed
from pipeline.system import device as devices
from pipeline.system import machine as machines
from pipeline.training import trainee as trainees
from pipeline.training.meter import Clock
from pipeline.training.objectives import CrossEntropy, Distillation, Objective
from pipeline.views import plan
from pipeline.views.batch import Batch
from pipeline.views.loader import Loader
from pipeline.views.policy import POLICIES

STUDENT, TEACHER, LARGE = "timm/resnet18", "timm/resnet34", "timm/resnet101"
ARMS = ("ce", "stored", "peer", "live", "live-large", "loaded")
VIEWS, EPOCHS = 10, 100  # of the job whose break-even is shown
_IMAGENET = 1_281_167
_CLASSES = 1000
_POLICY = POLICIES["imagenet"]
_FITTED, _CODED = 1024, 512  # pairs that a code is fitted to, and that labels are repeated from
_TOP = 100
_ON_CPU = 16  # pairs per step at most
_KEPT = 4  # batches that go round and round

Step = Callable[[], dict[str, float]]


def run(config: Bench) -> dict:
    """Run the benchmark, print its tables and write `config.json`."""
    names = tuple(config.arms.split(",")) if config.arms else ARMS
    for name in names:
        if name not in ARMS:
            raise UserError(f"unknown arm {name}", expected=", ".join(ARMS), fix=did_you_mean(name, ARMS))
    machine, device = machines.describe(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch_size = config.batch_size if device.type == "cuda" else min(config.batch_size, _ON_CPU)
    folder = harness.work(config.work)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        job = Job.make(Path(made), config, batch_size, device, large="live-large" in names)
        arms = {name: job.arm(name) for name in names}
        passes = {name: job.teacher_pass(teacher) for name, teacher in job.teachers.items() if name in names}
        steps = {**{name: arm.step for name, arm in arms.items()}, **{f"{name}: pass": p for name, p in passes.items()}}
        laps = harness.compare(steps, config.rounds or harness.ROUNDS)
        read, teachers = job.bytes_per_pair(), {name: teacher.name for name, teacher in job.teachers.items()}
    rows = _rows({name: laps[name] for name in names}, arms, batch_size, read, device)
    tables = {"step": rows}
    if even := [_break_even(name, laps, batch_size) for name in passes if "stored" in names]:
        tables["break-even"] = even
    found = harness.document(
        "end-to-end",
        machine=machine,
        options=vars(config) | {"batch_size": batch_size, "student": job.student} | {"teachers": teachers},
        unit="steps",
        reference="ce",
        arms={},
        tables=tables,
    )
    title = f"{batch_size} pairs, {job.student} on {device}, {config.rounds or harness.ROUNDS} rounds"
    for name, table in {"step": [_told(row) for row in rows], "split": [_split(row) for row in rows]}.items():
        harness.show_table(f"end-to-end: {name}, {title}", table)
    if even:
        harness.show_table("end-to-end: break-even", even)
    if config.json:
        harness.write(config.json, found)
    return found


@dataclass(frozen=True)
class Arm:
    step: Step
    """Seconds of the phases of one step."""
    peak_bytes: Callable[[], int]
    """Device memory that the arm holds and takes at most during a step."""
    label_bytes: int
    """Of a pair, as they are gathered."""


@dataclass(frozen=True)
class Job:
    """Data of ImageNet's shape, teachers, and the labels of one view."""

    config: TrainStudent
    index: Index
    teachers: dict[str, answers.Teacher]
    """By arm."""
    labels: labels.Labels
    top: "TopK"
    device: torch.device

    @classmethod
    def make(cls, folder: Path, config: Bench, batch_size: int, device: torch.device, large: bool) -> "Job":
        """Prepare, and label by the teacher of `live`."""
        data = config.data
        if not data:
            data = folder / "data"
            prepare.build(f"synthetic:{max(_KEPT * batch_size, 64)}", data, classes=_CLASSES)
        index = Index.open(data, "train")
        names = {"live": config.teacher or TEACHER} | ({"live-large": LARGE} if large else {})
        precision = devices.arithmetic("auto", device)
        teachers = {
            arm: answers.Teacher(models.create(name, index.classes, seed=0), _POLICY, device, precision)
            for arm, name in names.items()
        }
        found, top = _labelled(index, str(folder / "labels.zarr"), teachers["live"])
        name = config.student or STUDENT
        student = TrainStudent(data=data, student=name, out=folder / "run", batch_size=batch_size, lr=1e-3)
        return cls(student, index, teachers, found, top, device)

    @property
    def student(self) -> str:
        return self.config.student

    def arm(self, name: str) -> Arm:
        """One step of it at a time."""
        config, device = self.config, self.device
        held = _allocated(device)
        precision = devices.arithmetic("auto", device)
        network = models.create(config.student, self.index.classes, seed=0)
        trainee, forward = trainees.prepare(config, placed(network, device, precision, _POLICY))
        trainee.module.train()
        objective, label_bytes = self._objective(name)
        loader = Loader(self.index, _POLICY, threads=devices.threads(config), decoder=devices.decoder("auto", device))
        parts = self._parts(None if name == "loaded" else _KEPT)
        batches: Iterator[Batch] = loader.batches(plan.requests(self.index, _POLICY, 0, parts))
        if name != "loaded":
            batches = itertools.cycle(list(batches))
        held = _allocated(device) - held
        peak = 0

        def step() -> dict[str, float]:
            nonlocal peak
            before = _allocated(device, reset=True)
            clock = Clock(device, True)
            batch = next(batches)
            clock.lap("wait")
            trainees.take_step(config, trainee, forward, objective, batch, False, clock)
            peak = max(peak, held + _peak(device) - before)
            return clock.times

        return Arm(step, lambda: peak, label_bytes)

    def _objective(self, name: str) -> tuple[Objective, int]:
        if name == "ce":
            return CrossEntropy(), 0
        if name in self.teachers:
            return Distillation(self.config, 0, teacher=self.teachers[name]), 0
        if name == "peer":
            return Distillation(self.config, 0, labels=self.top), self.top.row_bytes  # pyright: ignore
        return Distillation(self.config, 0, labels=self.labels), self.labels.store.codec.row_bytes

    def teacher_pass(self, teacher: answers.Teacher) -> Step:
        """The teacher's forward pass of a batch of pairs, its answers in memory."""
        size, batch_size = _POLICY.base.size, self.config.batch_size
        images = torch.zeros((2, batch_size, size, size, 3), dtype=torch.uint8)
        batch = Batch(np.arange(batch_size), torch.zeros(batch_size, dtype=torch.int64), images, None)

        def step() -> dict[str, float]:
            started = time.perf_counter()
            teacher(batch).cpu()
            return {"teacher": time.perf_counter() - started}

        return step

    def _parts(self, count: int | None) -> Iterator[plan.Part]:
        """`count` whole batches; without it they never end."""
        size = self.config.batch_size
        epochs = itertools.count()
        parts = (part for epoch in epochs for _, part in order.steps(epoch, self.index.good, size, 1))
        for part in itertools.islice((part for part in parts if len(part) == size), count):
            yield 0, part

    def bytes_per_pair(self) -> float:
        """Mean bytes of an image as it is read from its shard."""
        return float(self.index.records["size"][self.index.good].mean())


@dataclass(frozen=True)
class TopK:
    """Labels in TinyViT's format, in place of `pipeline.labels.epochs.Labels`; row i has label i mod n."""

    plane: Plane
    index: torch.Tensor
    """i16 (n, 2, k)."""
    p: torch.Tensor
    """f16 (n, 2, k), at T = 4."""
    classes: int
    row_bytes: int
    in_codes = False
    device = torch.device("cpu")  # no kernel decodes them: the loss is given logits, wherever they lie

    def known(self, rows: np.ndarray) -> np.ndarray:
        return np.ones(len(rows), bool)

    def logits(self, rows: np.ndarray) -> torch.Tensor:
        """f32 (B, 2, C): T · log p, the rest of the mass spread over the other classes."""
        at = torch.from_numpy(rows % len(self.index)).to(self.index.device)
        index, p = self.index[at].long(), self.p[at].float()
        rest = (1 - p.sum(2, keepdim=True)).clamp_min(1e-8) / max(self.classes - p.shape[2], 1)
        return 4 * rest.repeat(1, 1, self.classes).scatter(2, index, p.clamp_min(1e-8)).log()


def _labelled(index: Index, path: str, teacher: answers.Teacher) -> tuple[labels.Labels, TopK]:
    """Labels of every row in both formats, where a student's would lie."""
    _, (logits,), _ = simulated.draw(simulated.teacher(), _FITTED)
    pairs = np.ascontiguousarray(logits.numpy()[..., np.arange(index.classes) % simulated.CLASSES])
    codec = codecs.fit("subspace", pairs, kl=codecs.DEFAULT_BUDGET)
    about = PrecomputeTeacher(data=index.path, teacher=teacher.name, store=path, views=1)
    manifest = precompute._manifest(about, index, _POLICY, teacher, codec.config, {})
    status = index.records["status"]
    store = cache.create(path, manifest, status, index.records["key_hash"])
    pairs, rows = pairs[:_CODED], len(index)
    codes = codec.encode(pairs, store.dither_keys(0, np.arange(_CODED) % rows))
    w = cosine_weight(*(torch.from_numpy(pairs).double().unbind(1))).float().numpy()
    digest = np.zeros((rows, 2), np.uint32)
    plane = Plane(0, np.resize(codes, (rows, codec.row_bytes)), np.resize(w, rows), digest, status == 0)
    device, at = teacher.device, torch.from_numpy(plane.codes)
    on_gpu = labels.place(store, device, "auto") == "gpu"
    found = labels.Labels(store, plane, device, at.to(device) if on_gpu else at)

    form = peers.tinyvit(index.classes, min(_TOP, index.classes))
    fields = peers.read(form.encode(pairs, np.arange(_CODED, dtype=np.uint64)), form.layout)
    top, p = (torch.from_numpy(fields[name]).to(device) for name in ("index", "value"))
    return found, TopK(plane, top, p, index.classes, form.row_bytes)


def _allocated(device: torch.device, reset: bool = False) -> int:
    if device.type != "cuda":
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


# --- what is reported


def _seconds(laps: list[dict[str, float]]) -> list[float]:
    return [sum(split.values()) for split in laps]


def _rows(laps: dict, arms: dict[str, Arm], batch_size: int, image_bytes: float, device: torch.device) -> list[dict]:
    """A row per arm: the step, its ratio to that of `ce` in the same round, its phases, bytes and memory."""
    base = _seconds(laps["ce"]) if "ce" in laps else None
    rows = []
    for name, mine in laps.items():
        seconds = _seconds(mine)
        ratio = harness.spread(a / b for a, b in zip(seconds, base, strict=True)) if base else None
        step = harness.spread(1e3 * second for second in seconds)
        rows.append(
            {
                "arm": name,
                "pairs/s": 1e3 * batch_size / step["median"],
                "ms/step": step["median"],
                "q1": step["q1"],
                "q3": step["q3"],
                **({"× ce": ratio["median"], "× ce q1": ratio["q1"], "× ce q3": ratio["q3"]} if ratio else {}),
                **{f"{phase} ms": 1e3 * statistics.median(split[phase] for split in mine) for phase in mine[0]},
                "bytes/pair": round(image_bytes + arms[name].label_bytes),
                **({"GPU MiB": round(arms[name].peak_bytes() / 2**20)} if device.type == "cuda" else {}),
            }
        )
    return rows


def _told(row: dict) -> dict:
    """What the terminal has room for."""
    shown = {name: row[name] for name in ("arm", "pairs/s", "ms/step")}
    if "× ce" in row:
        shown |= {"× ce": row["× ce"], "quartiles": f"{row['× ce q1']:.3f} – {row['× ce q3']:.3f}"}
    return shown | {name: row[name] for name in ("bytes/pair", "GPU MiB") if name in row}


def _split(row: dict) -> dict:
    return {name: value for name, value in row.items() if name == "arm" or name.endswith(" ms")}


def _break_even(name: str, laps: dict, batch_size: int) -> dict:
    """What a pass over ImageNet-1k costs, what an epoch saves, and when so many views have paid for themselves."""
    batches = _IMAGENET / batch_size / 3600
    teacher = statistics.median(_seconds(laps[f"{name}: pass"]))
    extra = statistics.median(
        live - stored for live, stored in zip(_seconds(laps[name]), _seconds(laps["stored"]), strict=True)
    )
    epochs = VIEWS * teacher / extra if extra > 0 else math.inf
    return {
        "live teacher": name,
        "h per view": teacher * batches,
        "h saved per epoch": extra * batches,
        f"{VIEWS} views, h": VIEWS * teacher * batches,
        f"{EPOCHS} epochs save, h": EPOCHS * extra * batches,
        f"epochs until {VIEWS} views have paid": epochs,
        f"students of {EPOCHS} epochs": epochs / EPOCHS,
    }
