"""A teacher in its place: what it says about pairs of views."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from pipeline.data.index import Index
from pipeline.networks.features import Head, head, tapped
from pipeline.networks.models import Network
from pipeline.networks.placed import placed
from pipeline.views.batch import Batch
from pipeline.views.policy import Policy

_AT_ONCE = 32 * 224**2
"""Pixels of images that a CPU's teacher looks at together: activations of more go back to the kernel, page by page, and
come again for the next."""


class Said(NamedTuple):
    """What a teacher answers to B pairs of views."""

    logits: torch.Tensor
    """f32 (B, 2, C), see `cache.codec.base` for the order."""
    coded: torch.Tensor
    """What a store's code is given: the logits, or features f32 (B, 2, F)."""


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
        features: bool = False,
    ) -> None:
        """`compile` hands the network to torch.compile. It sees each view resized to `size` pixels, if that is given.
        With `features` it tells these as well.

        Raises UserError if the network cannot take images of that size, or else of the policy's, or has no `features`.
        """
        self.name, self.fingerprint = network.name, network.fingerprint
        self.device, self.precision = device, precision
        self.size = None if size == policy.base.size else size
        self._answer = placed(network, device, precision, policy, size, "--teacher-size")
        self._answer.module.eval()
        self.head: Head | None = None
        if features:
            made = tapped(network.module, size or policy.base.size, f"--teacher {network.name}")
            self._answer, self.head = dataclasses.replace(self._answer, module=made.eval()), head(made)
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
    def said(self, batch: Batch) -> Said:
        """The answers to a batch, original before augmented, on the teacher's device."""
        views = zip(*(self._look(images) for images in batch.images), strict=True)
        found = [torch.stack(pair, dim=1).float() for pair in views]
        return Said(found[0], found[-1])

    def _look(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits of images, with their features if the teacher tells these."""
        few = len(images)
        if self.device.type == "cpu":
            few = _AT_ONCE // (self.size or images.shape[1]) ** 2
        said = [self._answer(part) for part in images.split(max(few, 1))]
        whole = [said] if self.head is None else zip(*said, strict=True)
        return tuple(parts[0] if len(parts) == 1 else torch.cat(parts) for parts in whole)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Logits of a batch, f32 (B, 2, C) on the teacher's device, original before augmented."""
        return self.said(batch).logits

    def of_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits f32 (M, C) of images (M, S, S, 3), floating ones in [0, 255] too: differentiable in these."""
        return self._answer(pixels).float()

    def answers(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Said]]:
        """Batches, empty ones left out, with the answers."""
        for batch in batches:
            if len(batch.rows):
                yield batch, self.said(batch)
