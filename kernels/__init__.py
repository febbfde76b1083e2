"""Compute kernels: distillation losses (`ccd_loss` of logits or `EncodedPairs`, `kd_loss`), views' pixels (`jda`)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels import jda
    from kernels.loss.ccd import ccd_loss
    from kernels.loss.decode import EncodedPairs
    from kernels.loss.kd import kd_loss
    from kernels.reference import Mixed

__all__ = ["EncodedPairs", "Mixed", "ccd_loss", "jda", "kd_loss"]


def __getattr__(name: str):
    # On first use: a process that only decodes images should not wait for torch and Triton, nor the loss for numba.
    if name == "ccd_loss":
        return import_module("kernels.loss.ccd").ccd_loss
    if name == "kd_loss":
        return import_module("kernels.loss.kd").kd_loss
    if name == "EncodedPairs":
        return import_module("kernels.loss.decode").EncodedPairs
    if name == "Mixed":
        return import_module("kernels.reference").Mixed
    if name == "jda":
        return import_module("kernels.jda")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
