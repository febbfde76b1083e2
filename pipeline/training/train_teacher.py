"""Training a teacher by cross-entropy, with or without JDA (claim b of the paper asks for both)."""

from pipeline.config import TrainTeacher
from pipeline.data.index import open_data, require_labels
from pipeline.networks import models
from pipeline.replay import Replay
from pipeline.training.loop import Job, fit
from pipeline.training.objectives import CrossEntropy


def run(config: TrainTeacher) -> None:
    """Train a teacher; every epoch sees views of its own."""
    index = open_data(config, config.data, "train")
    require_labels(index, "--data")
    replay = Replay(
        index,
        batch_size=config.batch_size,
        epochs=config.epochs,
        device=config.device,
        seed=config.seed,
        few_shot=config.few_shot,
        shuffle_window=config.shuffle_window,
        policy=config.policy,
        pairs=config.jda,
        threads=config.threads,
        max_bad=config.max_bad,
    )
    teacher = models.create(config.teacher, index.class_list, seed=config.seed)
    fit(Job(config, replay, teacher, lambda epoch, stored: CrossEntropy(config.label_smoothing)))
