"""The store of soft labels: a zarr v3 group, cut in blocks of consecutive samples, each written once by one process.

============ ================= ========= =======================================================
array        shape             chunk     content
============ ================= ========= =======================================================
``pairs``    (V, N, row_bytes) one block u8, encoded logits; zero where a sample is quarantined
``weight``   (V, N)            one block f32, w = 1 + cos of the pair's raw logits, in steps of
                                         2⁻²⁰; NaN: the teacher skipped the sample, no labels
``digest``   (V, N)            one block u32, CRC-32 of the CRC-32s of both views' pixels
``status``   (N,)              16 blocks u8, 0 good, else quarantined; written with the store
``key_hash`` (N,)              16 blocks u64, hash of each sample's key; written with the store
``fidelity`` (V, blocks, 2)    one entry f32, what the codec was seen to lose, see `Block`
``energy``   (V, N, 2)         one block f32, −logsumexp of each view's raw logits, in steps of
                                         2⁻⁸; only in stores that were made with it
``commit``   (V, blocks)       one entry u64, 2³² + CRC-32C of a block, see `Store._commit_of`
``codec/…``  the code's own    ≤ 64 MB   its fitted arrays
============ ================= ========= =======================================================

A block exists once its commit entry does, and that is written last. Each chunk carries a CRC-32C of its own, which
finds a damaged file; the commit finds one that is missing (zarr reads zeros), swapped, or of another block, store or
run. The group's attributes are the manifest; the store exists once they do. Chunks are read and written here, past
zarr, which would read at a third of a disk's rate; any zarr reader can read them, with `cache.store.zarr_codecs` also
``pairs`` of a codec that packs. A store of format 2 has w in full, a digest per view, and its code's arrays in the
manifest; it is read and grown as it is.
"""

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np

from cache import philox
from cache.codec import Codec
from cache.errors import UserError
from cache.store import beside, layout
from cache.store.manifest import Manifest
from cache.store.objects import Damaged, Files, each, framed
from cache.store.plane import Plane

_COMMITTED = 1 << 32
ROOT = "zarr.json"
_MAX_OBJECT_BYTES = 1 << 33  # twice a chunk
_ATTEMPTS = 10
_RERUN = "run precompute-teacher again, it resumes"
GROWING = ("dataset", "samples", "views", "block_rows")
"""The fields of a manifest's identity that say how much is stored, not what."""

Progress = Callable[[int, int], None]
"""Called with the number of blocks done and of all."""


class Block(NamedTuple):
    codes: np.ndarray
    """u8 (n, row_bytes)."""
    weight: np.ndarray
    """f32 (n,)."""
    digest: np.ndarray
    """u32 (n,), of pairs."""
    fidelity: np.ndarray
    """f32 (2,): mean KL of decoded labels in nats, and their slope, as measured by the writer; NaN: not."""
    energy: np.ndarray
    """f32 (n, 2); (n, 0) in a store without."""


