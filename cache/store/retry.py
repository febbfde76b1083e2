"""The client of object stores, requests to them that may fail for a while, and what their errors say.

Two layers retry. obstore (`CLIENT`) repeats requests that met a 5xx or 429, a broken connection or a time-out, and
resumes a broken body, but that only from servers that send an ETag. What it gives up on or does not see (a body broken
without ETag, a short body, an outage of seconds) is repeated by `patiently`.
"""

import random
import re
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from obstore.exceptions import NotSupportedError, PermissionDeniedError, UnauthenticatedError
from obstore.store import HTTPStore, from_url

if TYPE_CHECKING:
    from obstore.store import ObjectStore

TRIES, FIRST_WAIT_S, MAX_WAIT_S = 7, 0.25, 8.0  # waits double: a server that is down costs some 15 s
PATIENCE_S = 60  # no try begins later, so that a server that hangs is given up as well
CLIENT: dict[str, Any] = {
    "client_options": {
        "allow_http": True,
        "connect_timeout": timedelta(seconds=10),
        "read_timeout": timedelta(seconds=20),  # without a single byte
        "timeout": timedelta(seconds=300),
    },
    "retry_config": {
        "max_retries": 3,
        "retry_timeout": timedelta(seconds=PATIENCE_S),
        "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=1)},
    },
}

_jitter = random.Random()  # the shared generator is the training's
_T = TypeVar("_T")


def client(url: str, headers: dict[str, str] | None = None) -> "ObjectStore":
    """The client of what lies below a URL, of shards and of stores alike: s3://, gs://, az:// or http(s)://.

    An http(s) URL may have a query, which goes with every request, and so do `headers`; neither follows a redirect to
    another host.

    Raises what obstore does for a URL, or credentials, that it cannot use.
    """
    # from_url would take https://….amazonaws.com for S3 and then want credentials.
    if not url.startswith(("http://", "https://")):
        return from_url(url, **CLIENT)
    options = CLIENT["client_options"] | ({"default_headers": headers} if headers else {})
    return HTTPStore(url, client_options=options, retry_config=CLIENT["retry_config"])


class GaveUp(Exception):
    """The last `error` of a request that was tried `tries` times."""

    def __init__(self, error: Exception, tries: int):
        super().__init__(str(error))
        self.error, self.tries = error, tries


def patiently(request: Callable[[], _T], hopeless: Callable[[Exception], bool]) -> _T:
    """`request()`, repeated with growing waits while its error may pass.

    Raises GaveUp for an error that is `hopeless`, that refuses for good (`is_final`), or that stays.
    """
    start, tries = time.monotonic(), 0
    while True:
        try:
            return request()
        except Exception as error:
            tries += 1
            late = tries == TRIES or time.monotonic() - start > PATIENCE_S
            if late or hopeless(error) or is_final(error):
                raise GaveUp(error, tries) from None
        # Half of it random: workers that failed together should not come back together.
        time.sleep(min(FIRST_WAIT_S * 2 ** (tries - 1), MAX_WAIT_S) * _jitter.uniform(0.5, 1))


def status(error: Exception) -> int | None:
    """HTTP status in an error of obstore's, which has it in its text alone."""
    match = re.search(r"status code: ([0-9]{3})", str(error))
    return int(match[1]) if match else None


def is_refusal(error: Exception) -> bool:
    """Is it for want of the right to do so?"""
    return isinstance(error, (PermissionDeniedError, UnauthenticatedError)) or _no_credentials(error)


def is_final(error: Exception) -> bool:
    """Would the same request fail again?"""
    code = status(error) or 0
    kinds = (FileNotFoundError, NotSupportedError)
    return isinstance(error, kinds) or is_refusal(error) or (300 <= code < 500 and code not in (408, 429))


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
    if found := re.search(r"InvalidCertificate\(\s*(\w+)", text):
        return f"a certificate that is not trusted ({found[1]})"
    if found := re.search(r"<Code>(\w+)</Code>", text):
        return found[1]
    if found := re.search(r"status code: ([0-9]{3}[A-Za-z \-]*)", text):
        hint = ": no such object, or no such bucket" if isinstance(error, FileNotFoundError) else ""
        return f"HTTP {found[1].strip()}{hint}"
    if "TimedOut" in text:
        return "time-out"
    if messages := re.findall(r'(?:message|error): "([^"\n]+)"', text):
        return messages[-1]  # the innermost
    if "IncompleteBody" in text:
        return "connection closed within the body"
    return text.partition("\n")[0]
