"""Where shards lie: byte ranges of local files and, with a local cache, of remote ones; patterns that name shards.

A shard is named by a path or by a URL, that of an object in a bucket, of a file on the Hub, or http(s)://host/path (see
`pipeline.data.remote`).
"""

import errno
import fcntl
import hashlib
import os
import re
import resource
import stat
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from glob import escape, glob, has_magic
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from braceexpand import braceexpand
from google_crc32c import value as crc32c

from cache.errors import UserError
from pipeline.data import hub, tokens
from pipeline.data.addresses import resolved
from pipeline.data.remote import BUCKETS, Remote, Unreadable, is_remote, split

CACHE_BYTES = 50 << 30

_OPEN_SHARDS = 256  # well below the usual limit of 1,024 descriptors per process, and at most a quarter of any
_LIMITS = {errno.EMFILE: "ulimit -n", errno.ENFILE: "the system's fs.file-max", errno.ENOMEM: "the memory"}
_COPY_BYTES, _COPY_THREADS = 4 << 20, 8
_COUNT_DIGITS = 20


class Reader:
    """Reads byte ranges of any shard; thread-safe, and leaves no file position behind.

    `cache` is a folder for ranges of remote shards, at most `cache_bytes` of them, which processes may share.
    """

    def __init__(self, cache: Path | None = None, cache_bytes: int = CACHE_BYTES):
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = _OPEN_SHARDS if limit == resource.RLIM_INFINITY else min(_OPEN_SHARDS, max(limit // 4, 1))
        self._descriptor = lru_cache(most)(_Descriptor)
        self._remote = Remote()
        self._cache = None if cache is None else RangeCache(cache, cache_bytes)

    def read(self, shard: str, offset: int, size: int, crc: int | None = None) -> bytes:
        """The `size` bytes from `offset` on, fewer where the shard ends before; Unreadable if that fails.

        Another UserError for a limit of this machine, which is no fault of the shard.

        Only a range whose CRC-32C is given goes through the cache, so that damage in the cache is found. The result
        is not checked against it.
        """
        if size == 0:
            return b""
        if not is_remote(shard):
            try:
                held = self._held(shard)  # the name keeps it open, should the lru_cache drop it meanwhile
                return os.pread(held.number, size, offset)
            except OSError as error:
                _blame_machine(error)
                raise Unreadable(shard, offset, error.strerror or str(error), "restore the shard") from None
        if self._cache is None or crc is None:
            return self._remote.read(shard, offset, size)
        lasting = shard.partition("?")[0] if tokens.signed(shard) else shard  # without a signature, which changes
        name = hashlib.blake2b(f"{lasting}\n{offset} {size} {crc}".encode(errors="surrogateescape"), digest_size=20)
        data = self._cache.get(name.hexdigest())
        if data is None or crc32c(data) != crc:
            data = self._remote.read(shard, offset, size)
            if crc32c(data) == crc:
                self._cache.put(name.hexdigest(), data)
        return data

    def _held(self, shard: str) -> "_Descriptor":
        try:
            return self._descriptor(shard)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        self._descriptor.cache_clear()  # others took what we had counted on: make do with fewer
        return self._descriptor(shard)

    def length(self, shard: str) -> int:
        """Bytes of the whole shard; Unreadable if it is not there."""
        if not is_remote(shard):
            try:
                return os.stat(shard).st_size
            except (OSError, ValueError) as error:
                cause = getattr(error, "strerror", None) or str(error)
                raise Unreadable(shard, None, cause, "restore it or run pipeline prepare again") from None
        return self._remote.length(shard)

    @contextmanager
    def open(self, shard: str, folder: Path) -> Iterator[BinaryIO]:
        """The whole shard as a file with a descriptor; of a remote one a nameless copy in `folder`, gone when closed.

        The copy is fetched once, by ranges, before this returns. Unreadable, or OSError for a full disk.
        """
        if not is_remote(shard):
            try:
                file = os.fdopen(os.open(shard, os.O_RDONLY | os.O_NONBLOCK), "rb")  # a FIFO would wait for a writer
            except OSError as error:
                _blame_machine(error)
                raise Unreadable(shard, None, error.strerror or str(error), "check the file") from None
            with file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise Unreadable(shard, None, "no regular file", "leave it out of the pattern")
                yield file
            return
        with tempfile.TemporaryFile(dir=folder) as file:
            length = self.length(shard)
            file.truncate(length)

            def copy(offset: int) -> None:
                size = min(_COPY_BYTES, length - offset)
                data = self._remote.read(shard, offset, size)
                if len(data) != size:
                    raise Unreadable(shard, offset, "a shard that became shorter", "run it again")
                while data:  # a nearly full disk takes a part, and refuses the rest with its reason
                    written = os.pwrite(file.fileno(), data, offset)
                    data, offset = data[written:], offset + written

            with ThreadPoolExecutor(_COPY_THREADS) as pool:
                for _ in pool.map(copy, range(0, length, _COPY_BYTES)):
                    pass
            yield file

    def expand(self, pattern: str, suffix: str = ".tar") -> list[str]:
        """The shards that a pattern names, sorted, paths absolute.

        A pattern is a path, file: or a URL, with {braces} and, but for HTTP, wildcards; a file of just that name goes
        before either. A folder means its files of the `suffix`, and @FILE the patterns in a file, one a line. UserError
        for a pattern, or one of its brace alternatives, that names none, and for another kind of address.
        """
        if pattern.startswith("@") and not os.path.lexists(pattern):
            return sorted({shard for line in _lines(pattern[1:]) for shard in self.expand(line, suffix)})
        pattern = resolved(pattern)
        shards: set[str] = set()
        try:
            alternatives = [pattern] if os.path.lexists(pattern) else list(braceexpand(pattern))
        except ValueError:  # unbalanced: then they are part of a name
            alternatives = [pattern]
        for name in alternatives:
            found = self._list(name, suffix)
            if not found:
                raise UserError(f"no shard matches {name}", fix="check the pattern, and quote it for the shell")
            shards.update(found)
        return sorted(shards)

    def _list(self, pattern: str, suffix: str) -> list[str]:
        if not is_remote(pattern):
            if os.path.isdir(pattern):
                found = glob(os.path.join(escape(pattern), f"*{suffix}"))
                if not found:
                    expected = f"*{suffix} in it"
                    raise UserError(f"no shard in the folder {pattern}", expected=expected, fix="give FOLDER/PATTERN")
            else:
                found = [pattern] if os.path.lexists(pattern) else glob(os.path.expanduser(pattern), recursive=True)
            return [os.path.abspath(name) for name in found]
        if pattern.startswith((*BUCKETS, hub.SCHEME)):
            if pattern.startswith(hub.SCHEME) and not hub.split(pattern)[1]:
                pattern = pattern.rstrip("/") + "/"
            pattern += f"*{suffix}" if pattern.endswith("/") else ""
            if has_magic(pattern):
                return self._remote.match(pattern)
        elif "*" in pattern.partition("?")[0]:
            raise UserError(
                "wildcards need a server that lists", found=pattern, fix="use braces, as in train-{000..009}.tar"
            )
        split(pattern)  # a UserError now rather than in the middle of the work
        return [pattern]


def _lines(path: str) -> list[str]:
    """The lines of a list of shards but empty ones."""
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            found = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the list {path}", found=error, fix="give @FILE with a shard a line") from None
    if not any(found):
        raise UserError(f"the list {path} is empty", expected="a shard a line", fix="correct it")
    return [line for line in found if line]


def _blame_machine(error: OSError) -> None:
    """Raise UserError if the machine, and not the file, is what is wrong."""
    if error.errno in _LIMITS:
        fix = f"raise {_LIMITS[error.errno]}, or run fewer processes"
        raise UserError("a limit of this machine, no damage", found=error.strerror, fix=fix) from None


def stem(shard: str) -> str:
    """The name of a shard: without folder, extension and, of a URL, query."""
    if is_remote(shard):
        shard = unquote(shard.partition("?")[0]) if shard.startswith("http") else shard
    return os.path.basename(shard).partition(".")[0]


class RangeCache:
    """A folder of small files, the least recently used of which go when they would exceed `limit` bytes.

    Safe across threads and processes: entries appear whole, by rename, and writers take turns by a lock on the file
    that holds the count of bytes. The count is never below the truth; it is taken anew when the folder seems full.
    Names are hexadecimal. What is read is to be checked by the caller. UserError for an unusable folder.
    """

    def __init__(self, folder: Path, limit: int):
        if limit < 0:
            raise UserError("negative size of the shard cache", found=limit, fix="give a positive one")
        self.folder, self.limit = Path(folder).absolute(), limit
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._locked():
                pass
        except OSError as error:
            raise UserError(
                f"cannot keep shards in {folder}", found=error.strerror, fix="choose another folder for the cache"
            ) from None

    def get(self, name: str) -> bytes | None:
        """The bytes kept under `name`, None if there are none."""
        try:
            with open(self._path(name), "rb") as file:
                os.utime(file.fileno())  # the time of last use: many file systems do not keep it themselves
                return file.read()
        except OSError:
            return None

    def put(self, name: str, data: bytes) -> None:
        """Keep `data`, which may be dropped at any time. A full disk costs speed, not the run."""
        if len(data) > self.limit:
            return
        with suppress(OSError), self._locked() as counter:
            used = self._count(counter) + len(data)
            if used > self.limit:
                used = self._make_room(len(data)) + len(data)
            # Counted first: a kill in between leaves the count too high, which is safe.
            os.pwrite(counter, f"{used:0{_COUNT_DIGITS}d}".encode(), 0)
            partial = self.folder / "partial"  # one is enough, as writers take turns
            partial.write_bytes(data)
            os.replace(partial, self._path(name))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.range"

    @contextmanager
    def _locked(self) -> Iterator[int]:
        # A descriptor of its own for each turn, since flock lets all holders of one descriptor in.
        counter = os.open(self.folder / "bytes", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(counter, fcntl.LOCK_EX)
            yield counter
        finally:
            os.close(counter)

    def _count(self, counter: int) -> int:
        """Bytes kept, by the counter; so many that they are counted anew if it does not say."""
        digits = os.pread(counter, _COUNT_DIGITS + 1, 0)
        return int(digits) if re.fullmatch(rb"[0-9]{%d}" % _COUNT_DIGITS, digits) else self.limit

    def _make_room(self, size: int) -> int:
        """Drop the entries of longest disuse until `size` bytes and a tenth of the limit are free; bytes that stay."""
        with os.scandir(self.folder) as entries:
            kept = sorted(
                (stat.st_mtime_ns, stat.st_size, entry.path)
                for entry in entries
                if entry.name.endswith(".range") and (stat := entry.stat(follow_symlinks=False))
            )
        used = sum(length for _, length, _ in kept)
        # Looking through the folder is slow: room for a while, not for this entry only.
        target = min(self.limit - size, self.limit * 9 // 10)
        for _, length, path in kept if used > self.limit - size else ():
            if used <= target:
                break
            os.unlink(path)
            used -= length
        return used


class _Descriptor:
    """A read-only file descriptor that closes with its last user, so a cache may drop it at any time."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)
