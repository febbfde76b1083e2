"""Shards behind a URL: s3://bucket/key or http(s)://host/path, read by ranges through obstore, with patience.

S3 is configured by the usual variables: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION,
AWS_SKIP_SIGNATURE=true for public buckets, AWS_ENDPOINT_URL for other servers of the protocol (http:// is allowed).

Two layers retry. obstore repeats requests that met a 5xx or 429, a broken connection or a time-out, and resumes a
broken body, but that only from servers that send an ETag. What it gives up on or does not see (a body broken without
ETag, a short body, an outage of seconds) is repeated here. A client does not survive a fork: its threads stay behind.
"""

import itertools
import random
import re
import time
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from glob import has_magic
from pathlib import PurePosixPath
from typing import Any, TypeVar
from urllib.parse import unquote

import obstore
from obstore.exceptions import BaseError, NotSupportedError, PermissionDeniedError, UnauthenticatedError
from obstore.store import HTTPStore, S3Store

from cache.errors import UserError

_CONNECT_S = 10
_STALL_S = 20  # without a single byte
_REQUEST_S = 120
_QUICK_RETRIES, _QUICK_WAIT_S = 3, 0.1  # of obstore; the waits double up to a second
_TRIES, _FIRST_WAIT_S, _MAX_WAIT_S = 7, 0.25, 8.0  # waits double: a server that is down costs some 15 s
_PATIENCE_S = 60  # no try begins later, so that a server that hangs is given up as well

_jitter = random.Random()  # the shared generator is the training's
_T = TypeVar("_T")


class Unreadable(UserError):
    """A shard that cannot be read: missing, forbidden, or unreachable after all tries. `cause` says which."""

    def __init__(self, shard: str, offset: int | None, cause: str, fix: str):
        place = "" if offset is None else f" at byte {offset}"
        super().__init__(f"cannot read shard {shard}{place}", found=cause, fix=fix)
        self.cause = cause


def is_remote(shard: str) -> bool:
    """Is it a URL? Everything else is a path."""
    return shard.startswith(("s3://", "http://", "https://"))


class Remote:
    """Objects of any bucket or host, by URL; thread-safe. All methods raise Unreadable."""

    def __init__(self):
        self._store = lru_cache(None)(_store)

    def read(self, url: str, offset: int, size: int) -> bytes:
        """The `size` bytes from `offset` on, fewer where the object ends before."""
        root, path = split(url)

        def request() -> bytes:
            try:
                found = obstore.get(self._store(root), path, options={"range": (offset, offset + size)})
                data = found.bytes().to_bytes()
            except BaseError as error:
                if _status(error) == 416 or "StartTooLarge" in str(error):
                    return b""
                raise
            promised = min(size, found.meta["size"] - offset)
            if len(data) != promised:
                raise ConnectionError(f"{len(data)} of {promised} bytes")
            return data

        return _patiently(url, offset, request)

    def length(self, url: str) -> int:
        """Bytes of the whole object."""
        root, path = split(url)
        return _patiently(url, None, lambda: obstore.head(self._store(root), path)["size"])

    def match(self, pattern: str) -> list[str]:
        """URLs of the objects that an s3:// pattern matches; a wildcard stays within one folder, ** is none."""
        root, path = split(pattern)
        folders = itertools.takewhile(lambda part: not has_magic(part), path.split("/")[:-1])
        prefix = "/".join(folders) or None
        objects: Any = _patiently(pattern, None, lambda: obstore.list(self._store(root), prefix).collect())
        # Both begin at the root, so that the pattern has to match the whole key, a folder at a time.
        keys = (entry["path"] for entry in objects if PurePosixPath("/", entry["path"]).match("/" + path))
        return [f"{root}/{key}" for key in keys]


