"""A simulated 1000-class teacher with a ResNet-34-like linear head, to test what stored labels do to a student.

No pretrained network comes with this package. `draw` makes 512-d post-ReLU features of a hierarchical 1000-class
problem, for an original and an augmented view of each sample, and the teacher's logits for both. Max probability,
entropy and logit spread lie in the range of ImageNet ResNet-34; the top 10 hold 0.1 to 0.2 of the mass at T = 4.
It ranks label formats, and says nothing about accuracy on ImageNet.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

HEAD = Path(__file__).parents[1] / "data" / "resnet34_head.npz"
"""weight f32 (1000, 512) and bias f32 (1000,) of a linear layer trained on this problem."""
CLASSES, FEATURES = 1000, 512
_NOISE = 4.8  # radius of a class's cloud against that of the tree of class means


@dataclass(frozen=True)
class Teacher:
    """The head, and the problem it was trained on."""

    weight: torch.Tensor
    """f32 (1000, 512)."""
    bias: torch.Tensor
    """f32 (1000,)."""
    means: torch.Tensor
    """f32 (1000, 512), of the classes before the ReLU: leaves of a tree of 10 x 10 x 10."""
    noise: torch.Tensor
    """f32 (512,), spectrum of the variation within a class."""


def teacher() -> Teacher:
    """The one teacher; its problem is drawn from a fixed seed."""
    head = np.load(HEAD)
    generator = torch.Generator().manual_seed(0)
    spectrum = _spectrum(-0.45)
    means = torch.zeros(1, FEATURES)
    for scale in (0.65, 0.6, 0.52):
        children = scale * torch.randn(len(means), 10, FEATURES, generator=generator) * spectrum
        means = (means[:, None] + children).reshape(-1, FEATURES)
    return Teacher(torch.from_numpy(head["weight"]), torch.from_numpy(head["bias"]), means, _spectrum(-0.7))


def draw(
    source: Teacher, samples: int, views: int = 1, seed: int = 0
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """(features, logits, labels) of fresh samples: per view f32 (n, 2, 512) and f32 (n, 2, 1000); labels i64 (n,).

    The second axis is original, augmented. Views differ in what augmentation adds to the same sample.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (samples,), generator=generator)
    content = source.means[labels] + _NOISE * 0.9 * torch.randn(samples, FEATURES, generator=generator) * source.noise

    def seen(low: float, high: float) -> torch.Tensor:
        """The features of one augmentation, of a strength log-uniform in [low, high]."""
        strength = _uniform(samples, math.log(low), math.log(high), generator).exp()
        x = content * _uniform(samples, 0.8, 1.0, generator)
        x = x + _NOISE * strength * torch.randn(samples, FEATURES, generator=generator) * source.noise
        return F.relu(x + 0.6) * (1 - 0.3 * strength)

    features = [torch.stack([seen(0.15, 0.35), seen(0.25, 1.0)], dim=1) for _ in range(views)]
    return features, [view @ source.weight.T + source.bias for view in features], labels


def _spectrum(exponent: float) -> torch.Tensor:
    """A power law over the features, of unit root mean square."""
    law = torch.arange(1, FEATURES + 1).float() ** exponent
    return law / law.pow(2).mean().sqrt()


def _uniform(rows: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return torch.empty(rows, 1).uniform_(low, high, generator=generator)
