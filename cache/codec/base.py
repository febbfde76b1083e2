"""What every codec demands of logits and codes.

Codes are encoded labels, u8 (B, row_bytes), a pair's to each of B. Rows are rows of the index, and nothing else but in
`row_bytes`: programs of others ask codecs for it by that name.

The axis order, here and everywhere: what is said of samples is (B, 2, …), original before augmented, such as logits,
features and energies of labels. A pair is stored, drawn and gathered as one, so its two halves lie side by side. What
goes through a network is (2, B, …), such as pixels and a student's logits: without a copy it is one batch of 2B, all
originals first, and each view's part of it is contiguous.
"""

import math
import mmap
from typing import Protocol

import numpy as np

from cache.errors import UserError
from cache.outside import anything, record, require

MAX_CLASSES = 1 << 20
FIX = "choose one of these, or read the store with the version that wrote it"
RESTORE = "restore the store from a copy"
MAX_LOGIT = 65504.0  # the largest finite float16; every codec refuses more, so that changing codecs is always safe


class Code(Protocol):
    """What a codec offers; see the head of `cache.codec.choose`."""

    @property
    def row_bytes(self) -> int: ...
    def encode(self, given: np.ndarray, dither_keys: np.ndarray, /) -> np.ndarray: ...
    def decode(self, codes: np.ndarray, dither_keys: np.ndarray) -> np.ndarray: ...
    def pack(self, codes: np.ndarray, dither_keys: np.ndarray | None = None) -> bytes: ...


def require_encodable(logits: np.ndarray, classes: int, what: str = "logit") -> None:
    """Raise UserError unless logits f32 (B, 2, C) are finite and within ±65504."""
    if logits.dtype != np.float32 or logits.ndim != 3 or logits.shape[1:] != (2, classes):
        raise ValueError(f"expected {what}s f32 (B, 2, {classes}), got {logits.dtype} {logits.shape}")
    if np.abs(logits).max(initial=0) <= MAX_LOGIT:  # NaN compares false
        return
    bad = ~(np.abs(logits) <= MAX_LOGIT)
    value = logits[bad][0]
    raise UserError(
        f"a teacher's {what} is {f'beyond ±{MAX_LOGIT:.0f}' if np.isfinite(value) else 'not finite'}",
        found=f"{value} ({bad.any(axis=(1, 2)).sum()} of {len(logits)} samples of the batch)",
        expected=f"numbers in ±{MAX_LOGIT:.0f}",
        fix="check the teacher's weights and its input normalisation",
    )


def require_keys(config: object, where: str, name: str, formats: tuple[int, ...], keys: tuple[str, ...]) -> dict:
    """A config from outside as a mapping of the keys of this codec in one of these formats. Raises UserError."""
    found = record(config, where, FIX, dict.fromkeys(("name", "format", *keys), (anything,)))
    require(found["name"] == name, found["name"], f"{where}: unknown name", FIX, name)
    known = type(found["format"]) is int and found["format"] in formats
    require(known, found["format"], f"{where}: unknown format of {name}", FIX, " or ".join(map(str, formats)))
    return found


def checked_codes(codes: np.ndarray, codec: "Code") -> np.ndarray:
    """Codes u8 (B, row_bytes), contiguous; ValueError for anything else."""
    if codes.dtype != np.uint8 or codes.ndim != 2 or codes.shape[1] != codec.row_bytes:
        raise ValueError(f"expected codes u8 (B, {codec.row_bytes}), got {codes.dtype} {codes.shape}")
    return np.ascontiguousarray(codes)


def checked_keys(dither_keys: np.ndarray, pairs: int) -> np.ndarray:
    """Dither keys u64 (B,), one per pair; ValueError for anything else."""
    if dither_keys.dtype != np.uint64 or dither_keys.shape != (pairs,):
        raise ValueError(f"expected dither keys u64 ({pairs},), got {dither_keys.dtype} {dither_keys.shape}")
    return np.ascontiguousarray(dither_keys)


def untouched(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros, u8, of pages that the system hands out as they are written: a count that lies costs no memory.

    np.zeros gives no such pages where malloc keeps what was freed.
    """
    size = math.prod(shape)
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8, size).reshape(shape)
