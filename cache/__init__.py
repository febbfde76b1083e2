"""The store of a teacher's soft labels: codecs, manifest, blocks and planes. Imports numpy, obstore and zarr."""

from cache.errors import UserError
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
    "create",
    "difference",
    "exists",
    "extend",
    "open",
    "planes",
]
