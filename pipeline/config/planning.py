"""What `plan` and `demo` take."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pipeline.config.machine import Machine, Precision
from pipeline.config.ranges import Count, Range


@dataclass(frozen=True, kw_only=True)
class Plan(Machine):
    """Hours, bytes and GPU-hours of teacher pass and students on 1 to 64 GPUs, from rates measured on this machine."""

    teacher: str
    """Network NAME or NAME@WEIGHTS; weights do not matter to the time."""
    student: str
    """Network NAME."""
    teacher_size: Annotated[int | None, Range(1, 4096)] = None
    """Side in pixels that the teacher sees each view resized to."""
    views: Count
    """Augmented views per sample that the teacher is to look at."""
    epochs: Count
    """Passes of a student over the data."""
    images: Annotated[int | None, Range(1, 10**12)] = None
    """Training images; by default those of DATA."""
    classes: Annotated[int | None, Range(1)] = None
    """By default those of DATA, or 1000."""
    students: Count = 1
    """Students to train on the same labels."""
    policy: str = "imagenet"
    """imagenet, cifar10, cifar100 or a YAML file."""
    batch_size: Annotated[int, Range(1, 2**16)] = 128
    """Pairs per step of each GPU."""
    precision: Precision = "auto"
    """Arithmetic of both networks; auto: bf16 on a GPU that has it, else fp32."""
    data: Path | None = None
    """Prepared data set to measure on; without it a few synthetic photographs of ImageNet's size."""
    rates: Path | None = None
    """File that an earlier --json wrote, on the machine that is planned for; nothing is measured then."""
    read_mb_s: Annotated[float | None, Range(0, above=True)] = None
    """Megabytes (10⁶ B) per second that storage reads for all GPUs together; by default no limit."""
    json: Path | None = None
    """File to write the rates and the plan to."""


@dataclass(frozen=True, kw_only=True)
class Demo(Machine):
    """The whole job on scikit-learn's handwritten digits, ending in a table. Rerun to resume."""

    out: Path = Path("demo")
    """Folder for data, store, runs and report."""
    seeds: Count = 3
    """Students per loss."""
