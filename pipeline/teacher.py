"""Training a teacher by cross-entropy, with or without JDA (claim b of the paper asks for both)."""

from itertools import repeat

from pipeline import models
from pipeline import policy as policies
from pipeline.config import TrainTeacher
from pipeline.device import open_data
from pipeline.loop import Job, fit
from pipeline.objectives import CrossEntropy


def run(config: TrainTeacher) -> None:
    """Train a teacher; every epoch sees views of its own."""
    index = open_data(config, config.data, "train")
    teacher = models.create(config.teacher, index.classes, seed=config.seed)
    fit(
        Job(
            config,
            index,
            policies.load(config.policy),
            teacher,
            lambda _: repeat(CrossEntropy(config.label_smoothing)),
            seed_of_views=config.seed,
            pairs=config.jda,
        )
    )
