"""Two timed steps of a training run, and what the run would take; nothing is written."""

import time
from collections.abc import Callable
from itertools import islice

import numpy as np

from pipeline.config import Training
from pipeline.labels.epochs import Labels
from pipeline.networks.placed import Placed
from pipeline.replay import Replay
from pipeline.system import ranks
from pipeline.system.terminal import duration, summary
from pipeline.training.meter import Clock
from pipeline.training.objectives import Objective
from pipeline.training.trainee import Trainee, learning_rate, take_step

_SETTLING, _TIMED, _SECONDS = 8, 2, 1.0  # steps; and how long steps are timed for at least


def run(
    config: Training,
    replay: Replay,
    objective: Callable[[int, Labels | None], Objective],
    trainee: Trainee,
    forward: Placed,
) -> dict:
    """Train a few steps, print what a run would take; {"step_s", "wait_share", "hours"}."""
    trainee.module.train()
    timed: list[float] = []
    waits: list[float] = []
    begun = time.perf_counter()
    for batch in islice(iter(replay.next, None), len(replay)):
        waits.append(time.perf_counter() - begun)
        trainee.pace(learning_rate(config, batch.epoch + batch.step / replay.steps_per_epoch))
        clock = Clock(forward.device, False)
        take_step(config, trainee, forward, objective(batch.epoch, batch.stored), batch.made, False, clock)
        timed.append(time.perf_counter() - begun)
        if len(timed) >= _SETTLING + _TIMED and sum(timed[_SETTLING:]) > _SECONDS:
            break
        begun = time.perf_counter()
    settled = slice(_SETTLING if len(timed) > _SETTLING else 0, None)
    seconds, steps = float(np.median(timed[settled])), replay.steps_per_epoch
    wait = min(float(np.median(waits[settled])) / seconds, 1.0)
    training = seconds * steps * config.epochs
    summary(
        "dry run: nothing was written",
        {
            "samples, steps per epoch, epochs": f"{len(replay.rows):,}, {steps:,}, {config.epochs}",
            "step": f"{1e3 * seconds:.1f} ms on {forward.device}, {ranks.world()} process(es)",
            "waiting for images": f"{wait:.0%} of a step",
            "training": f"{duration(training)} without evaluation",
        },
    )
    return {"step_s": seconds, "wait_share": wait, "hours": training / 3600}