def _store(root: str) -> S3Store | HTTPStore:
    """The client of one bucket or host."""
    options: dict[str, Any] = {
        "client_options": {
            "allow_http": True,
            "connect_timeout": timedelta(seconds=_CONNECT_S),
            "read_timeout": timedelta(seconds=_STALL_S),
            "timeout": timedelta(seconds=_REQUEST_S),
        },
        "retry_config": {
            "max_retries": _QUICK_RETRIES,
            "retry_timeout": timedelta(seconds=_PATIENCE_S),
            "backoff": {"init_backoff": timedelta(seconds=_QUICK_WAIT_S), "max_backoff": timedelta(seconds=1)},
        },
    }
    # Not obstore's from_url, which takes https://….amazonaws.com for S3 and then wants credentials.
    return S3Store(root.removeprefix("s3://"), **options) if root.startswith("s3://") else HTTPStore(root, **options)


def split(url: str) -> tuple[str, str]:
    """A URL -> (scheme://host or s3://bucket, path without percent signs); UserError for what cannot be a shard."""
    scheme, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    if scheme == "s3":
        valid = re.fullmatch(r"[A-Za-z0-9._-]+", host) and path
    else:
        valid = host and "@" not in host and path and not re.search(r"[?#]", url)
        path = unquote(path)  # the client quotes it again
    if not valid:
        expected = "s3://bucket/key or http(s)://host/path, without user, query or fragment"
        raise UserError("not the URL of a shard", found=url, expected=expected, fix="correct it")
    return f"{scheme}://{host}", path


def _patiently(shard: str, offset: int | None, request: Callable[[], _T]) -> _T:
    """`request()`, repeated with growing waits while its error may pass; else Unreadable."""
    start, tries = time.monotonic(), 0
    while True:
        try:
            return request()
        except (BaseError, OSError, ValueError) as error:
            tries += 1
            if tries == _TRIES or time.monotonic() - start > _PATIENCE_S or _is_final(error):
                cause = _cause(error) + (f" ({tries} tries)" if tries > 1 else "")
                raise Unreadable(shard, offset, cause, _fix(shard, error)) from None
        # Half of it random: workers that failed together should not come back together.
        time.sleep(min(_FIRST_WAIT_S * 2 ** (tries - 1), _MAX_WAIT_S) * _jitter.uniform(0.5, 1))


def _status(error: Exception) -> int | None:
    """HTTP status in an error of obstore's, which has it in its text alone."""
    match = re.search(r"status code: ([0-9]{3})", str(error))
    return int(match[1]) if match else None


def _no_credentials(error: Exception) -> bool:
    """Without any, the S3 client asks the metadata service of a cloud machine for them."""
    return re.search(r"/latest/api/token|Missing (AccessKeyId|SecretAccessKey)", str(error)) is not None


def _is_final(error: Exception) -> bool:
    """Would the same request fail again?"""
    kinds = (FileNotFoundError, PermissionDeniedError, UnauthenticatedError, NotSupportedError, ValueError)
    status = _status(error) or 0
    return isinstance(error, kinds) or _no_credentials(error) or (300 <= status < 500 and status not in (408, 429))


def _cause(error: Exception) -> str:
    """A few words on an error of obstore's, whose own text is a page of nested structures."""
    text = str(error)
    if _no_credentials(error):
        return "no AWS credentials"
    if code := re.search(r"<Code>(\w+)</Code>", text):
        return code[1]
    if status := re.search(r"status code: ([0-9]{3}[A-Za-z \-]*)", text):
        hint = ": no such object, or no such bucket" if isinstance(error, FileNotFoundError) else ""
        return f"HTTP {status[1].strip()}{hint}"
    if "TimedOut" in text:
        return "time-out"
    if messages := re.findall(r'(?:message|error): "([^"\n]+)"', text):
        return messages[-1]  # the innermost
    if "IncompleteBody" in text:
        return "connection closed within the body"
    if isinstance(error, NotSupportedError):
        return "a server without range requests"
    return text.partition("\n")[0]


def _fix(shard: str, error: Exception) -> str:
    if isinstance(error, (PermissionDeniedError, UnauthenticatedError)) or _no_credentials(error):
        if shard.startswith("s3://"):
            return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket"
        return "make it readable without a login"
    return "check the URL, the network and the server"
