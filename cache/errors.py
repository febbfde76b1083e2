"""The one error type for users; it lives in the lowest layer so that every layer can raise it."""


class UserError(ValueError):
    """A wrong input, shown as one line: ``what; found X, expected Y; fix: Z``. The command line exits with 2."""

    def __init__(self, what: str, *, found: object = None, expected: object = None, fix: str | None = None):
        facts = [f"{name} {value}" for name, value in (("found", found), ("expected", expected)) if value is not None]
        parts = [what, ", ".join(facts), f"fix: {fix}" if fix else ""]
        super().__init__("; ".join(part for part in parts if part))
