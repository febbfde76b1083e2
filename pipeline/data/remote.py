"""Shards behind a URL: in a bucket, on the Hugging Face Hub (`pipeline.data.hub`), or http(s)://host/path.

They are read by ranges through obstore, with patience. An http(s) URL may be a signed one, with its query; a host may
want a token (`pipeline.data.tokens`).

A bucket is s3://bucket/key, gs://bucket/key or az://container/key. S3 is configured by the usual variables:
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_SKIP_SIGNATURE=true for public buckets, AWS_ENDPOINT_URL for
other servers of the protocol (http:// is allowed), AWS_VIRTUAL_HOSTED_STYLE_REQUEST=true where the bucket is in its
name; Google's by GOOGLE_SERVICE_ACCOUNT, Azure's by AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY.

HTTPS_PROXY, HTTP_PROXY and NO_PROXY are obeyed. SSL_CERT_FILE takes the place of the system's authorities. Clients are
those of stores (`cache.store.retry`). One does not survive a fork: its threads stay behind.
"""

import itertools
import re
from collections.abc import Callable
from functools import lru_cache
from glob import has_magic
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote

import obstore
from obstore.exceptions import BaseError, NotSupportedError

from cache.errors import UserError
from cache.store import retry
from pipeline.data import hub, tokens

if TYPE_CHECKING:
    from obstore.store import ObjectStore

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
    return shard.startswith((*BUCKETS, hub.SCHEME, "http://", "https://"))


class Remote:
    """Objects of any bucket or host, by URL; thread-safe. All methods raise Unreadable."""

    def __init__(self):
        self._store = lru_cache(None)(_client)

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

        def request() -> int:
            if not tokens.signed(url) and not url.startswith(hub.SCHEME):
                return obstore.head(self._store(root), path)["size"]
            try:  # a signature is for one method, and the Hub redirects to one
                return obstore.get(self._store(root), path, options={"range": (0, 1)}).meta["size"]
            except BaseError as error:
                if retry.status(error) == 416:
                    return 0
                raise

        return _patiently(url, None, request)

    def match(self, pattern: str) -> list[str]:
        """URLs that a pattern of a bucket or the Hub matches; a wildcard stays within one folder, ** is none."""
        root, path = split(pattern)
        if pattern.startswith(hub.SCHEME):
            names = _patiently(pattern, None, hub.listed(root))
            return [f"{root}/{name}" for name in names if PurePosixPath("/", name).match("/" + path)]
        folders = itertools.takewhile(lambda part: not has_magic(part), path.split("/")[:-1])
        prefix = "/".join(folders) or None
        objects: Any = _patiently(pattern, None, lambda: obstore.list(self._store(root), prefix).collect())
        # Both begin at the root, so that the pattern has to match the whole key, a folder at a time.
        keys = (entry["path"] for entry in objects if PurePosixPath("/", entry["path"]).match("/" + path))
        return [f"{root}/{key}" for key in keys]


def split(url: str) -> tuple[str, str]:
    """A URL -> (scheme://host or bucket, path without percent signs); UserError for what cannot be a shard.

    The query of a signed URL goes with its host.
    """
    if url.startswith(hub.SCHEME):
        return hub.split(url)
    query = ""
    if tokens.signed(url):
        url, _, query = url.partition("?")
    scheme, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    if f"{scheme}://" in BUCKETS:
        valid = re.fullmatch(r"[A-Za-z0-9._-]+", host) and path
    else:
        valid = host and "@" not in host and path and "#" not in url + query
        path = unquote(path)  # the client quotes it again
    if not valid:
        expected = "s3://bucket/key (gs://, az://) or http(s)://host/path, without user or fragment"
        raise UserError("not the URL of a shard", found=url, expected=expected, fix="correct it")
    return f"{scheme}://{host}" + (f"/?{query}" if query else ""), path


def _client(root: str) -> "ObjectStore":
    if root.startswith(hub.SCHEME):
        return retry.client(*hub.place(root))
    return retry.client(root, tokens.headers(root) if root.startswith("http") else None)


def _patiently(shard: str, offset: int | None, request: Callable[[], _T]) -> _T:
    """`request()`, repeated with growing waits while its error may pass; else Unreadable."""
    try:
        return retry.patiently(request, _is_hopeless)
    except retry.GaveUp as gave_up:
        error, tries = gave_up.error, gave_up.tries
        if isinstance(error, UserError) or not isinstance(error, (BaseError, OSError, ValueError)):
            raise error from None
        cause, fix = _explained(shard, error)
        cause += f" ({tries} tries)" if tries > 1 else ""
        raise Unreadable(shard, offset, cause, fix) from None


def _is_hopeless(error: Exception) -> bool:
    code = hub.status(error) or 500
    return not isinstance(error, (BaseError, OSError)) or isinstance(error, UserError) or code in (401, 403, 404)


def _explained(shard: str, error: Exception) -> tuple[str, str]:
    """The cause of an error, and what to do about it."""
    code = hub.status(error) or retry.status(error)
    if tokens.signed(shard) and code in (400, 401, 403):
        if tokens.expired(shard) or re.search("expired", str(error), re.IGNORECASE):
            return "the signature has expired", "run the same command with a fresh URL"
        return f"a signature that is not accepted: {retry.cause(error)}", "run the same command with a fresh URL"
    if shard.startswith(hub.SCHEME) and code in (401, 403, 404):
        return f"HTTP {code}", hub.fix(split(shard)[0], code)
    unranged = isinstance(error, NotSupportedError)
    return "a server without range requests" if unranged else retry.cause(error), _fix(shard, error)


def _fix(shard: str, error: Exception) -> str:
    if "InvalidCertificate" in str(error):
        return "set SSL_CERT_FILE to a file with the authority's certificate"
    if retry.is_refusal(error):
        if shard.startswith("s3://"):
            return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket"
        if shard.startswith(BUCKETS):
            return "set the credentials of this bucket, see pipeline/data/remote.py"
        return f"make it readable without a login, or give its token by {tokens.VARIABLE}=host=token"
    return "check the URL, the network and the server"
