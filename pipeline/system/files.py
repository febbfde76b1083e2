"""Files that are there whole or not at all."""

import os
from pathlib import Path

from cache import UserError


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that a kill or a full disk leaves the old one or the new one, whole."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}", found=error.strerror, fix="free space or mend the path") from None
