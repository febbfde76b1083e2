"""A teacher in its place: what it says about pairs of views."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from pipeline.data.index import Index
from pipeline.networks.models import Network
from pipeline.networks.placed import placed
from pipeline.views.batch import Batch
from pipeline.views.policy import Policy


class Teacher:
    """A network in its place, in evaluation mode."""

    def __init__(
        self,
        network: Network,
        policy: Policy,
        device: torch.device,
        precision: str,
        compile: bool = False,
        size: int | None = None,
    ) -> None:
        """`compile` hands the network to torch.compile. It sees each view resized to `size` pixels, if that is given.

        Raises UserError if the network cannot take images of that size, or else of the policy's.
        """
        self.name, self.fingerprint = network.name, network.fingerprint
        self.device, self.precision = device, precision
        self.size = None if size == policy.base.size else size
        self._answer = placed(network, device, precision, policy, size, "--teacher-size")
        self._answer.module.eval()
        if compile:
            self._answer = dataclasses.replace(self._answer, module=torch.compile(self._answer.module))
        self.mean, self.std = self._answer.mean, self._answer.std

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
            "teacher_size": self.size,
        }

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> torch.Tensor:
        """Logits of a batch, f32 (B, 2, C) on the teacher's device, original before augmented."""
        return torch.stack([self._answer(images) for images in batch.images], dim=1).float()

    def answers(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Batches, empty ones left out, with their logits."""
        for batch in batches:
            if len(batch.rows):
                yield batch, self(batch)
