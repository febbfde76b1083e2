"""How often a network agrees with the labels: known before it works for hours, and the first sign of classes that are
numbered otherwise than it learned them."""

import sys
from dataclasses import dataclass

import numpy as np

from pipeline.config import Machine
from pipeline.data.index import Index
from pipeline.networks.teacher import Teacher
from pipeline.system import device as devices
from pipeline.views import plan
from pipeline.views.loader import Loader
from pipeline.views.policy import Policy

_SAMPLES = 512
_SURE = 3.0  # standard errors
_LITTLE = 0.05  # of the way from guessing to being always right


@dataclass(frozen=True)
class Agreement:
    share: float
    """Of the samples, those whose label has the largest logit."""
    samples: int
    classes: int
    """That samples are of."""

    @property
    def guessing(self) -> float:
        """The share that a guess has."""
        return 1 / self.classes

    def __str__(self) -> str:
        return f"{100 * self.share:.1f} % of {self.samples:,} samples (guessing: {100 * self.guessing:.1f} %)"

    def warn(self, who: str) -> None:
        """Say on stderr if that is less than guessing, or so little more that it may be chance."""
        error = (self.guessing * (1 - self.guessing) / self.samples) ** 0.5
        least = self.guessing + max(_SURE * error, _LITTLE * (1 - self.guessing))
        if self.classes > 1 and self.share <= least:
            print(
                f"warning: {who} agrees with the labels of {self}, little more than guessing or less; are its classes "
                "numbered as those of the data set (see pipeline prepare --class-order), and is it trained on them?",
                file=sys.stderr,
                flush=True,
            )


def agreement(logits: np.ndarray, labels: np.ndarray) -> Agreement:
    """Of logits (n, C) with labels (n,)."""
    return Agreement(float((logits.argmax(1) == labels).mean()), len(labels), len(np.unique(labels)))


def look(teacher: Teacher, index: Index, policy: Policy, machine: Machine, batch_size: int) -> Agreement | None:
    """On the central crops of some random samples; None if none of them can be read."""
    rows = np.sort(np.random.default_rng(0).permutation(index.good)[:_SAMPLES])
    decoder = devices.decoder("auto", teacher.device)
    loader = Loader(index, policy, threads=devices.threads(machine), decoder=decoder, max_bad=machine.max_bad)
    batches = loader.batches(plan.requests(index, policy, 0, plan.cut(None, rows, batch_size)), pairs=False)
    answers = [(said.logits[:, 0].cpu().numpy(), batch.labels.numpy()) for batch, said in teacher.answers(batches)]
    if not answers:
        return None
    return agreement(*(np.concatenate(parts) for parts in zip(*answers, strict=True)))
