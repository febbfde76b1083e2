"""Samples that could not be read or decoded while a run was going: skipped, named, counted, and never too many."""

import sys
import threading

from cache import UserError
from pipeline.data.index import BadSample, Index


class Skipped:
    """The samples that a run skips. Once skipped, a sample stays so, in every view and epoch of the run."""

    def __init__(self, index: Index, max_bad: float = 0.001):
        """`max_bad` is the largest share of the data set that may be skipped."""
        self.index = index
        self.limit = int(max_bad * index.usable)
        self.causes: dict[int, str] = {}
        self._lock = threading.Lock()

    def __contains__(self, row: int) -> bool:
        return row in self.causes

    def add(self, row: int, error: BadSample) -> None:
        """Skip `row` from now on, and say so on stderr. Raises UserError beyond the limit."""
        with self._lock:
            if row in self.causes:
                return
            self.causes[row] = str(error)
        print(f"skipped: {error}", file=sys.stderr)
        if len(self.causes) > self.limit:
            raise UserError(
                "too many samples cannot be read",
                found=f"{len(self.causes)}, the last: {error.brief}",
                expected=f"at most {self.limit} of {self.index.usable:,} (--max-bad)",
                fix="repair the shards, or prepare the data set again to quarantine them",
            )
