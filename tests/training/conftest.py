"""A short run that several tests compare with theirs."""

import pytest
from support.tiny import Tiny, made

from pipeline.config import TrainStudent
from pipeline.training import train_student


@pytest.fixture(scope="session")
def options(digits, labels, tmp_path_factory) -> TrainStudent:
    return TrainStudent(
        data=digits,
        val=digits,
        store=labels,
        student="cifar/resnet8",
        out=tmp_path_factory.mktemp("train") / "whole",
        epochs=3,
        batch_size=16,
        lr=0.05,
        schedule="cosine",
        warmup_epochs=0.5,
        checkpoint_steps=2,
        device="cpu",
    )


@pytest.fixture(scope="session")
def whole(options) -> TrainStudent:
    train_student.run(options)
    return options


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    return made(tmp_path_factory.mktemp("tiny"))
