"""The store of soft labels: a zarr v3 group, cut in blocks of consecutive samples, each written once by one process.

========== ================= ========= ================================================================
array      shape             chunk     content
========== ================= ========= ================================================================
``pairs``  (V, N, row_bytes) one block u8, encoded logits; zero where a sample is quarantined
``weight`` (V, N)            one block f32, w = 1 + cos of the pair's raw logits; NaN: no labels, the teacher skipped it
``digest`` (V, N, 2)         one block u32, CRC-32 of the pixels of both views
``status`` (N,)              all of it u8, 0 good, else quarantined; written with the store
``commit`` (V, blocks)       one entry u64, 2³² + CRC-32 of the block's pairs, weight and digest bytes
========== ================= ========= ================================================================

A block exists once its commit entry does, and that is written last. Each chunk carries a CRC-32C of its own, which
finds a damaged file; the commit finds one that is missing (zarr reads zeros), swapped, or left by another run.
The group's attributes are the manifest.
"""

import contextlib
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import LocalStore

from cache import codec as codecs
from cache.codec import Codec
from cache.errors import UserError
from cache.manifest import Manifest
from cache.plane import Plane

_COMMITTED = 1 << 32
_CRC_BYTES = 4
_RERUN = "run precompute-teacher again, it resumes"


@dataclass(frozen=True, eq=False)
class Store:
    path: Path
    manifest: Manifest
    codec: Codec
    status: np.ndarray
    """u8 (N,): 0 good, else quarantined."""
    _arrays: dict[str, zarr.Array]

    def block_range(self, block: int) -> tuple[int, int]:
        """First row of a block and the row after its last."""
        start = block * self.manifest.block_rows
        return start, min(start + self.manifest.block_rows, self.manifest.samples)

    def missing_blocks(self, view: int | None = None) -> list[tuple[int, int]]:
        """(view, block) of every block without a commit, in order; of one view if given."""
        missing = []
        for v in range(self.manifest.views) if view is None else (view,):
            folder = self._commit(v, 0).parent
            committed = set(os.listdir(folder)) if folder.is_dir() else set()
            missing += [(v, block) for block in range(self.manifest.blocks) if str(block) not in committed]
        return missing

    def write_block(self, view: int, block: int, rows: np.ndarray, weight: np.ndarray, digest: np.ndarray) -> None:
        """Write and commit one block: `rows` u8 (n, row_bytes), `weight` f32 (n,), `digest` u32 (n, 2).

        Killed or failing at any moment it leaves a block without a commit. Raises UserError if the disk is full.
        """
        start, stop = self.block_range(block)
        given = {"pairs": rows, "weight": weight, "digest": digest}
        for name, array in given.items():
            shape, dtype = (stop - start, *self._arrays[name].shape[2:]), self._arrays[name].dtype
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{name}: expected {dtype} {shape}, got {array.dtype} {array.shape}")
        with _writing(self.path):
            self._commit(view, block).unlink(missing_ok=True)
            for name, array in given.items():
                self._arrays[name][view, start:stop] = array
            self._arrays["commit"][view, block] = np.uint64(_commit_of(rows, weight, digest))

    def load_plane(self, view: int) -> Plane:
        """All samples' labels of one view, every block checked against its commit.

        Raises UserError if a block is missing or damaged.
        """
        if missing := self.missing_blocks(view):
            raise UserError(
                f"store {self.path} has missing blocks",
                found=f"{len(missing)} of {self.manifest.blocks} missing for view {view} (first: {missing[0][1]})",
                expected="all committed",
                fix=_RERUN,
            )
        samples = self.manifest.samples
        pairs = np.empty((samples, self.codec.row_bytes), np.uint8)
        weight = np.empty(samples, np.float32)
        digest = np.empty((samples, 2), np.uint32)
        for block in range(self.manifest.blocks):
            rows = slice(*self.block_range(block))
            for name, out in (("pairs", pairs), ("weight", weight), ("digest", digest)):
                out[rows] = self._read(name, view, block, rows)
            commit = self._read("commit", view, block, block)
            if commit != _commit_of(pairs[rows], weight[rows], digest[rows]):
                raise self._damaged("pairs, weight or digest", view, block, "bytes that its commit does not vouch for")
        return Plane(view, pairs, weight, digest, self.status == 0)

    def _read(self, name: str, view: int, block: int, where: slice | int):
        try:
            return self._arrays[name][view, where]
        except OSError as error:
            raise UserError(f"cannot read {name} of store {self.path}", found=error.strerror or error) from error
        except ValueError as error:
            raise self._damaged(name, view, block, error) from error

    def _damaged(self, name: str, view: int, block: int, found: object) -> UserError:
        return UserError(
            f"store {self.path} is damaged: array {name}, view {view}, block {block}",
            found=found,
            fix=f"delete {self._commit(view, block)} and {_RERUN}",
        )

    def _commit(self, view: int, block: int) -> Path:
        return self.path / "commit" / "c" / str(view) / str(block)


