"""What the claims are tried on: the data set, and networks, policy and recipe that suit it."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.labels import real
from cache import UserError
from kernels.jda.ops import TABLES
from pipeline import demo
from pipeline.config import Bench
from pipeline.data import index, order, prepare
from pipeline.data.classes import Classes
from pipeline.data.index import Index
from pipeline.views import policy as policies
from pipeline.views.policy import Base, Policy

_IDX = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package `dataset-fashion-mnist` lies."""
_GREY = (0.286,) * 3, (0.353,) * 3  # mean and deviation of Fashion-MNIST's training pixels


@dataclass(frozen=True)
class Trial:
    """Choices for a data set. Teachers see all its training images, students `samples` of them."""

    name: str
    source: str
    """As `prepare` takes it."""
    teacher: str
    student: str
    policy: Policy
    samples: int | None
    """None, or more than there are: all."""
    epochs: int
    """Of a student."""
    teacher_epochs: int
    batch_size: int
    lr: float
    warmup_epochs: float
    teacher_size: int | None = None
    """Side in pixels that the teacher sees each view resized to; None: views stay as they are."""


def _digits() -> Trial:
    """At 32 pixels, as the committed results are; the demo's policy has 16."""
    policy = policies.load(demo.POLICY)
    policy = dataclasses.replace(policy, base=policy.base.resized(32))
    return Trial("digits", "digits", demo.TEACHER, demo.STUDENT, policy, None, 8, 20, 64, 0.1, 1)


def _fashion() -> Trial:
    """A hundredth of the images, at 16 pixels: a student takes half a minute of a core. No other rate was tried."""
    policy = Policy("fashion", 0.3, TABLES["cifar10"], Base(16, scale=(0.6, 1.0), centre=1.0), *_GREY)
    return Trial("fashion", f"idx:{_IDX}", "cifar/resnet14", "cifar/resnet8", policy, 600, 16, 1, 32, 0.05, 2)


def _photographs(teacher: str) -> Trial:
    """At 64 pixels: there the teacher's top class is that of 160 for two images in five, at 32 for one in five. A
    network of few multiplications and a quarter of the images, so that a student takes a minute or two of a core. The
    rate is Fashion-MNIST's."""
    policy = Policy("photographs", 0.2, TABLES["imagenet"], Base(64, scale=(0.25, 1.0)), (0.5,) * 3, (0.5,) * 3)
    return Trial("photographs", "", teacher, "timm/test_byobnet", policy, 750, 16, 1, 32, 0.05, 2, real.SIZE)


def trial(config: Bench) -> Trial:
    """Photographs where the teacher is one of `real.TEACHERS`; Fashion-MNIST where it is installed and no `--data`
    says otherwise; else what suits the digits; and on top what the options say. Raises UserError."""
    if config.teacher in real.TEACHERS:
        chosen = _photographs(config.teacher)
    elif config.val:
        fix = f"give --teacher {real.TEACHERS[0]}, or leave --val out: DATA has a val part of its own"
        raise UserError("--val without a teacher of photographs", found=config.teacher or "no --teacher", fix=fix)
    else:
        chosen = _digits() if config.data or not _IDX.is_dir() else _fashion()
    asked = {
        "teacher": config.teacher,
        "student": config.student,
        "policy": config.policy and policies.load(config.policy),
        "samples": config.samples,
        "epochs": config.epochs,
    }
    return dataclasses.replace(chosen, **{name: value for name, value in asked.items() if value})


def prepared(chosen: Trial, config: Bench, work: Path) -> Path:
    """The folder of the data set, made if it is not there."""
    folder = config.data or work / chosen.name
    if not config.data and not folder.exists():
        prepare.build(chosen.source, folder)
    return folder


def pool(whole: Index, samples: int | None, work: Path) -> Index:
    """`samples` images of a data set, of each class alike, as one of their own in `work`, made if it is not there: a
    teacher pass looks at those alone. The whole one where there are no more, or for None."""
    if not samples or samples >= len(whole.good):
        return whole
    folder = work / f"pool-{whole.fingerprint[:16]}-{samples}"
    if not folder.exists():
        good = whole.good
        rows = order.few_shot(good, whole.records["label"][good], samples / len(good))
        derive(whole, whole.records[rows], whole.class_list, f"{samples} of {whole.path}", folder)
    return Index.open(folder)


def derive(
    whole: Index, records: np.ndarray, classes: Classes, source: str, folder: Path, **arrays: np.ndarray
) -> None:
    """A data set at `folder` of the whole one's shards and of these of its records, with `arrays` as NAME.npy in it."""
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    index.write(partial, records, whole.shards, [], source=source, classes=classes)
    for name, array in arrays.items():
        np.save(partial / f"{name}.npy", array, allow_pickle=False)
    partial.rename(folder)


def key(*parts) -> str:
    """A short hash of whatever something depends on."""
    text = json.dumps([torch.__version__, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
