"""A teacher of other classes than the data's (`--teacher-classes`), for the commands that take one.

A class map then says what the teacher's outputs are, and not what the data's classes are.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

from pipeline.config import Inspect, PrecomputeTeacher, Verify
from pipeline.data.classes import Classes
from pipeline.networks import models
from pipeline.networks.models import Network

_Config = TypeVar("_Config", PrecomputeTeacher, Verify, Inspect)


def for_data(config: _Config) -> _Config:
    """The options as they concern the data set."""
    return dataclasses.replace(config, class_map=None) if config.teacher_classes else config


def teacher(
    config: PrecomputeTeacher | Verify | Inspect, made: Callable[[int | Classes], Network], classes: int | Classes
) -> Network:
    """The network that `made` gives for `classes`; or for the teacher's own, of which those for `classes` answer.

    In the second case `classes` are more than a number.
    """
    if not config.teacher_classes:
        return made(classes)
    assert isinstance(classes, Classes)
    return models.narrowed(made(config.teacher_classes), classes, config.class_map)
