"""On which machine and with which versions something was made."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch

from pipeline.system import cores

_PACKAGES = re.compile(r"torch|torchvision|nvidia-dali-cuda\d+|numpy|numba|pillow|timm|triton|zarr")


def versions() -> dict[str, str]:
    """Of Python and of the installed packages that decide a figure."""
    installed = {package.metadata["Name"].lower(): package.version for package in importlib.metadata.distributions()}
    return {"python": platform.python_version()} | {
        name: version for name, version in sorted(installed.items()) if _PACKAGES.fullmatch(name)
    }


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
