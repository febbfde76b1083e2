"""On which machine and with which versions something was made."""

import contextlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch

from pipeline.system import cores

_PACKAGES = ("torch", "torchvision", "triton", "numpy", "numba", "pillow", "timm", "zarr")
_DALI = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")


def versions() -> dict[str, str]:
    """Of Python and of the installed packages that decide a figure."""
    found = {"python": platform.python_version()}
    for name in (*_PACKAGES, *_DALI):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def processor() -> str:
    """Its model, as the kernel calls it."""
    try:
        model = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        model = None
    return model[1].strip() if model else platform.processor() or platform.machine()


def hardware(device: torch.device) -> str:
    """What the networks run on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def describe() -> dict:
    """JSON-safe; `cores` are those that this process may use, `load` is the load average of the last minute."""
    gpus = [torch.cuda.get_device_name(each) for each in range(torch.cuda.device_count())]
    return {
        "cpu": processor(),
        "cores": cores.share(),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": "\n".join(gpus) or None,
        "kernel": platform.release(),
        "load": os.getloadavg()[0],
        "versions": versions(),
    }
