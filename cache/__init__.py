"""The store of a teacher's soft labels: codecs, manifest, blocks and planes. Imports numpy and zarr only."""

from cache.errors import UserError
from cache.manifest import Manifest, check
from cache.plane import Plane, planes
from cache.store import Store, create, open

__all__ = ["Manifest", "Plane", "Store", "UserError", "check", "create", "open", "planes"]
