"""The GPU loader's engine where there is no GPU: over DALI's CPU decoder, with the CPU's pixel kernel."""

import ctypes

import numpy as np
import pytest
import torch

from kernels import jda
from pipeline.views import on_gpu


def pairs(addresses, sizes, program, views, pad: int, size: int, both: bool = True, device="cpu") -> torch.Tensor:
    """In place of `kernels.jda.gpu.pairs.pairs`, which the interpreter would take a second a pair for."""
    out = torch.empty((1 + both, len(addresses), size, size, 3), dtype=torch.uint8)
    for i, (address, (height, width)) in enumerate(zip(addresses.tolist(), sizes.tolist(), strict=True)):
        memory = (ctypes.c_uint8 * (3 * height * width)).from_address(address)
        jda.pair(np.frombuffer(memory, np.uint8).reshape(height, width, 3), program, views[i], pad, out.numpy(), i)
    return out


def on_the_host(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(on_gpu, "here", on_gpu.Host)
    patch.setattr(on_gpu.jda_gpu, "pairs", pairs)
