"""The C library's allocator, told to keep the memory of activations for the next batch."""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEPT = 1 << 30
"""Bytes that the heap may keep free at its end; larger blocks are no part of it, and go back to the kernel at once."""
_OLDER = 32 << 20
"""The largest threshold that older versions of glibc take for blocks outside the heap."""


def keep_freed() -> bool:
    """Let glibc keep what is freed, up to `_KEPT`; whether it was told so.

    By default it returns large blocks to the kernel, which clears every page of the next one. Nothing is done for
    another allocator, or if MALLOC_* or GLIBC_TUNABLES say that the user has chosen.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        libc, process = ctypes.CDLL("libc.so.6"), ctypes.CDLL(None)
        ours, used = (ctypes.cast(library.malloc, ctypes.c_void_p).value for library in (libc, process))
        # Another malloc may have been loaded before it, which takes these calls for nothing, or has them otherwise.
        if ours != used:
            return False
        if not libc.mallopt(_M_MMAP_THRESHOLD, _KEPT):
            libc.mallopt(_M_MMAP_THRESHOLD, _OLDER)
        return bool(libc.mallopt(_M_TRIM_THRESHOLD, _KEPT))
    except (OSError, AttributeError):  # not glibc
        return False
