"""Where a store's bytes are: the files of a folder, or the objects below a URL; obstore moves them, both in one way.

URLs are s3://bucket/prefix (gs:// and az:// too), configured by the usual variables: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_SKIP_SIGNATURE=true for public buckets, AWS_ENDPOINT_URL for other servers of
the protocol (http:// is allowed). obstore repeats requests that met a 5xx or 429, a broken connection or a time-out;
what it gives up on or does not see (a broken body, an outage of seconds) is repeated here. A put is atomic
everywhere; in a folder it is a file ``name#1`` that is renamed, and a kill may leave one behind.
"""

import contextlib
import random
import re
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import google_crc32c
import numpy as np
import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, from_url

from cache.errors import UserError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

CRC_BYTES = 4
_URL = re.compile(r"(s3|gs|az)://[^/?#]+(/[^?#]*)?")
_TRIES, _FIRST_WAIT_S, _MAX_WAIT_S = 7, 0.25, 8.0  # waits double: a server that is down costs some 15 s
_PATIENCE_S = 60  # no try begins later, so that a server that hangs is given up as well
_CLIENT: dict[str, Any] = {
    "client_options": {
        "allow_http": True,
        "connect_timeout": timedelta(seconds=10),
        "read_timeout": timedelta(seconds=20),  # without a single byte
        "timeout": timedelta(seconds=300),
    },
    "retry_config": {
        "max_retries": 3,
        "retry_timeout": timedelta(seconds=60),
        "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=1)},
    },
}

_jitter = random.Random()  # the shared generator is the training's
_T = TypeVar("_T")
_R = TypeVar("_R")


class Damaged(Exception):
    """An object that is missing, or not what was written; the text says how, without naming it."""


@dataclass(frozen=True)
class Files:
    """The objects below one place, by key (``pairs/c/0/3/0``); thread-safe. Methods raise UserError if it fails."""

    place: Path | str
    """Folder or URL."""
    objects: "ObjectStore"

    @property
    def workers(self) -> int:
        """Threads worth having: a disk needs its queue filled, a server its latency hidden."""
        return 4 if isinstance(self.place, Path) else 16

    def where(self, key: str) -> str:
        """A key's file or URL, for messages."""
        return f"{self.place}/{key}"

    def get(self, key: str, least: int, most: int) -> np.ndarray:
        """The bytes of an object, u8; Damaged if it is missing or its size, known before it is read, out of range."""
        # By ranges servers tell the size of the object, which a body cut short on its way does not have.
        options: Any = None if isinstance(self.place, Path) else {"range": (0, most)}

        def request() -> np.ndarray:
            found = obstore.get(self.objects, key, options=options)
            size = found.meta["size"]
            if not least <= size <= most:
                expected = f"{least}" if least == most else f"{least} to {most}"
                raise Damaged(f"{size} bytes in {self.where(key)} instead of {expected}")
            data = np.frombuffer(memoryview(found.bytes()), np.uint8)
            if len(data) != size:
                raise ConnectionError(f"{len(data)} of {size} bytes")
            return data

        try:
            return self._patiently("read", request)
        except FileNotFoundError:
            raise Damaged(f"no {self.where(key)}") from None

    def get_chunk(self, key: str, least: int, most: int) -> tuple[np.ndarray, int]:
        """A chunk of `least` to `most` bytes, u8, and its CRC-32C, which follows it in the object. Damaged as `get`."""
        data = self.get(key, least + CRC_BYTES, most + CRC_BYTES)
        body, stored = data[:-CRC_BYTES], int.from_bytes(data[-CRC_BYTES:].tobytes(), "little")
        if (crc := google_crc32c.value(body)) != stored:  # type: ignore[arg-type]  # any buffer will do
            raise Damaged(f"CRC-32C {crc:08x} instead of {stored:08x} of {self.where(key)}")
        return body, crc

    def put(self, key: str, data: bytes) -> None:
        """Write an object, in place of any that is there."""
        self._put(key, data, None)

    def put_chunk(self, key: str, data: bytes) -> None:
        """Write a chunk and its CRC-32C."""
        self._put(key, framed(data), None)

    def create(self, key: str, data: bytes) -> bool:
        """Write an object unless there is one, which is left alone: False.

        Without a race also where the server has no conditional writes.
        """
        try:
            self._put(key, data, "create")
        except AlreadyExistsError:
            return False
        except (NotSupportedError, NotImplementedError):
            if self.has(key):
                return False
            self._put(key, data, None)
        return True

    def delete(self, key: str) -> None:
        """Delete an object if there is one."""
        with contextlib.suppress(FileNotFoundError):
            self._patiently("write", lambda: obstore.delete(self.objects, key))

    def has(self, key: str) -> bool:
        """Is there such an object?"""
        try:
            self._patiently("read", lambda: obstore.head(self.objects, key))
        except FileNotFoundError:
            return False
        return True

    def sizes(self, prefix: str) -> dict[str, int]:
        """Bytes of every object below a folder, by key."""
        listed: Any = self._patiently("read", lambda: obstore.list(self.objects, prefix).collect())
        return {entry["path"]: entry["size"] for entry in listed}

    def names(self) -> set[str]:
        """Of the folders and objects at the top."""
        try:
            found = self._patiently("read", lambda: obstore.list_with_delimiter(self.objects))
        except UserError as error:
            if "NoSuchBucket" in str(error):
                return set()
            raise
        return {*found["common_prefixes"], *(entry["path"] for entry in found["objects"])}

    def _put(self, key: str, data: bytes, mode: Any) -> None:
        try:
            self._patiently("write", lambda: obstore.put(self.objects, key, data, mode=mode))
        except FileNotFoundError as error:  # a bucket that is not there
            raise failed("write", self.place, error) from error

    def _patiently(self, verb: str, request: Callable[[], _T]) -> _T:
        """`request()`, repeated with growing waits while its error may pass; else UserError.

        What says something about the object is raised as it is: FileNotFoundError, AlreadyExistsError,
        NotSupportedError.
        """
        start, tries = time.monotonic(), 0
        while True:
            try:
                return request()
            except (FileNotFoundError, AlreadyExistsError, NotSupportedError):
                raise
            except (BaseError, OSError) as error:
                tries += 1
                late = tries == _TRIES or time.monotonic() - start > _PATIENCE_S
                if isinstance(self.place, Path) or late or _is_final(error):
                    raise failed(verb, self.place, error) from error
            # Half of it random: workers that failed together should not come back together.
            time.sleep(min(_FIRST_WAIT_S * 2 ** (tries - 1), _MAX_WAIT_S) * _jitter.uniform(0.5, 1))


