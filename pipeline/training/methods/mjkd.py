"""MJKD: the hard and the soft gradient with a momentum each."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pipeline.config.ranges import Range
from pipeline.training.methods.kd import KnowledgeDistillation


@dataclass(frozen=True, kw_only=True)
class GradientControl(KnowledgeDistillation):
    """KD whose gradient has momentum μ + delta, while that of the hard loss, with the weight decay, has μ − delta.

    Multiloss Joint Gradient Control Knowledge Distillation (Electronics 13(20):4102, 2024) takes the gradients of its
    losses apart and gives the logits' more weight in the update. Its text was not to be had: two momenta are the way of
    *DOT: A Distillation-Oriented Trainer* (Zhao et al., ICCV 2023), whose delta for CIFAR-100 is the default, from
    memory of its code. MJKD's term of features is not here. A step has two backward passes.
    """

    name: ClassVar = "mjkd"
    kernel: ClassVar = None  # a kernel adds the two gradients up

    delta: Annotated[float, Range(0, 0.5)] = 0.075

    @property
    def apart(self) -> float:
        return self.delta