def create(path: str | Path, manifest: Manifest, status: np.ndarray) -> Store:
    """Make an empty store; `status` u8 (N,) is 0 for good samples.

    The store appears whole or not at all. Raises UserError if the path exists or cannot be written, or if the
    manifest is out of range.
    """
    path = Path(path)
    if status.shape != (manifest.samples,) or status.dtype != np.uint8:
        raise ValueError(f"expected status u8 ({manifest.samples},), got {status.dtype} {status.shape}")
    attributes = manifest.to_attributes()
    Manifest.from_attributes(attributes)
    if os.path.lexists(path):
        raise UserError(f"{path} exists", fix="choose another --store, or delete it")
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with _writing(path):
            group = zarr.create_group(LocalStore(temporary), zarr_format=3, attributes=attributes)
            arrays = {
                name: group.create_array(
                    name,
                    shape=shape,
                    chunks=chunks,
                    dtype=dtype,
                    fill_value=0,
                    filters=None,
                    serializer=BytesCodec(),
                    compressors=[Crc32cCodec()],
                    config={"write_empty_chunks": True},  # a status without a quarantined sample is a file too
                )
                for name, (shape, chunks, dtype) in _layout(manifest).items()
            }
            arrays["status"][:] = status
            os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open(path)


def open(path: str | Path) -> Store:
    """Open a store to read it or to write its missing blocks. Raises UserError if it is none, damaged or too new."""
    path = Path(path)
    if not os.path.exists(path):
        raise UserError(f"no store at {path}", fix="check --store, or make it with precompute-teacher")
    if not os.path.isfile(path / "zarr.json"):
        raise UserError(f"{path} is not a store", found="no zarr.json", fix="check --store")
    try:
        group = zarr.open_group(LocalStore(path), mode="r+", zarr_format=3, use_consolidated=False)
        attributes = dict(group.attrs)
    except Exception as error:  # zarr's parser raises whatever it trips over
        raise _unreadable(path, "zarr.json", error) from error
    manifest = Manifest.from_attributes(attributes, f"store {path}: manifest")
    arrays = {name: _open_array(path, name, *layout) for name, layout in _layout(manifest).items()}
    return Store(path, manifest, codecs.from_config(manifest.codec), _read_status(path, manifest, arrays), arrays)


def _layout(manifest: Manifest) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], str]]:
    """Shape, chunk and dtype of each array."""
    views, samples, blocks = manifest.views, manifest.samples, manifest.blocks
    rows = min(manifest.block_rows, samples)
    width = codecs.from_config(manifest.codec).row_bytes
    return {
        "pairs": ((views, samples, width), (1, rows, width), "u1"),
        "weight": ((views, samples), (1, rows), "f4"),
        "digest": ((views, samples, 2), (1, rows, 2), "u4"),
        "status": ((samples,), (samples,), "u1"),
        "commit": ((views, blocks), (1, 1), "u8"),
    }


def _open_array(path: Path, name: str, shape, chunks, dtype) -> zarr.Array:
    try:
        array = zarr.open_array(LocalStore(path), path=name, mode="r+", zarr_format=3)
        stages = (*array.filters, array.serializer, *array.compressors)
        found = f"{array.dtype} {array.shape} in chunks {array.chunks}, {[type(stage).__name__ for stage in stages]}"
    except Exception as error:  # zarr's parser raises whatever it trips over
        raise _unreadable(path, f"{name}/zarr.json", error) from error
    expected = f"{np.dtype(dtype)} {shape} in chunks {chunks}, ['BytesCodec', 'Crc32cCodec']"
    if found != expected:
        raise UserError(f"store {path} is damaged: array {name}", found=found, expected=expected, fix=_remake(path))
    return array


def _read_status(path: Path, manifest: Manifest, arrays: dict[str, zarr.Array]) -> np.ndarray:
    file = path / "status" / "c" / "0"
    try:
        # zarr would read a missing chunk as zeros, which says that every sample is good.
        if (size := os.path.getsize(file)) != manifest.samples + _CRC_BYTES:
            raise ValueError(f"{size} bytes in {file}")
        return np.asarray(arrays["status"][:])
    except (OSError, ValueError) as error:
        raise UserError(f"store {path} is damaged: array status", found=error, fix=_remake(path)) from error


def _unreadable(path: Path, file: str, error: Exception) -> UserError:
    found = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return UserError(f"store {path} is damaged: cannot read {file}", found=found, fix=_remake(path))


def _remake(path: Path) -> str:
    return f"restore it from a copy, or delete {path} and run precompute-teacher again"


def _commit_of(pairs: np.ndarray, weight: np.ndarray, digest: np.ndarray) -> int:
    crc = 0
    for array, dtype in ((pairs, "u1"), (weight, "<f4"), (digest, "<u4")):
        crc = zlib.crc32(np.ascontiguousarray(array, dtype).data, crc)
    return _COMMITTED | crc


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write store {path}",
            found=error.strerror or error,
            fix=f"free space or mend the path, then {_RERUN}",
        ) from error
