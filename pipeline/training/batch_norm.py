"""Batch statistics over all processes, so that a run's result does not depend on how many there are."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class SyncedBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose batch is that of all processes, where PyTorch's own `SyncBatchNorm` is for GPUs only."""

    def forward(self, input: Tensor) -> Tensor:
        """f32 (B, C, H, W); B may be 0 here, not everywhere."""
        if not self.training:
            return super().forward(input)
        # Two sums, each over all processes: mean first, as E[x²] − E[x]² cancels.
        count = torch.tensor([input.numel() / input.shape[1]], dtype=torch.float64)
        dist.all_reduce(count)
        size = count.item()
        mean = all_reduce(input.double().sum((0, 2, 3))) / size
        centred = input.double() - mean[:, None, None]
        variance = all_reduce(centred.square().sum((0, 2, 3))) / size
        with torch.no_grad():
            self.num_batches_tracked.add_(1)  # pyright: ignore
            share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)  # pyright: ignore
            self.running_mean.lerp_(mean.float(), share)  # pyright: ignore
            self.running_var.lerp_((variance * size / (size - 1)).float(), share)  # pyright: ignore
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)


def synchronise(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with batch statistics over all processes; parameters and their names stay.

    On CPUs plain `BatchNorm2d` only: other kinds keep the statistics of their own process there.
    """
    if device.type == "cuda":
        from timm.layers.norm_act import convert_sync_batchnorm  # a second, and torchvision with it

        return convert_sync_batchnorm(module)
    for part in module.modules():
        if type(part) is nn.BatchNorm2d:
            part.__class__ = SyncedBatchNorm
    return module
