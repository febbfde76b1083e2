"""The machine a run finds itself on, and pixels on their way into a network."""

import os

import torch

from cache import UserError
from pipeline.config import Machine
from pipeline.system import ranks


def pick(machine: Machine) -> torch.device:
    """The device asked for; `auto` takes a GPU if there is one, each process of a torchrun job its own."""
    available = torch.cuda.is_available()
    if machine.device == "cuda" and not available:
        raise UserError("no CUDA device", found="none", expected="--device cuda has one", fix="use --device cpu")
    if not available or machine.device == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", ranks.local_rank() % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def decoder(choice: str, device: torch.device) -> str:
    """Which of `pipeline.data.decode`'s decoders: `choice`, or for "auto" that of the device."""
    if choice == "auto":
        return "cpu" if device.type == "cpu" else "gpu"
    if choice != "cpu" and device.type == "cpu":
        raise UserError("no GPU to decode on", found=f"--decoder {choice}", fix="use --decoder cpu")
    return choice


def threads(machine: Machine) -> int:
    """Worker threads: as asked, or one per core that this process may use, shared with the ranks beside it."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return machine.threads or max(len(os.sched_getaffinity(0)) // ranks, 1)


def place(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The module on the device, channels last: images arrive that way, and convolutions are faster."""
    return module.to(device).to(memory_format=torch.channels_last)


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def arithmetic(precision: str, device: torch.device) -> str:
    """The precision meant by `auto`: bf16 on a GPU that has it, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, dtype=_DTYPES.get(precision), enabled=precision in _DTYPES)


class Normalise(torch.nn.Module):
    """u8 (B, S, S, 3) -> f32 (B, 3, S, S) on the device, channels last in memory: (x / 255 − mean) / std."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device):
        super().__init__()
        self.scale = 1 / (255 * torch.tensor(std, device=device))
        self.shift = torch.tensor(mean, device=device) / torch.tensor(std, device=device)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images.to(self.scale.device, non_blocking=True) * self.scale - self.shift).permute(0, 3, 1, 2)
