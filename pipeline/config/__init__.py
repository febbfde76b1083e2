"""What every command takes. The dataclasses are the schema: defaults < recipe YAML < flags."""

from pipeline.config.bench import Bench
from pipeline.config.data import Prepare
from pipeline.config.labels import Inspect, PrecomputeTeacher, Store, Verify
from pipeline.config.machine import Machine, Precision
from pipeline.config.planning import Demo, Plan
from pipeline.config.ranges import Options, Range
from pipeline.config.recipe import recipe_flags
from pipeline.config.training import Evaluate, Loss, Training, TrainStudent, TrainTeacher

__all__ = [
    "Bench",
    "Demo",
    "Evaluate",
    "Inspect",
    "Loss",
    "Machine",
    "Options",
    "Plan",
    "Precision",
    "PrecomputeTeacher",
    "Prepare",
    "Range",
    "Store",
    "TrainStudent",
    "TrainTeacher",
    "Training",
    "Verify",
    "recipe_flags",
]
