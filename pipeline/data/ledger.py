"""What became of every file of a source: found = used + quarantined + left out.

A source tells its one ledger of each file that it meets (`meet`), and once what becomes of it (`use` or `leave`); what
turns out damaged later moves from used to quarantined. `close` holds the two counts against each other, so that no
category can be forgotten. A file is a file of a folder or a member of a tar; folders are none.
"""

import os
from collections import Counter
from typing import NamedTuple

_EXAMPLES = 3


class Flaw(NamedTuple):
    """Why a sample cannot be used."""

    cause: str
    """The kind, by which flaws are counted."""
    found: str = ""
    """What was there instead, of this sample alone."""

    def __str__(self) -> str:
        return f"{self.cause}, found {self.found}" if self.found else self.cause


class _Left:
    def __init__(self):
        self.kinds: Counter[str] = Counter()
        self.examples: list[str] = []


class Ledger:
    """Counts files. Not thread-safe: one thread tells at a time."""

    def __init__(self):
        self.found = self.used = 0
        self.quarantined: Counter[str] = Counter()
        """Files by cause."""
        self._left: dict[str, _Left] = {}

    def meet(self, files: int = 1) -> None:
        """So many files are there; `use` or `leave` must follow for each."""
        self.found += files

    def use(self, files: int = 1) -> None:
        """They are a sample's."""
        self.used += files

    def leave(self, place: str, reason: str, *, kind: str | None = None, files: int = 1) -> None:
        """They are left out. `kind` is their extension unless it is given; of `place`, a name, the first are shown."""
        left = self._left.setdefault(reason, _Left())
        left.kinds[kind_of(place) if kind is None else kind] += files
        if len(left.examples) < _EXAMPLES:
            left.examples.append(place)

    def quarantine(self, cause: str, files: int) -> None:
        """So many of the used files are of no use after all."""
        self.used -= files
        self.quarantined[cause] += files

    @property
    def left_out(self) -> Counter[str]:
        """Files by reason."""
        return Counter({reason: left.kinds.total() for reason, left in self._left.items()})

    def close(self) -> None:
        """Hold the identity: whatever was met has become something."""
        settled = self.used + self.quarantined.total() + self.left_out.total()
        assert self.found == settled, f"{self.found} files found, {settled} accounted for"

    def __str__(self) -> str:
        return (
            f"{self.found:,} found = {self.used:,} used + {self.quarantined.total():,} quarantined"
            f" + {self.left_out.total():,} left out"
        )

    def lines(self) -> list[str]:
        """Each reason for leaving files out, with kinds and first examples, the most frequent first."""
        return [
            "{:,} {}: {} ({}{})".format(
                count,
                reason,
                ", ".join(f"{number:,} {kind}" for kind, number in self._left[reason].kinds.most_common()),
                ", ".join(map(repr, self._left[reason].examples)),
                ", …" if count > len(self._left[reason].examples) else "",
            )
            for reason, count in self.left_out.most_common()
        ]

    def to_json(self) -> dict:
        """JSON-safe: the identity's terms, and the files left out by reason and kind."""
        return {
            "found": self.found,
            "used": self.used,
            "quarantined": dict(self.quarantined.most_common()),
            "left_out": {reason: dict(left.kinds.most_common()) for reason, left in self._left.items()},
        }


def kind_of(name: str) -> str:
    """A file's extension in lower case, without its dot."""
    return os.path.splitext(os.path.basename(name))[1][1:].lower() or "without extension"
