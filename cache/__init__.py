"""The store of a teacher's soft labels: codecs, manifest, blocks and planes. Imports numpy, obstore and zarr."""

from cache.errors import UserError
from cache.making import create, exists, extend
from cache.manifest import Manifest, check, difference
from cache.plane import Plane, planes
from cache.store import Block, Store, open

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
