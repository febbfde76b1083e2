"""The machine a run finds itself on."""

import numpy as np
import torch

from cache import UserError
from pipeline.config import Machine
from pipeline.system import cores, ranks


def pick(machine: Machine) -> torch.device:
    """The device asked for; `auto` takes a GPU if there is one, each process of a torchrun job its own.

    PyTorch's threads on the CPU are kept to the container's quota, which PyTorch does not look at.
    """
    if cores.quota() < torch.get_num_threads():
        torch.set_num_threads(cores.share())
    available = torch.cuda.is_available()
    if machine.device == "cuda" and not available:
        raise UserError("no CUDA device", found="none", expected="--device cuda has one", fix="use --device cpu")
    if not available or machine.device == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", ranks.local_rank() % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def put(values: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """`values` of the host on the device, for whatever its current stream does next.

    On a GPU by way of page-locked memory: from any other the copy would wait for all that the stream was given before,
    a step's whole forward pass, and the host with it.
    """
    values = torch.as_tensor(values)
    if device.type == "cuda" and not values.is_cuda:
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def decoder(choice: str, device: torch.device) -> str:
    """Which of `pipeline.data.probes`'s decoders: `choice`, or for "auto" that of the device."""
    if choice == "auto":
        if device.type == "cpu":
            return "cpu"
        return "gpu-hw" if has_jpeg_engine(torch.cuda.get_device_capability(device)) else "gpu"
    if choice != "cpu" and device.type == "cpu":
        raise UserError("no GPU to decode on", found=f"--decoder {choice}", fix="use --decoder cpu")
    return choice


def has_jpeg_engine(capability: tuple[int, int]) -> bool:
    """Whether GPUs of this compute capability decode JPEG in hardware: A100 and A30, Hopper, Blackwell (B200, B300).

    Elsewhere "gpu-hw" decodes as "gpu" does, under another name.
    """
    return capability == (8, 0) or capability[0] in (9, 10)


def threads(machine: Machine) -> int:
    """Worker threads: as asked, or one per core that this process may use, shared with the ranks beside it."""
    return machine.threads or cores.share()


def arithmetic(precision: str, device: torch.device) -> str:
    """The precision meant by `auto`: bf16 on a GPU that has it, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
