"""What students of `bench.labels.codec_transfer` learn: inputs, a teacher's logits, and fresh data to judge them by."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench.labels import real, simulated
from cache import UserError, philox
from pipeline.data.index import Index

BATCH, REAL_BATCH = 1024, 64
"""Pairs per step, of the simulated teacher and of a real one."""
HIDDEN = 256
HELD_OUT = 8192
"""Simulated pairs to evaluate on."""
STUDENTS = ("small", "head")
_STREAM_SEED = 2
_DATA_SEED, _HELD_SEED = 0, 1


@dataclass(frozen=True)
class Problem:
    """Training data and fresh data; the second axis is original, augmented."""

    inputs: list[Tensor]
    """Per view (n, 2, ...)."""
    logits: list[Tensor]
    """Per view, f32 (n, 2, C)."""
    dither_keys: list[np.ndarray]
    """Per view, u64 (n,), the dither keys."""
    held_inputs: Tensor
    held_logits: Tensor
    held_labels: Tensor
    """i64 (m, 2): true classes; of a real teacher its own top ones."""
    judged_by: str
    """`accuracy`, or `agreement` with a teacher on pictures whose classes nobody knows."""
    batch: int
    """Pairs per step."""
    student: Callable[[], nn.Module]
    """A new one: inputs (B, 2, ...) -> logits (B, 2, C)."""


def simulation(samples: int, held_out: int, views: int) -> Problem:
    """The simulated teacher: `samples` pairs in `views` views, and `held_out` in one."""
    teacher = simulated.teacher()
    features, logits, _ = simulated.draw(teacher, samples, views, _DATA_SEED)
    held_features, held_logits, held_labels = simulated.draw(teacher, held_out, 1, _HELD_SEED)
    keys = np.arange(samples, dtype=np.uint64)
    dither_keys = [philox.dither_keys(_STREAM_SEED, keys, view) for view in range(views)]
    labels = held_labels[:, None].expand(-1, 2)
    head = _head(simulated.FEATURES)
    return Problem(features, logits, dither_keys, held_features[0], held_logits[0], labels, "accuracy", BATCH, head)


def photographs(teacher: str, student: str, data: Path, val: Path, views: int, work: Path) -> Problem:
    """A real teacher on the training split of `data` and, judged, on all of `val`, in as many views.

    Student `small` is a convolutional network of 0.8 million weights that sees 32 x 32 pixels; `head` is a layer of 256
    and one of 1000 on the means of the teacher's fifth stage, scaled. Raises UserError.
    """
    if student not in STUDENTS:
        raise UserError(f"unknown student {student}", expected=" or ".join(STUDENTS))
    network = real.network(teacher)
    seen, held = (
        real.look(network, Index.open(path, split), views, work) for path, split in ((data, "train"), (val, "val"))
    )
    if student == "head":
        scale = seen.features[0].flatten(0, 1).std(dim=0).clamp(min=1e-6)
        inputs, held_inputs = ([view / scale for view in part.features] for part in (seen, held))
        make = _head(seen.features[0].shape[-1])
    else:
        inputs, held_inputs = (part.pixels for part in (seen, held))
        make = Small
    held_logits = torch.cat(held.logits)
    labels = held_logits.argmax(-1)
    held_inputs = torch.cat(held_inputs)
    return Problem(
        inputs, seen.logits, seen.dither_keys, held_inputs, held_logits, labels, "agreement", REAL_BATCH, make
    )


def _head(features: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(features, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, simulated.CLASSES))


class Small(nn.Module):
    """u8 (B, 2, 3, 32, 32) -> logits (B, 2, 1000)."""

    def __init__(self):
        super().__init__()
        widths = (3, 32, 64, 128)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.Flatten(), nn.Linear(128 * 16, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, real.CLASSES)]
        self.layers = nn.Sequential(*layers)

    def forward(self, pixels: Tensor) -> Tensor:
        flat = pixels.flatten(0, 1).float() / 64 - 2
        return self.layers(flat.contiguous(memory_format=torch.channels_last)).unflatten(0, pixels.shape[:2])
