"""Copying a store, block by block and checked, and taking views off it."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path

from cache.errors import UserError
from cache.store import layout
from cache.store.blocks import ROOT, Progress, Store
from cache.store.making import exists
from cache.store.objects import connect, each, place_of
from cache.store.opening import open


def copy(store: Store, to: str | Path, progress: Progress | None = None) -> Store:
    """Copy a store to a path or URL, object by object, each block checked against its commit before it is copied.

    What is missing here is missing there. A copy that was killed is a store with missing blocks: copying again adds
    what it lacks. Raises UserError for a damaged block, or anything else at the place than (a part of) this store.
    """
    place = place_of(to)
    if str(place) == str(store.path):
        raise UserError("a store cannot be copied onto itself", found=place, fix="choose another place")
    target = connect(place, make=True)
    begun = target.has(ROOT)
    if not begun and exists(place):
        raise UserError(f"{place} exists", found="something else than a store", fix="choose another place")
    for key in _beginnings(store):
        data = store.raw(key)
        if not target.create(key, data) and not target.holds(key, data):
            raise UserError(f"{place} exists", found=f"a store with another {key}", fix="choose another place")
    missing = set(store.missing_blocks())
    blocks = product(range(store.manifest.views), range(store.manifest.blocks))
    there = [block for block in blocks if block not in missing]
    have = set(open(place).missing_blocks())

    def carry(block: tuple[int, int]) -> None:
        commit = store.raw(store.key("commit", *block))
        if block not in have and target.holds(store.key("commit", *block), commit):
            return
        store.read_block(*block)
        target.delete_others(store.key("commit", *block), commit)
        for name in store.block_arrays:
            key = store.key(name, *block)
            target.put(key, store.raw(key))
        target.put(store.key("commit", *block), commit)

    with closing(each(carry, there, store.workers)) as done:
        for count, _ in enumerate(done, 1):
            if progress:
                progress(count, len(there))
    return open(place)


def prune(store: Store, views: int) -> Store:
    """Keep the first `views` views of a store, and free the space of the others.

    Views keep their numbers, with which everything about them is made. Killed at any moment it leaves a store of as
    many views as before or of `views`, and perhaps objects that nobody reads, which pruning again removes. Not for use
    while another process reads or writes the store. Raises UserError for more views than there are.
    """
    if not 1 <= views <= store.manifest.views:
        expected = f"1 to {store.manifest.views}"
        raise UserError("a store is pruned to some of its views", found=views, expected=expected, fix="check --views")
    manifest, files = replace(store.manifest, views=views), store.files
    files.put(ROOT, layout.group_json(manifest.to_attributes()))
    for name, array in layout.arrays(manifest, store.codec).items():
        files.put(f"{name}/{ROOT}", layout.to_json(layout.array_json(array)))
    for name in ("commit", *layout.BLOCK):  # a block without a commit is none
        for key in files.sizes(f"{name}/c"):
            if int(key.split("/")[2]) >= views:
                files.delete(key)
    return open(store.path)


def _beginnings(store: Store) -> Iterator[str]:
    """All that a store without blocks has, its manifest last."""
    of_blocks = tuple(f"{name}/c/" for name in (*layout.BLOCK, "commit"))
    keys = (key for key in store.files.sizes("") if not key.startswith(of_blocks) and "#" not in key)
    yield from sorted(keys, key=lambda key: (key == ROOT, key))
