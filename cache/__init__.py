"""The store of a teacher's soft labels: codecs, manifest, blocks and planes. Imports numpy, numba, obstore and zarr."""

from importlib import import_module
from typing import TYPE_CHECKING

from cache.errors import UserError

if TYPE_CHECKING:
    from cache import codec
    from cache.store.blocks import Block, Store, open
    from cache.store.making import create, exists, extend
    from cache.store.manifest import Manifest, check, difference
    from cache.store.plane import Plane
    from cache.store.planes import planes

__all__ = [
    "Block",
    "Manifest",
    "Plane",
    "Store",
    "UserError",
    "check",
    "codec",
    "create",
    "difference",
    "exists",
    "extend",
    "open",
    "planes",
]

_MODULES = {
    "cache.store.blocks": ("Block", "Store", "open"),
    "cache.store.making": ("create", "exists", "extend"),
    "cache.store.manifest": ("Manifest", "check", "difference"),
    "cache.store.plane": ("Plane",),
    "cache.store.planes": ("planes",),
}


def __getattr__(name: str):
    # On first use: whoever wants an error's type, as every `--help` does, should not wait for numba and zarr.
    if name == "codec":
        return import_module("cache.codec")
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
