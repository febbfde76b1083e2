"""What a user may write for a place: a path, file:, or a URL that is read; all else is refused as unknown."""

import os
import re
from urllib.parse import unquote

from cache.errors import UserError
from pipeline.data.remote import is_remote


def resolved(address: str) -> str:
    """A path or a URL. A file of just that name goes first; UserError for another kind of address."""
    if os.path.lexists(address) or is_remote(address):
        return address
    if address.startswith("file://"):
        rest = address.removeprefix("file://")
        host, slash, path = rest.partition("/")
        if slash and host in ("", "localhost"):
            return "/" + (path if os.path.lexists("/" + path) else unquote(path))
        raise _unknown(address)
    if address.startswith("file:"):
        return address.removeprefix("file:")
    if "::" in address or re.match(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://", address):
        raise _unknown(address)
    return os.path.expanduser(address)


def local(address: str) -> str:
    """`resolved`, for what reads folders of this machine only."""
    if is_remote(address):
        raise UserError("a source that lies on another machine", found=address, expected="a path", fix="fetch it first")
    return resolved(address)


def _unknown(address: str) -> UserError:
    return UserError(
        "an unknown kind of address",
        found=address,
        expected="a path, file:/path, s3://, gs:// or az://bucket/key, hf://datasets/…, or http(s)://host/path",
        fix="fetch the files, or serve them by one of these",
    )
