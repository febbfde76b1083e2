"""A teacher in its place: what it says about pairs of views."""

from collections.abc import Iterator
from typing import Any

import torch

from pipeline.data.index import Index
from pipeline.networks import models
from pipeline.system import device as devices
from pipeline.system.device import Normalise
from pipeline.views.batch import Batch
from pipeline.views.policy import Policy


class Teacher:
    """A network on its device, in evaluation mode, with the normalisation of its input."""

    def __init__(self, network: models.Network, policy: Policy, device: torch.device, precision: str):
        """Raises UserError if the network cannot take images of the policy's size."""
        self.name, self.fingerprint = network.name, network.fingerprint
        self.mean, self.std = tuple(network.mean or policy.mean), tuple(network.std or policy.std)
        self.device, self.precision = device, precision
        self.normalise = Normalise(self.mean, self.std, device)
        self.module = devices.place(network.module, device).eval()
        models.probe(network, policy.base.size)

    def on(self, index: Index, policy: Policy) -> dict[str, Any]:
        """What a manifest says of who answers, and about what."""
        described = policy.to_config()
        return {
            "dataset": index.fingerprint,
            "classes": index.classes,
            "teacher": self.name,
            "teacher_weights": self.fingerprint,
            "mean": self.mean,
            "std": self.std,
            "base": described.pop("base"),
            "policy": described,
            "size": policy.base.size,
        }

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> torch.Tensor:
        """Logits of a batch, f32 (B, 2, C) on the teacher's device, original before augmented."""
        with devices.autocast(self.device, self.precision):
            return torch.stack([self.module(self.normalise(images)) for images in batch.images], dim=1).float()

    def answers(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Batches, empty ones left out, with their logits."""
        for batch in batches:
            if len(batch.rows):
                yield batch, self(batch)
