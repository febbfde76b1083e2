"""How long a study will take, told before it begins."""

import time
from collections.abc import Iterable

import torch
from torch.nn.functional import cross_entropy

from bench.claims.data import Trial
from bench.claims.studies import JDA, Setting
from pipeline.networks import models

_SECONDS = 1.0  # how long steps are timed for
_FORWARD = 1 / 3  # of a step
_STARTS = 3.0  # seconds of a network's start, logs and checkpoint


def expected(jobs: Iterable[tuple], trial: Trial, whole: int, samples: int, val: int, classes: int) -> float:
    """Seconds of one core that jobs take: ("teacher", name), ("store", …) and ("student", Setting, seed).

    A step of each network is timed on noise; loading comes for nothing. `whole`: images that teachers learn from,
    `samples`: students, `val`: images to validate on.
    """
    size = trial.policy.base.size
    teacher = _view_s(trial.teacher.partition("@")[0], trial.teacher_size or size, trial.batch_size, classes)
    student = _view_s(trial.student.partition("@")[0], size, trial.batch_size, classes)
    seconds = 0.0
    for kind, what, *_ in jobs:
        if kind == "teacher":
            trained = 0 if "@" in trial.teacher else whole * trial.teacher_epochs * (1 + (what == JDA))
            seconds += teacher * (trained + _FORWARD * val)
        elif kind == "store":
            seconds += teacher * _FORWARD * 2 * samples * trial.epochs
        else:
            seconds += student * (_views(what, trial, samples) + _FORWARD * val)
        seconds += _STARTS
    return seconds


def _views(which: Setting, trial: Trial, samples: int) -> float:
    """That a student learns from."""
    return samples * which.share * trial.epochs * which.time * (1 if which.fraction in (0, 1) else 2)


def _view_s(name: str, size: int, batch: int, classes: int) -> float:
    """Seconds of a step per view, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        count = 2 * batch
        module = models.create(name, classes).module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        noise = torch.randn(count, 3, size, size).to(memory_format=torch.channels_last)
        target = torch.zeros(count, dtype=torch.long)
        steps, start = -1, 0.0
        while steps < 1 or time.process_time() - start < _SECONDS:
            cross_entropy(module(noise), target).backward()
            steps += 1
            start = start or time.process_time()  # the first one allocates
        return (time.process_time() - start) / (steps * count)
    finally:
        torch.set_num_threads(threads)
