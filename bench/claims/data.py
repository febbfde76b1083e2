"""What the claims are tried on: the data set, and networks, policy and recipe that suit it."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from kernels.jda.ops import TABLES
from pipeline import demo
from pipeline.config import Bench
from pipeline.data import index, order, prepare
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
    """None: all."""
    epochs: int
    """Of a student."""
    teacher_epochs: int
    batch_size: int
    lr: float
    warmup_epochs: float


def _digits() -> Trial:
    """At 32 pixels, as the committed results are; the demo's policy has 16."""
    policy = policies.load(demo.POLICY)
    policy = dataclasses.replace(policy, base=policy.base.resized(32))
    return Trial("digits", "digits", demo.TEACHER, demo.STUDENT, policy, None, 8, 20, 64, 0.1, 1)


def _fashion() -> Trial:
    """A hundredth of the images, at 16 pixels: a student takes half a minute of a core. No other rate was tried."""
    policy = Policy("fashion", 0.3, TABLES["cifar10"], Base(16, scale=(0.6, 1.0), centre=1.0), *_GREY)
    return Trial("fashion", f"idx:{_IDX}", "cifar/resnet14", "cifar/resnet8", policy, 600, 16, 1, 32, 0.05, 2)


def trial(config: Bench) -> Trial:
    """Fashion-MNIST where it is installed and no `--data` says otherwise; else what suits the digits; and on top what
    the options say."""
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


def pool(whole: Index, samples: int, folder: Path) -> Index:
    """`samples` images of a data set, of each class alike, as one of their own: a teacher pass looks at those alone.

    The index at `folder`, made if it is not there, has records of the whole one's and its shards.
    """
    if not folder.exists():
        good = whole.good
        rows = order.few_shot(good, whole.records["label"][good], samples / len(good))
        partial = folder.with_name(f".{folder.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        source = f"{samples} of {whole.path}"
        index.write(partial, whole.records[rows], whole.shards, [], source=source, classes=whole.class_list)
        partial.rename(folder)
    return Index.open(folder)
