"""Cross-entropy, the control: no teacher."""

from dataclasses import dataclass
from typing import ClassVar

from pipeline.training.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Method):
    """The hard loss alone, of all views or of those that --augmented-fraction takes."""

    name: ClassVar = "ce"
    needs: ClassVar = frozenset({"labels"})
