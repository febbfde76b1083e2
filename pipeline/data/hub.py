"""Files of data sets on the Hugging Face Hub: hf://datasets/OWNER/NAME[@REVISION]/PATH.

`HF_TOKEN` (or a login) and `HF_ENDPOINT` are those of huggingface_hub, which lists the files. What is in them is read
by ranges, as from any other host.
"""

import os
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from cache.errors import UserError
from pipeline.data import tokens

SCHEME = "hf://"
_ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/@\s]+))?(?:/(.*))?", re.DOTALL)
_LIBRARY = "pip install huggingface_hub"


def split(address: str) -> tuple[str, str]:
    """hf://… -> (hf://datasets/OWNER/NAME[@REVISION], path below it); UserError for another form."""
    found = _ADDRESS.fullmatch(address)
    if not found:
        expected = "hf://datasets/OWNER/NAME/FILES, or OWNER/NAME@REVISION"
        raise UserError("not an address of a data set on the Hub", found=address, expected=expected, fix="correct it")
    return address[: found.start(3)].rstrip("/") if found[3] is not None else address, found[3] or ""


def place(root: str) -> tuple[str, dict[str, str]]:
    """Where the files below hf://datasets/OWNER/NAME[@REVISION] are read, and the headers that go with it."""
    name, revision = _named(root)
    url = f"{endpoint()}/datasets/{name}/resolve/{quote(revision, safe='')}"
    token = _token()
    return url, tokens.bearer(url, token) if token else {}


def endpoint() -> str:
    """The server, without a slash at its end."""
    found = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", found):
        raise UserError("unusable HF_ENDPOINT", found=found, expected="https://HOST", fix="correct or unset it")
    return found


def listed(root: str) -> Callable[[], list[str]]:
    """A request for the paths of all files of a data set; it raises what huggingface_hub raises."""
    hub = _library()
    name, revision = _named(root)
    token = _token()
    if token:
        tokens.bearer(endpoint(), token)  # its UserError
    api = hub.HfApi(endpoint=endpoint(), token=token or False)
    return lambda: api.list_repo_files(name, repo_type="dataset", revision=revision)


def status(error: Exception) -> int | None:
    """The HTTP status in an error of huggingface_hub."""
    return getattr(getattr(error, "response", None), "status_code", None)


def fix(root: str, code: int | None) -> str:
    """What to do about a refusal."""
    name, _ = _named(root)
    page = f"{endpoint()}/datasets/{name}"
    if code == 403:
        return f"accept the data set's terms at {page} with the account that HF_TOKEN is of"
    if code == 401:
        return f"accept the data set's terms at {page}, if it has any, and set HF_TOKEN to a token that may read it"
    return f"check that {page} is there; a private one needs HF_TOKEN"


def _named(root: str) -> tuple[str, str]:
    found = _ADDRESS.fullmatch(root)
    assert found, root
    return found[1], found[2] or "main"


def _token() -> str | None:
    """As huggingface_hub finds it; without that library the variable alone."""
    if token := os.environ.get("HF_TOKEN", "").strip():
        return token
    try:
        from huggingface_hub import get_token
    except ImportError:
        return None
    return get_token()


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        expected = "{braces} instead of wildcards, or huggingface_hub"
        raise UserError("the Hub cannot be listed", expected=expected, fix=_LIBRARY) from None
    return huggingface_hub
