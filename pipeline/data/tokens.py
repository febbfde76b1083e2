"""Bearer tokens of hosts, and what becomes of signatures in URLs.

`JDA_BEARER_TOKENS` holds `host=token` or `host:port=token`, separated by blanks. A token goes to the host it is named
with, over TLS or to this machine itself, and follows no redirect to another one.
"""

import os
import re
import time
from datetime import datetime
from urllib.parse import parse_qs, urlsplit

from cache.errors import UserError

VARIABLE = "JDA_BEARER_TOKENS"


def headers(url: str) -> dict[str, str]:
    """What goes with requests to the host of an http(s) URL; UserError for a variable that cannot be read."""
    host = urlsplit(url).netloc.lower()
    for entry in os.environ.get(VARIABLE, "").split():
        name, _, token = entry.partition("=")
        if not name or not token:  # without its content, which may be a token
            raise UserError(f"{VARIABLE} cannot be read", expected="host=token, separated by blanks", fix="correct it")
        if name.lower() == host:
            return bearer(url, token)
    return {}


def bearer(url: str, token: str) -> dict[str, str]:
    """The header of a token; UserError where it would go through the network in the clear."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme != "https" and host not in ("localhost", "::1") and not host.startswith("127."):
        raise UserError("a token over plain http", found=f"http://{host}", expected="https://", fix="use https")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"the token for {host} is none", expected="letters, digits and marks", fix="copy it again")
    return {"Authorization": f"Bearer {token}"}


def signed(url: str) -> bool:
    """Is it an http(s) URL with a query, which is then taken for a signature?"""
    return url.startswith(("http://", "https://")) and "?" in url


def expired(url: str) -> bool:
    """Is the time over that the query of a signed URL names, in the manner of S3, Google, Azure or CloudFront?"""
    query = {name.lower(): values[0] for name, values in parse_qs(urlsplit(url).query).items()}
    try:
        for vendor in ("x-amz", "x-goog"):
            if f"{vendor}-date" in query:
                start = datetime.strptime(query[f"{vendor}-date"] + "+0000", "%Y%m%dT%H%M%SZ%z").timestamp()
                return start + float(query[f"{vendor}-expires"]) < time.time()
        if "se" in query:
            return datetime.fromisoformat(re.sub("Z$", "+00:00", query["se"])).timestamp() < time.time()
        return "expires" in query and float(query["expires"]) < time.time()
    except (KeyError, ValueError):
        return False
