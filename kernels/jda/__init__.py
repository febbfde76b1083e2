"""The pixel path of a view: a JDA policy, a crop and a flip, with Pillow's bytes (`pairs`; `gpu.pairs` in Triton)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels.jda.mixing import mix
    from kernels.jda.pairs import apply, pair, program_of

__all__ = ["apply", "mix", "pair", "program_of"]


def __getattr__(name: str):
    # On first use: reading a policy (`ops`) should not wait for numba.
    if name in __all__:
        return getattr(import_module("kernels.jda.mixing" if name == "mix" else "kernels.jda.pairs"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
