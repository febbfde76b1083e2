"""`pipeline plan`: what the teacher pass, students on its labels, and students beside a live teacher would cost.

`pipeline.planning.rates` runs a small job of each kind for real. Everything here is arithmetic on what a pair took in
them. The formulae are those of docs/plan.md.
"""

import dataclasses
import json
import math
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

import cache
from cache import UserError
from pipeline.config import Plan, PrecomputeTeacher
from pipeline.data.index import open_data
from pipeline.labels import advice, calibrate
from pipeline.planning import rates
from pipeline.planning.rates import Rates
from pipeline.system.files import write_atomically
from pipeline.system.terminal import console_out, decimal, summary
from pipeline.views import policy as policies

GPUS = (1, 2, 4, 8, 16, 32, 64)
STORAGE = "storage"


@dataclass(frozen=True)
class Job:
    images: int
    views: int
    epochs: int
    """Of each student."""
    students: int = 1
    read_bytes_s: float = math.inf
    """Bytes per second that storage reads, for all processes together."""


@dataclass(frozen=True)
class Spent:
    hours: float
    """Wall clock."""
    bottleneck: str
    """What most of the time is waited for: loader, teacher, student or storage."""


@dataclass(frozen=True)
class Row:
    """On so many GPUs."""

    gpus: int
    teacher_pass: Spent
    stored: Spent
    """One student on stored labels."""
    live: Spent
    """One student with the teacher in the loop."""
    stored_gpu_hours: float
    """Teacher pass and all students."""
    live_gpu_hours: float
    """All students."""
    break_even_epochs: int | None
    """Epochs, of one student or of several together, from which on the stored way costs fewer GPU-hours; None: it
    never does."""
    break_even_students: int | None
    """The same in students."""


def run(config: Plan) -> None:
    """Measure or read rates, print the plan and write `config.json`."""
    _check(config)
    found = _read(config) if config.rates else rates.measure(config)
    images = config.images or open_data(config, str(config.data), "train").usable
    read_bytes_s = math.inf if config.read_mb_s is None else 1e6 * config.read_mb_s
    job = Job(images, config.views, config.epochs, config.students, read_bytes_s)
    rows = [row(found, job, gpus) for gpus in GPUS]
    _show(found, job, rows)
    if config.json:
        document = {
            "rates": dataclasses.asdict(found),
            "job": dataclasses.asdict(job) | {"read_bytes_s": None if config.read_mb_s is None else read_bytes_s},
            "plan": [dataclasses.asdict(each) for each in rows],
            "bytes": sizes(found, job),
        }
        write_atomically(config.json, (json.dumps(document, indent=1) + "\n").encode())


# --- the formulae


def row(rates: Rates, job: Job, gpus: int) -> Row:
    """The three jobs on `gpus` GPUs."""
    once, stored = teacher_pass(rates, job, gpus), training(rates, job, gpus)
    live = training(rates, job, gpus, live=True)
    saved = live.hours - stored.hours
    return Row(
        gpus=gpus,
        teacher_pass=once,
        stored=stored,
        live=live,
        stored_gpu_hours=gpus * (once.hours + job.students * stored.hours),
        live_gpu_hours=gpus * job.students * live.hours,
        break_even_epochs=math.floor(once.hours / (saved / job.epochs)) + 1 if saved > 0 else None,
        break_even_students=math.floor(once.hours / saved) + 1 if saved > 0 else None,
    )


