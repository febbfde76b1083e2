"""Compute kernels: the distillation loss (`ccd_loss`, `ccd_loss_encoded`) and the pixel path of a view (`jda`)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels import jda
    from kernels.loss.ccd import ccd_loss, ccd_loss_encoded

__all__ = ["ccd_loss", "ccd_loss_encoded", "jda"]


def __getattr__(name: str):
    # On first use: a process that only decodes images should not wait for torch and Triton, nor the loss for numba.
    if name in ("ccd_loss", "ccd_loss_encoded"):
        return getattr(import_module("kernels.loss.ccd"), name)
    if name == "jda":
        return import_module("kernels.jda")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
