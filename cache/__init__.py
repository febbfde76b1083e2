"""The store of a teacher's soft labels: codecs, manifest, blocks and planes. Imports numpy, numba, obstore and zarr."""

from importlib import import_module
from typing import TYPE_CHECKING

from cache.errors import UserError

if TYPE_CHECKING:
    from cache import codec
    from cache.store.beside import BESIDE_BYTES, pair_digest
    from cache.store.blocks import Block, Store
    from cache.store.making import create, exists, extend
    from cache.store.manifest import Manifest, check, difference
    from cache.store.moving import copy, prune
    from cache.store.opening import open
    from cache.store.plane import Plane
    from cache.store.planes import planes
    from cache.store.shared import Share

__all__ = [
    "BESIDE_BYTES",
    "Block",
    "Manifest",
    "Plane",
    "Share",
    "Store",
    "UserError",
    "check",
    "codec",
    "copy",
    "create",
    "difference",
    "exists",
    "extend",
    "open",
    "pair_digest",
    "planes",
    "prune",
]

_MODULES = {
    "cache.store.beside": ("BESIDE_BYTES", "pair_digest"),
    "cache.store.blocks": ("Block", "Store"),
    "cache.store.making": ("create", "exists", "extend"),
    "cache.store.manifest": ("Manifest", "check", "difference"),
    "cache.store.moving": ("copy", "prune"),
    "cache.store.opening": ("open",),
    "cache.store.plane": ("Plane",),
    "cache.store.planes": ("planes",),
    "cache.store.shared": ("Share",),
}


def __getattr__(name: str):
    # On first use: whoever wants an error's type, as every `--help` does, should not wait for numba and zarr.
    if name == "codec":
        return import_module("cache.codec")
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
