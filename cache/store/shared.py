"""One plane per machine: the processes of a job unpack a view together, into one file in memory that all of them map.

The file begins with a byte per block, 1 once the block is unpacked and has been checked; whoever holds the lock on that
byte unpacks it. Locks belong to open files (Linux's OFD locks), so a process that is killed leaves its block to the
others, which find it undone. Nobody waits for a process, only for blocks, and there is no coordinator.

Every process also holds a shared lock for as long as it maps the file. The name goes as soon as all processes of the
job have mapped it, so that nothing remains of a job that is killed; of one killed before that, the next job removes
what nobody holds.
"""

import errno
import fcntl
import mmap
import os
import struct
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from cache.errors import UserError
from cache.store.blocks import Block, Progress, Store
from cache.store.objects import each
from cache.store.plane import Plane

_PREFIX = "jda-plane-"
_HELD = 1 << 40  # the byte, beyond the file, whose shared lock says that it is in use
_PAGE = 4096


@dataclass(frozen=True)
class Share:
    """Who shares planes: the processes of one job on one machine."""

    job: str
    """A name that no other job on the machine has, of letters, digits, - and _."""
    rank: int
    """Of this process among them, from 0."""
    world: int
    """How many they are."""
    folder: Path = Path("/dev/shm")
    """Where the files lie: memory, or a disk for planes that are larger."""


def room(store: Store, share: Share) -> bool:
    """Is there room for two planes in the folder? Yes, if another process of the job has begun one."""
    try:
        free = os.statvfs(share.folder)
    except OSError:
        return False
    if any(share.folder.glob(f"{_ours(share)}*")):
        return True
    return free.f_bavail * free.f_frsize > 2 * store.manifest.samples * (store.codec.row_bytes + 8)


def load(store: Store, view: int, share: Share, progress: Progress | None = None, workers: int | None = None) -> Plane:
    """A view's plane as `Store.load_plane` gives it; this process unpacks what no other one does.

    Raises UserError as `Store.load_plane` does, and for want of room in the folder.
    """
    store.require(view)
    blocks, samples = store.manifest.blocks, store.manifest.samples
    beside = 4 * samples * (2 + store.energies)
    at = np.cumsum([-(-(blocks + share.world) // _PAGE) * _PAGE, 4 * samples, 4 * samples])
    at = [*at, at[0] + beside + -beside % _PAGE]
    name = f"{_ours(share)}{store.origin:08x}-{samples}-{view}"
    _sweep(share)
    file = _mapped(share.folder / name, int(at[3]) + samples * store.codec.row_bytes)
    whole = np.frombuffer(file.map, np.uint8)
    done, here = whole[:blocks], whole[blocks : blocks + share.world]
    here[share.rank] = 1
    if here.all():
        (share.folder / name).unlink(missing_ok=True)
    plane = Block(
        whole[at[3] :].reshape(samples, -1),
        whole[at[0] : at[1]].view(np.float32),
        whole[at[1] :][: 4 * samples].view(np.uint32),
        np.empty(2, np.float32),
        whole[at[2] :][: 4 * samples * store.energies].view(np.float32).reshape(samples, -1),
    )

    def unpack(block: int, wait: bool) -> int | None:
        """Unpack a block unless that is done; its number if another process is at it."""
        if done[block]:
            return None
        if not _lock(file.number, block, fcntl.F_WRLCK, wait):
            return block
        try:
            if not done[block]:
                store.fill(view, block, plane)
                done[block] = 1
        finally:
            _lock(file.number, block, fcntl.F_UNLCK)
        return None

    first = share.rank * blocks // share.world
    order, finished = [(first + block) % blocks for block in range(blocks)], 0
    try:
        for wait in (False, True):
            left = []
            with closing(each(partial(unpack, wait=wait), order, workers or store.workers)) as results:
                for result in results:
                    if result is not None:
                        left.append(result)
                        continue
                    finished += 1
                    if progress:
                        progress(finished, blocks)
            order = left
    finally:
        os.close(file.number)  # the mapping holds the file, and its lock, open
    return store.as_plane(view, plane)


@dataclass(frozen=True)
class _File:
    number: int
    map: mmap.mmap


def _mapped(path: Path, size: int) -> _File:
    """The file at a path, made if need be, with its lock."""
    while True:
        try:
            number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise no_room(path.parent, size, error) from error
        try:
            if os.fstat(number).st_uid != os.getuid():
                raise OSError(errno.EPERM, "a file of another user is in the way")
            os.posix_fallocate(number, 0, size)  # a hole that finds memory full later would be a SIGBUS
            _lock(number, _HELD, fcntl.F_RDLCK, wait=True)
            if os.fstat(number).st_nlink:  # else another job took it for a remainder, just before
                return _File(number, mmap.mmap(number, size))
            os.close(number)
        except OSError as error:
            os.close(number)
            raise no_room(path.parent, size, error) from error


def no_room(folder: str | Path, size: int, error: OSError) -> UserError:
    """A plane of so many bytes that cannot be mapped."""
    found = f"{error.strerror} ({size:,} bytes wanted)"
    return UserError(
        f"cannot map a plane in {folder}",
        found=found,
        fix="choose a folder with room for two planes, on a disk that maps files",
    )


def _ours(share: Share) -> str:
    return f"{_PREFIX}{os.getuid()}-{share.job}-"


def _sweep(share: Share) -> None:
    """Remove what jobs that were killed have left: files that nobody holds."""
    for path in share.folder.glob(f"{_PREFIX}{os.getuid()}-*"):
        if path.name.startswith(_ours(share)):
            continue  # ours, perhaps just being made
        with suppress(OSError):
            number = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if _lock(number, _HELD, fcntl.F_WRLCK):
                    path.unlink(missing_ok=True)
            finally:
                os.close(number)


def _lock(number: int, byte: int, kind: int, wait: bool = False) -> bool:
    """Lock or unlock a byte of an open file, for whoever has it open; False if another has it and `wait` is not."""
    command = fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK
    try:
        fcntl.fcntl(number, command, struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True
