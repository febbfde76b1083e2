"""Training a teacher by cross-entropy, with or without JDA (claim b of the paper asks for both)."""

from itertools import repeat

from pipeline.config import TrainTeacher
from pipeline.data.index import open_data
from pipeline.networks import models
from pipeline.training.loop import Job, fit
from pipeline.training.objectives import CrossEntropy
from pipeline.views import policy as policies


def run(config: TrainTeacher) -> None:
    """Train a teacher; every epoch sees views of its own."""
    index = open_data(config, config.data, "train")
    teacher = models.create(config.teacher, index.class_list, seed=config.seed)
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