@dataclass(frozen=True, eq=False)
class Store:
    path: Path | str
    """Folder or URL."""
    manifest: Manifest
    codec: Codec
    status: np.ndarray
    """u8 (N,): 0 good, else quarantined."""
    key_hash: np.ndarray
    """u64 (N,): what the dither keys, and the data set's views, are functions of."""
    files: Files
    _arrays: dict[str, layout.Array]
    origin: int
    """CRC-32C of what made the labels: a block of another teacher, policy or codec is no block of this store."""

    def block_range(self, block: int) -> tuple[int, int]:
        """First row of a block and the row after its last."""
        start = block * self.manifest.block_rows
        return start, min(start + self.manifest.block_rows, self.manifest.samples)

    def dither_keys(self, view: int, rows: np.ndarray | slice) -> np.ndarray:
        """Dither keys u64 (B,) of index rows, for the codec."""
        return philox.dither_keys(self.manifest.seed, self.key_hash[rows], view)

    def missing_blocks(self, view: int | None = None) -> list[tuple[int, int]]:
        """(view, block) of every block without a commit, in order; of one view if given."""
        views = range(self.manifest.views) if view is None else (view,)
        committed = set(self.files.sizes("commit/c" if view is None else f"commit/c/{view}"))
        blocks = range(self.manifest.blocks)
        return [(v, block) for v in views for block in blocks if self.key("commit", v, block) not in committed]

    def write_block(
        self,
        view: int,
        block: int,
        codes: np.ndarray,
        weight: np.ndarray,
        digest: np.ndarray,
        fidelity: tuple[float, float] = (math.nan, math.nan),
        energy: np.ndarray | None = None,
    ) -> None:
        """Write and commit one block: `codes` u8 (n, row_bytes), `weight` f32 (n,), `digest` u32 (n, 2), and where the
        store keeps it `energy` f32 (n, 2).

        `weight` is rounded to steps of 2⁻²⁰, `energy` of 2⁻⁸. `digest` is the CRC-32 of each view's pixels, or, (n,),
        what `read_block` gave. `fidelity` is kept for information, see `Block`. Killed or failing at any moment it
        leaves a block without a commit; or with it, if these very labels were committed before. Of jobs that write
        the same block at once, to different labels even, one has written it in the end. Raises UserError if it cannot
        be written.
        """
        start, stop = self.block_range(block)
        energy = np.empty((stop - start, 0), np.float32) if energy is None else energy
        given = Block(codes, weight, digest, np.array(fidelity, np.float32), energy)
        like = self._stored(stop - start)
        if self.manifest.format > 2 and digest.dtype == np.uint32 and digest.shape == (stop - start, 2):
            given = given._replace(digest=beside.pair_digest(digest))
        for name, array, wanted in zip(layout.BLOCK, given, like, strict=True):
            if array.shape != wanted.shape or array.dtype != wanted.dtype:
                raise ValueError(f"{name}: expected {wanted.dtype} {wanted.shape}, got {array.dtype} {array.shape}")
        given = given._replace(codes=np.ascontiguousarray(codes))
        if self.manifest.format > 2:
            given = given._replace(weight=beside.rounded(weight, beside.WEIGHT_STEP))
            given = given._replace(energy=beside.rounded(energy, beside.ENERGY_STEP))
        objects = [
            (self.key(name, view, block), framed(self._chunk(name, view, block, values)))
            for name, values in zip(self.block_arrays, given, strict=False)
        ]
        commit = self._commit_of(_crc(given.codes), view, block, given).to_bytes(8, "little")
        objects.append((self.key("commit", view, block), framed(commit)))
        self.files.delete_others(*objects[-1])  # which must not vouch for half of these labels
        for _ in range(_ATTEMPTS):
            for key, data in objects:
                self.files.put(key, data)
            # GPUs differ in a logit's last bits, so another job may have put other labels between these. Who commits
            # last finds all that the others put, and puts its own once more.
            *ours, last = (self.files.holds(key, data) for key, data in objects)
            if all(ours) or not last:
                return
        raise UserError(
            f"cannot write store {self.path}",
            found=f"other bytes than were written to view {view}, block {block}, {_ATTEMPTS} times",
            fix=f"check the disk, let one job at a time write the store, then {_RERUN}",
        )

    def read_block(self, view: int, block: int) -> Block:
        """One block, checked against its commit. Raises UserError if it is missing or damaged."""
        start, stop = self.block_range(block)
        out = self._empty(stop - start)
        if not self.files.has(self.key("commit", view, block)):
            raise self._missing(view, [(view, block)])
        self._read_into(view, block, out)
        return out

    def load_plane(
        self, view: int, out: np.ndarray | None = None, progress: Progress | None = None, workers: int | None = None
    ) -> Plane:
        """All samples' labels of one view, every block checked against its commit.

        `out` u8 (N, row_bytes), if given, takes the codes, and holds anything after an error. `workers` threads unpack,
        by default those of the store. Raises UserError if a block is missing or damaged, or for want of memory.
        """
        samples, width, blocks = self.manifest.samples, self.codec.row_bytes, self.manifest.blocks
        if out is not None and (out.shape != (samples, width) or out.dtype != np.uint8 or not out.flags.c_contiguous):
            raise ValueError(f"expected out u8 ({samples}, {width}), contiguous, got {out.dtype} {out.shape}")
        self.require(view)
        try:
            plane = self._empty(samples, out)
        except MemoryError:
            found = f"{samples * width:,} bytes wanted"
            raise UserError(f"no memory for a plane of store {self.path}", found=found, fix="map planes") from None

        with closing(each(lambda block: self.fill(view, block, plane), range(blocks), workers or self.workers)) as done:
            for count, _ in enumerate(done, 1):
                if progress:
                    progress(count, blocks)
        return self.as_plane(view, plane)

    def as_plane(self, view: int, filled: Block) -> Plane:
        """A view's arrays of all samples."""
        energy = filled.energy if self.energies else None
        return Plane(view, filled.codes, filled.weight, filled.digest, self.status == 0, energy)

    @property
    def energies(self) -> int:
        """Of a pair, that are kept: 2 or 0."""
        return 2 if self.manifest.energy else 0

    @property
    def block_arrays(self) -> tuple[str, ...]:
        """The arrays that make a block, in the order of `Block`."""
        return tuple(name for name in layout.BLOCK if name in self._arrays)

    @property
    def workers(self) -> int:
        """Threads worth having."""
        return self.files.workers

    def require(self, view: int) -> None:
        """Raise UserError unless all blocks of a view are committed."""
        if missing := self.missing_blocks(view):
            raise self._missing(view, missing)

    def fill(self, view: int, block: int, plane: Block) -> None:
        """Fill a block's part of a view's arrays, all but fidelity, checked. Raises UserError as `read_block` does."""
        rows = slice(*self.block_range(block))
        fidelity = np.empty(2, np.float32)
        part = Block(plane.codes[rows], plane.weight[rows], plane.digest[rows], fidelity, plane.energy[rows])
        self._read_into(view, block, part)

    def label_bytes(self) -> int:
        """What the codes of all blocks take on disk."""
        return sum(self.files.sizes("pairs/c").values())

    def sizes(self) -> dict[str, int]:
        """Bytes on disk by array, the code's own together as `codec`, with metadata; `zarr.json` is the manifest."""
        found = dict.fromkeys((*self._arrays, "codec", ROOT), 0)
        for key, size in self.files.sizes("").items():
            name = key.partition("/")[0]
            found[name] = found.get(name, 0) + size
        return found

    def raw(self, key: str) -> bytes:
        """An object as it is."""
        try:
            return self.files.get(key, 0, _MAX_OBJECT_BYTES).tobytes()
        except Damaged as error:
            raise unreadable(self.path, key, error) from error

    def key(self, name: str, view: int, block: int) -> str:
        """The key of a block's chunk of an array."""
        return layout.key(name, self._arrays[name], view, block)

    def _empty(self, count: int, codes: np.ndarray | None = None) -> Block:
        codes = np.empty((count, self.codec.row_bytes), np.uint8) if codes is None else codes
        energy = np.empty((count, self.energies), np.float32)
        return Block(codes, np.empty(count, np.float32), np.empty(count, np.uint32), np.empty(2, np.float32), energy)

    def _stored(self, count: int, like: Block | None = None) -> Block:
        """A block's arrays as the store has them; those of `like` where they are the same."""
        block = like or self._empty(count)
        return block._replace(digest=np.empty((count, 2), np.uint32)) if self.manifest.format == 2 else block

    def _read_into(self, view: int, block: int, out: Block) -> None:
        """Fill the arrays of `out`, and check them against the commit."""
        stored = self._stored(len(out.weight), out)
        if self.codec.packed:
            crc = self._unpack(view, block, out.codes)
        else:
            crc = self._read_chunk("pairs", view, block, out.codes)
        for name, array in zip(self.block_arrays[1:], stored[1:], strict=False):
            self._read_chunk(name, view, block, array)
        commit = np.empty(1, np.uint64)
        self._read_chunk("commit", view, block, commit)
        if commit[0] != self._commit_of(crc, view, block, stored):
            names = f"{', '.join(self.block_arrays)}, or the samples' status or key_hash"
            raise self._damaged(names, view, block, "what its commit does not vouch for")
        if stored is not out:
            out.digest[:] = beside.pair_digest(stored.digest)

    def _read_chunk(self, name: str, view: int, block: int, out: np.ndarray) -> int:
        """Fill `out` with the beginning of a chunk, all but padding; returns the CRC-32C of that, of a plain chunk."""
        array, key, to = self._arrays[name], self.key(name, view, block), out.reshape(-1).view(np.uint8)
        try:
            if array.coded != "blosc":
                return self.files.read_chunk(key, array.chunk_bytes, to)
            data, _ = self.files.get_chunk(key, 0, beside.most(array.chunk_bytes))
        except Damaged as error:
            raise self._damaged(name, view, block, error) from error
        try:
            to[:] = beside.unsqueezed(data, array.chunk_bytes)[: len(to)]
        except ValueError as error:
            raise self._damaged(name, view, block, error) from error
        return 0

    def _unpack(self, view: int, block: int, out: np.ndarray) -> int:
        """Fill `out` u8 (n, row_bytes) with a block's packed codes; returns their CRC-32C."""
        rows = slice(*self.block_range(block))
        try:
            data, _ = self.files.get_chunk(self.key("pairs", view, block), 0, self._most_packed(len(out)))
        except Damaged as error:
            raise self._damaged("pairs", view, block, error) from error
        try:
            out[:] = self.codec.unpack(data.tobytes(), self.dither_keys(view, rows))
        except ValueError as error:
            raise self._damaged("pairs", view, block, error) from error
        return _crc(out)

    def _chunk(self, name: str, view: int, block: int, values: np.ndarray) -> bytes:
        """The bytes of a chunk that begins with `values`, without its CRC-32C."""
        if name == "pairs" and self.codec.packed:
            data = self.codec.pack(values, self.dither_keys(view, slice(*self.block_range(block))))
            assert len(data) <= self._most_packed(len(values)), "a codec that inflates"
            return data
        data = padded(values, self._arrays[name])
        return beside.squeezed(data) if self._arrays[name].coded == "blosc" else data

    def _most_packed(self, count: int) -> int:
        """Bytes that no packed chunk of `count` pairs exceeds."""
        return 2 * count * self.codec.row_bytes + 4096

    def _commit_of(self, codes_crc: int, view: int, block: int, content: Block) -> int:
        """2³² + CRC-32C of a block's unpacked codes, its other arrays, its samples, and whose block it is.

        The dither keys are functions of the samples' key hashes, the view, and the seed, which the origin holds.
        """
        rows = slice(*self.block_range(block))
        whose = np.array([self.origin, view, block], "<u8")
        crc = codes_crc
        for array in (*content[1:], self.status[rows], self.key_hash[rows], whose):
            crc = google_crc32c.extend(crc, np.ascontiguousarray(array, array.dtype.newbyteorder("<")))  # type: ignore
        return _COMMITTED | crc

    def _missing(self, view: int, missing: list[tuple[int, int]]) -> UserError:
        return UserError(
            f"store {self.path} has missing blocks",
            found=f"{len(missing)} of {self.manifest.blocks} missing for view {view} (first: {missing[0][1]})",
            expected="all committed",
            fix=_RERUN,
        )

    def _damaged(self, name: str, view: int, block: int, found: object) -> UserError:
        return UserError(
            f"store {self.path} is damaged: array {name}, view {view}, block {block}",
            found=found,
            fix=f"delete {self.files.where(self.key('commit', view, block))} and {_RERUN}",
        )


def _crc(array: np.ndarray) -> int:
    return google_crc32c.value(array)  # type: ignore[arg-type]  # any contiguous buffer will do


def padded(values: np.ndarray, array: layout.Array) -> bytes:
    """The bytes of a whole chunk that begins with `values`; zeros follow, as zarr has it."""
    data = np.ascontiguousarray(values, array.dtype).tobytes()
    return data + bytes(array.chunk_bytes - len(data))


def unreadable(place: Path | str, key: str, error: Exception) -> UserError:
    """An object of a store that its bytes say nothing of."""
    found = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return UserError(f"store {place} is damaged: cannot read {key}", found=found, fix=remake(place))


def remake(place: Path | str) -> str:
    """What helps a store whose beginnings are damaged."""
    return f"restore it from a copy, or delete {place} and run precompute-teacher again"
