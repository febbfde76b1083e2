"""Networks and teacher passes."""

from pathlib import Path

import torch

from pipeline.config import PrecomputeTeacher
from pipeline.data.index import Index
from pipeline.demo import POLICY
from pipeline.labels import precompute
from pipeline.networks import models
from pipeline.views import drawing
from pipeline.views import policy as policies
from pipeline.views.loader import Loader


def network(data: Path, factor: float = 1.0) -> torch.nn.Module:
    """Random weights, but logits as varied as a trained teacher's: a code of few nats must have something to keep."""
    module = models.create("cifar/resnet8", 10, seed=3).module.eval()
    index, policy = Index.open(data), policies.load(POLICY)
    request = index.good, drawing.of(index.records[index.good], 0, 0, policy)
    (batch,) = Loader(index, policy, threads=1).batches([request])
    with torch.no_grad():
        *_, weight, bias = module.parameters()
        said = module(batch.augmented.permute(0, 3, 1, 2) / 127.5 - 1)
        gain = 5 * factor / said.std(dim=0)
        weight.mul_(gain[:, None])
        bias.copy_((bias - said.mean(dim=0)) * gain)
    return module


def teacher_pass(data: Path, teacher: str, store: Path, **options) -> Path:
    fixed = dict(policy=POLICY, block_rows=64, device="cpu", seed=5)
    precompute.run(PrecomputeTeacher(**fixed, **{"views": 2, **options}, data=data, teacher=teacher, store=str(store)))
    return store


def ten_pixels(images: torch.Tensor) -> torch.Tensor:
    """A teacher that is a function."""
    return images.flatten(1)[:, :10]
