"""The one error type for users; it lives in the lowest layer so that every layer can raise it."""

import difflib
import re
from collections.abc import Iterable

_MOST = {"what": 500, "found": 600, "expected": 400, "fix": 800}
"""Characters of each part: names and values from a file may be of any length."""


class UserError(ValueError):
    """A wrong input, shown as one line: ``what; found X, expected Y; fix: Z``. The command line exits with 2.

    Whatever a part holds, it is printable, on one line and short.
    """

    def __init__(self, what: str, *, found: object = None, expected: object = None, fix: str | None = None):
        facts = [
            f"{name} {_short(name, value)}"
            for name, value in (("found", found), ("expected", expected))
            if value is not None
        ]
        parts = [_short("what", what), ", ".join(facts), f"fix: {_short('fix', fix)}" if fix else ""]
        super().__init__("; ".join(part for part in parts if part))
        self.brief = parts[0] if found is None else f"{parts[0]}: {_short('found', found)}"
        """What, and what was found: for the line of another error that tells of this one."""


def redacted(text: str) -> str:
    """A text without what URLs in it keep secret: the query, which may be a signature, and the user."""
    text = re.sub(r"(https?://[^\s?'\"<>]+)\?\S*[^\s;,.:)\]'\"]", r"\1?…", text)
    return re.sub(r"(\w+://)[^\s/?#@]+@", r"\1…@", text)


def _short(part: str, value: object) -> str:
    """The text without secrets, line breaks and control characters, and without its middle if it is long."""
    text, most = redacted(re.sub(r"\s+", " ", str(value))), _MOST[part]
    if len(text) > most:
        text = f"{text[: most * 2 // 3]} … {text[-most // 4 :]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean X?`, or the list of what is known if nothing comes near."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(known)}"
