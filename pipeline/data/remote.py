"""Shards behind a URL: in a bucket, or http(s)://host/path, read by ranges through obstore, with patience.

A bucket is s3://bucket/key, gs://bucket/key or az://container/key. S3 is configured by the usual variables:
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_SKIP_SIGNATURE=true for public buckets, AWS_ENDPOINT_URL for
other servers of the protocol (http:// is allowed); Google's by GOOGLE_SERVICE_ACCOUNT, Azure's by
AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY.

Clients are those of stores (`cache.store.retry`). One does not survive a fork: its threads stay behind.
"""

import itertools
import re
from collections.abc import Callable
from functools import lru_cache
from glob import has_magic
from pathlib import PurePosixPath
from typing import Any, TypeVar
from urllib.parse import unquote

import obstore
from obstore.exceptions import BaseError, NotSupportedError

from cache.errors import UserError
from cache.store import retry

BUCKETS = ("s3://", "gs://", "az://")
"""Schemes of servers that list."""
_T = TypeVar("_T")


class Unreadable(UserError):
    """A shard that cannot be read: missing, forbidden, or unreachable after all tries. `cause` says which."""

    def __init__(self, shard: str, offset: int | None, cause: str, fix: str):
        place = "" if offset is None else f" at byte {offset}"
        super().__init__(f"cannot read shard {shard}{place}", found=cause, fix=fix)
        self.cause = cause


def is_remote(shard: str) -> bool:
    """Is it a URL? Everything else is a path."""
    return shard.startswith((*BUCKETS, "http://", "https://"))


class Remote:
    """Objects of any bucket or host, by URL; thread-safe. All methods raise Unreadable."""

    def __init__(self):
        self._store = lru_cache(None)(retry.client)

    def read(self, url: str, offset: int, size: int) -> bytes:
        """The `size` bytes from `offset` on, fewer where the object ends before."""
        root, path = split(url)

        def request() -> bytes:
            try:
                found = obstore.get(self._store(root), path, options={"range": (offset, offset + size)})
                data = found.bytes().to_bytes()
            except BaseError as error:
                if retry.status(error) == 416 or "StartTooLarge" in str(error):
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
        """URLs of the objects that a bucket's pattern matches; a wildcard stays within one folder, ** is none."""
        root, path = split(pattern)
        folders = itertools.takewhile(lambda part: not has_magic(part), path.split("/")[:-1])
        prefix = "/".join(folders) or None
        objects: Any = _patiently(pattern, None, lambda: obstore.list(self._store(root), prefix).collect())
        # Both begin at the root, so that the pattern has to match the whole key, a folder at a time.
        keys = (entry["path"] for entry in objects if PurePosixPath("/", entry["path"]).match("/" + path))
        return [f"{root}/{key}" for key in keys]


def split(url: str) -> tuple[str, str]:
    """A URL -> (scheme://host or bucket, path without percent signs); UserError for what cannot be a shard."""
    scheme, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    if f"{scheme}://" in BUCKETS:
        valid = re.fullmatch(r"[A-Za-z0-9._-]+", host) and path
    else:
        valid = host and "@" not in host and path and not re.search(r"[?#]", url)
        path = unquote(path)  # the client quotes it again
    if not valid:
        expected = "s3://bucket/key (gs://, az://) or http(s)://host/path, without user, query or fragment"
        raise UserError("not the URL of a shard", found=url, expected=expected, fix="correct it")
    return f"{scheme}://{host}", path


def _patiently(shard: str, offset: int | None, request: Callable[[], _T]) -> _T:
    """`request()`, repeated with growing waits while its error may pass; else Unreadable."""
    try:
        return retry.patiently(request, lambda error: not isinstance(error, (BaseError, OSError)))
    except retry.GaveUp as gave_up:
        error, tries = gave_up.error, gave_up.tries
        if not isinstance(error, (BaseError, OSError, ValueError)):
            raise error from None
        unranged = isinstance(error, NotSupportedError)
        cause = "a server without range requests" if unranged else retry.cause(error)
        cause += f" ({tries} tries)" if tries > 1 else ""
        raise Unreadable(shard, offset, cause, _fix(shard, error)) from None


def _fix(shard: str, error: Exception) -> str:
    if retry.is_refusal(error):
        if shard.startswith("s3://"):
            return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket"
        if shard.startswith(BUCKETS):
            return "set the credentials of this bucket, see pipeline/data/remote.py"
        return "make it readable without a login"
    return "check the URL, the network and the server"