def place_of(path: str | Path) -> Path | str:
    """A path, or the text of a URL. Raises UserError for a URL that can be no store's."""
    if isinstance(path, Path) or "://" not in path:
        return Path(path)
    if not _URL.fullmatch(path):  # obstore drops a query or fragment without a word
        expected = "a path or s3://bucket/prefix, without query or fragment"
        raise UserError("not the place of a store", found=path, expected=expected, fix="check --store")
    return path.rstrip("/")


def connect(place: Path | str, *, make: bool = False) -> Files:
    """Access to a folder, made if wanted, or to what is below a URL. Raises UserError."""
    try:
        if isinstance(place, Path):
            return Files(place, LocalStore(place, mkdir=make))
        return Files(place, from_url(place, **_CLIENT))
    except (BaseError, OSError, ValueError) as error:
        raise failed("write" if make else "read", place, error) from error


def framed(data: bytes) -> bytes:
    """A chunk as it is stored: its bytes and their CRC-32C, as zarr's codec crc32c has it."""
    return data + google_crc32c.value(data).to_bytes(CRC_BYTES, "little")


def failed(verb: str, place: Path | str, error: Exception) -> UserError:
    """What to say of an operation that did not work."""
    fix = "check --store and its permissions"
    if verb == "write":
        fix = "free space or mend the path, then run precompute-teacher again, it resumes"
    return UserError(f"cannot {verb} store {place}", found=cause(error), fix=fix)


def _is_final(error: Exception) -> bool:
    """Would the same request fail again?"""
    status = re.search(r"status code: ([0-9]{3})", str(error))
    refused = status is not None and 300 <= int(status[1]) < 500 and status[1] not in ("408", "429")
    return refused or isinstance(error, (PermissionDeniedError, UnauthenticatedError)) or _no_credentials(error)


def _no_credentials(error: Exception) -> bool:
    """Without any, the S3 client asks the metadata service of a cloud machine for them."""
    return re.search(r"/latest/api/token|Missing (AccessKeyId|SecretAccessKey)", str(error)) is not None


def cause(error: Exception) -> str:
    """A few words on an error of obstore's, whose own text is a page of nested structures."""
    text = str(error)
    if found := re.search(r"([^:\n]+) \(os error [0-9]+\)", text):
        return found[1].strip()
    if _no_credentials(error):
        return "no AWS credentials"
    if found := re.search(r"<Code>(\w+)</Code>", text):
        return found[1]
    if found := re.search(r"status code: ([0-9]{3}[A-Za-z \-]*)", text):
        return f"HTTP {found[1].strip()}"
    if "TimedOut" in text:
        return "time-out"
    if messages := re.findall(r'(?:message|error): "([^"\n]+)"', text):
        return messages[-1]  # the innermost
    return text.partition("\n")[0]


def each(function: Callable[[_T], _R], items: Iterable[_T], workers: int) -> Generator[_R, None, None]:
    """`function` of each item, in order, by threads that are never more than a few items ahead."""
    pending: deque[Future[_R]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="store") as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
