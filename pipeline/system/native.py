"""What C libraries say on descriptor 2, kept apart from what this program says."""

import os
import sys
import tempfile


class NativeStderr:
    """Within `with`, what is written to descriptor 2 is held back; `sys.stderr` goes where it went before.

    What nobody took with `read` is written to stderr at the end. One at a time, for it is the whole process's.
    """

    def __enter__(self) -> "NativeStderr":
        self._taken = 0
        self._held = tempfile.TemporaryFile()
        self._python = sys.stderr
        self._python.flush()
        try:
            self._before = os.dup(2)
        except OSError:  # nobody listens
            self._before = None
            return self
        if self._writes_to_descriptor():
            sys.stderr = os.fdopen(os.dup(self._before), "w", 1, self._python.encoding, self._python.errors)
        os.dup2(self._held.fileno(), 2)
        return self

    def _writes_to_descriptor(self) -> bool:
        try:
            return self._python.fileno() == 2
        except (OSError, ValueError, AttributeError):
            return False

    def read(self) -> str:
        """What was written since the last time."""
        text = os.pread(self._held.fileno(), os.fstat(self._held.fileno()).st_size - self._taken, self._taken)
        self._taken += len(text)
        return text.decode("utf-8", "replace")

    def __exit__(self, *_) -> None:
        if self._before is not None:
            os.dup2(self._before, 2)
            os.close(self._before)
        if sys.stderr is not self._python:
            sys.stderr.close()
            sys.stderr = self._python
        if rest := self.read():
            print(rest, end="", file=sys.stderr, flush=True)
        self._held.close()
