"""The whole job on scikit-learn's handwritten digits: shards, teacher, store, students, a table and a picture."""

import dataclasses
import statistics
import time
from pathlib import Path

from rich.table import Table

import cache
from pipeline.config import Demo, Inspect, PrecomputeTeacher, TrainStudent, TrainTeacher
from pipeline.data import prepare
from pipeline.data.index import Index
from pipeline.labels import inspect, precompute
from pipeline.system.terminal import console_out
from pipeline.training import train_student, train_teacher

POLICY = str(Path(__file__).parent / "recipes" / "digits_policy.yaml")
TEACHER, STUDENT = "cifar/resnet14x2", "cifar/resnet8"
VIEWS = 8
LOSSES = ("ce", "kd", "ccd")


def prepared(out: Path, **machine) -> tuple[Path, str]:
    """The digits under OUT/data and a teacher under OUT/teacher, made if they are not there: (data, NAME@WEIGHTS)."""
    data = out / "data"
    if not data.exists():
        prepare.build("digits", data)
    # The teacher never sees JDA: the paper's claim is that augmentation helps the student even then, and a teacher
    # trained by somebody else, the common case, has not seen it either.
    train_teacher.run(
        TrainTeacher(
            **machine,
            data=data,
            val=data,
            out=out / "teacher",
            resume=True,
            teacher=TEACHER,
            policy=POLICY,
            jda=False,
            epochs=10,
            batch_size=64,
            lr=0.1,
            schedule="cosine",
            warmup_epochs=1,
            eval_epochs=0,
        )
    )
    return data, f"{TEACHER}@{out / 'teacher' / 'model.safetensors'}"


def run(config: Demo) -> None:
    """Run every step that is not there yet, then print the table and write `report.html`."""
    started = time.perf_counter()
    out, machine = config.out, {"device": config.device, "threads": config.threads}
    data, trained = prepared(out, **machine)
    store = str(out / "labels.zarr")
    precompute.run(
        PrecomputeTeacher(
            **machine,
            data=data,
            teacher=trained,
            store=store,
            views=VIEWS,
            policy=POLICY,
            block_rows=512,
        )
    )
    student = TrainStudent(
        **machine,
        data=data,
        val=data,
        out=out,
        resume=True,
        store=store,
        student=STUDENT,
        epochs=VIEWS,
        batch_size=64,
        lr=0.1,
        schedule="cosine",
        warmup_epochs=1,
        eval_epochs=0,
    )
    runs = {
        loss: [
            train_student.run(dataclasses.replace(student, loss=loss, seed=seed, out=out / f"student-{loss}-{seed}"))
            for seed in range(config.seeds)
        ]
        for loss in LOSSES
    }
    index, opened = Index.open(data, split="train"), cache.open(store)
    inspect.run(Inspect(**machine, store=store, data=data, out=out / "report.html", teacher=trained))

    table = Table(title=f"{TEACHER} → {STUDENT}, {len(index.good):,} digits, {VIEWS} epochs, {config.seeds} seeds")
    for column in ("loss", "top-1 % mean", "± std", "each seed", "seconds per run"):
        table.add_column(column)
    for loss, records in runs.items():
        top1 = [100 * record["val"]["top1"] for record in records]
        table.add_row(
            loss,
            f"{statistics.mean(top1):.2f}",
            f"{statistics.stdev(top1):.2f}" if len(top1) > 1 else "-",
            " ".join(f"{value:.2f}" for value in top1),
            f"{statistics.median(record['seconds'] for record in records):.1f}",
        )
    console_out.print(table)
    bytes_per_vector = opened.label_bytes() / (2 * len(index) * VIEWS)
    console_out.print(
        f"labels: {bytes_per_vector:.1f} bytes per vector of {index.classes} classes on disk; "
        f"view pairs with the teacher's top classes: {out / 'report.html'}; {time.perf_counter() - started:.0f} s"
    )
