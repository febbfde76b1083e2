"""A network in its place: on a device, with the normalisation of its input and the arithmetic it computes in."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pipeline.networks import weights
from pipeline.networks.features import Learner
from pipeline.networks.models import Network, probe
from pipeline.system import device as devices
from pipeline.views.policy import Policy

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Normalise(nn.Module):
    """u8 (B, S, S, 3) -> f32 (B, 3, S, S) on the device, channels last in memory: (x / 255 − mean) / std."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device):
        super().__init__()
        self.scale = 1 / (255 * torch.tensor(std, device=device))
        self.shift = torch.tensor(mean, device=device) / torch.tensor(std, device=device)

    def forward(self, images: Tensor) -> Tensor:
        return (devices.put(images, self.scale.device) * self.scale - self.shift).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Placed:
    """What answers: `dataclasses.replace` puts a wrapped or an averaged module in the same place."""

    network: Network
    module: nn.Module
    """Of `network`, or around it."""
    normalise: Normalise
    mean: tuple[float, ...]
    """The network's own, else the policy's, and so is `std`."""
    std: tuple[float, ...]
    device: torch.device
    precision: str
    """fp32, bf16 or fp16."""
    size: int | None = None
    """Side in pixels that normalised images are resized to, bilinear and antialiased; None: they stay as they are."""

    def __call__(self, images: Tensor) -> Any:
        """u8 (B, S, S, 3) on any device -> logits (B, C) on this one, in the precision's type; what a module of
        `networks.features` answers instead, if it is one."""
        with torch.autocast(self.device.type, dtype=_DTYPES.get(self.precision), enabled=self.precision in _DTYPES):
            seen = self.normalise(images)
            if self.size not in (None, seen.shape[-1]):
                seen = interpolate(seen, (self.size, self.size), mode="bilinear", antialias=True)
            return self.module(seen)

    def save(self, path: Path) -> None:
        """Write the module's weights with what they need to be used rightly: classes, mean and std."""
        about = {"mean": json.dumps(self.mean), "std": json.dumps(self.std)}
        if self.network.class_list:
            about["classes"] = json.dumps(self.network.class_list.to_json())
        weights.save(self.module.exported if isinstance(self.module, Learner) else self.module, path, about)


def placed(
    network: Network, device: torch.device, precision: str, policy: Policy, size: int | None = None, option: str = ""
) -> Placed:
    """The network on the device, ready for the policy's images; its mode is the caller's business.

    Channels last, as images arrive that way and convolutions are faster. Raises UserError if the network does not take
    images of `size`, which is the policy's unless given; `option` is the command's that gives it.
    """
    module = network.module.to(device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    probe(network, size or policy.base.size, option)
    mean, std = tuple(network.mean or policy.mean), tuple(network.std or policy.std)
    return Placed(network, module, Normalise(mean, std, device), mean, std, device, precision, size)