def teacher_pass(rates: Rates, job: Job, gpus: int) -> Spent:
    """Calibration by one process, then whole blocks shared out among all."""
    per_view = -(-job.images // PrecomputeTeacher.block_rows)
    turns = -(-job.views * per_view // gpus)
    pairs = gpus * turns * job.images / per_view  # with those that a process waits for in the last turn
    return _spent(rates.teach, rates.image_bytes, pairs, job, gpus, alone=calibrate.pairs(job.images) * rates.teach)


def training(rates: Rates, job: Job, gpus: int, live: bool = False) -> Spent:
    """One student. Of stored labels a machine reads all of a view, in each process that stands for one."""
    if live:
        return _spent(rates.live, rates.image_bytes, job.images * job.epochs, job, gpus, rates.live_wait, "teacher")
    read = rates.image_bytes + gpus * _planes(job) / job.epochs * _stored(rates)
    return _spent(rates.stored, read, job.images * job.epochs, job, gpus, rates.stored_wait, "student")


def _spent(
    seconds: float, read: float, pairs: float, job: Job, gpus: int, wait: float = 0.0, who: str = "teacher", alone=0.0
) -> Spent:
    """Of pairs that take one process so many seconds and storage so many bytes each; `alone`: seconds of one only."""
    pace, reading = seconds / gpus, read / job.read_bytes_s
    limit = STORAGE if reading > pace else "loader" if wait > 0.5 else who
    return Spent((pairs * max(pace, reading) + alone) / 3600, limit)


def _planes(job: Job) -> int:
    """Times that a student reads a view of labels: one that follows itself is kept."""
    return job.epochs if job.views > 1 else 1


def _stored(rates: Rates) -> float:
    """Bytes of a pair's labels on disk, with what lies beside them."""
    return rates.label_bytes + cache.BESIDE_BYTES


def sizes(rates: Rates, job: Job) -> dict[str, float]:
    """Bytes that the jobs read, write and keep."""
    return {
        "store": job.images * job.views * _stored(rates),
        "plane": job.images * rates.row_bytes,
        "teacher_pass_images": job.images * job.views * rates.image_bytes,
        "student_images": job.images * job.epochs * rates.image_bytes,
        "student_labels_per_gpu": job.images * _planes(job) * _stored(rates),
    }


# --- what is asked for


def _check(config: Plan) -> None:
    if not config.images and not config.data:
        raise UserError("how many images?", found="neither", expected="--images or --data")
    if config.data and config.classes:
        classes = open_data(config, config.data, "train").classes
        if classes != config.classes:
            raise UserError("--data has other classes", found=classes, expected=config.classes, fix="drop --classes")


def _read(config: Plan) -> Rates:
    """The rates of `config.rates`, which must be those of the job."""
    assert config.rates
    found = rates.read(config.rates)
    policy = policies.load(config.policy)
    wanted = {
        "teacher": rates.teacher_of(config),
        "student": config.student.partition("@")[0],
        "classes": config.classes or found.classes,
        "policy": policy.name,
        "size": policy.base.size,
        "batch_size": config.batch_size,
    }
    if config.precision != "auto":
        wanted["precision"] = config.precision
    for name, value in wanted.items():
        if (there := getattr(found, name)) != value:
            what = f"--rates {config.rates} are of another {name.replace('_', ' ')}"
            raise UserError(what, found=there, expected=value, fix="measure again, without --rates")
    return found


# --- what is said


def _show(rates: Rates, job: Job, rows: list[Row]) -> None:
    unit = "GPU" if rates.device == "cuda" else "machine"
    table = Table(
        title=Text(f"{rates.teacher} → {rates.student}, {job.images:,} images"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    table.add_column(f"\n{unit}s", justify="right", min_width=8)
    for name in ("hours of the\nteacher pass", "one student,\nstored", "one student,\nlive teacher"):
        table.add_column(name, min_width=13)
    for name, width in ((f"{unit}-h\nstored", 9), (f"{unit}-h\nlive", 9), ("even at\nepoch", 7)):
        table.add_column(name, justify="right", min_width=width)
    for each in rows:
        spent = [f"{_hours(s.hours)} {s.bottleneck}" for s in (each.teacher_pass, each.stored, each.live)]
        even = f"{each.break_even_epochs:,}" if each.break_even_epochs else "never"
        table.add_row(str(each.gpus), *spent, _hours(each.stored_gpu_hours), _hours(each.live_gpu_hours), even)
    console_out.print(table)
    size = {name: decimal(value) for name, value in sizes(rates, job).items()}
    alone = {"teacher pass": rates.teach, "student on stored labels": rates.stored, "with a live teacher": rates.live}
    storage = "without limit" if job.read_bytes_s == math.inf else f"at {job.read_bytes_s / 1e6:,.4g} MB/s for all"
    summary(
        "plan",
        {
            "views": f"{job.views:,}",
            "advice": advice.on_views(job.views, job.epochs),
            "students": f"{job.students:,} of {job.epochs:,} epochs",
            "break-even": _break_even(rows[0], job, unit),
            "store": f"{size['store']} on disk; a view's labels take {size['plane']} of memory per machine",
            "images read": f"teacher pass {size['teacher_pass_images']}, a student {size['student_images']}",
            "labels read": f"{size['student_labels_per_gpu']} by each {unit} of a student on stored labels",
            "pairs/s": ", ".join(f"{name} {1 / seconds:,.4g}" for name, seconds in alone.items()),
            "steps wait for images": f"{rates.stored_wait:.0%} of the time, with a live teacher {rates.live_wait:.0%}",
            "measured with": f"{rates.data}, {decimal(rates.image_bytes)} each; {rates.precision}, "
            f"{rates.measured_batch:,} pairs per step; {rates.labels}",
            "assumed": f"{unit}s like this one ({rates.hardware}), each with {rates.cores:,} "
            f"core{'s' * (rates.cores > 1)}; {rates.batch_size:,} pairs per step and {unit}; storage reads {storage}",
            "left out": f"gradients between {unit}s, evaluation, starting, checkpoints",
        },
    )


def _break_even(first: Row, job: Job, unit: str) -> str:
    if first.break_even_epochs is None:
        return f"never: on 1 {unit} a live teacher costs nothing; both ways wait for the {first.stored.bottleneck}"
    part = (first.live_gpu_hours - first.stored_gpu_hours) / first.live_gpu_hours
    return (
        f"on 1 {unit} stored labels cost fewer {unit}-hours from epoch {first.break_even_epochs:,} on, that is with "
        f"student {first.break_even_students:,} of {job.epochs:,} epochs; as planned "
        f"{abs(part):.0%} {'fewer' if part > 0 else 'more'}"
    )


def _hours(hours: float) -> str:
    if 0 < hours < 0.005:
        return "<0.01"
    return f"{hours:,.{2 if hours < 10 else 1 if hours < 100 else 0}f}"
