"""The one error type for users; it lives in the lowest layer so that every layer can raise it."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A wrong input, shown as one line: ``what; found X, expected Y; fix: Z``. The command line exits with 2."""

    def __init__(self, what: str, *, found: object = None, expected: object = None, fix: str | None = None):
        facts = [f"{name} {value}" for name, value in (("found", found), ("expected", expected)) if value is not None]
        parts = [what, ", ".join(facts), f"fix: {fix}" if fix else ""]
        super().__init__("; ".join(part for part in parts if part))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean X?`, or the list of what is known if nothing comes near."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(known)}"
