"""Codecs: how a pair of logit vectors becomes one row of bytes and back.

A codec codes pairs (original and augmented view of one sample): ``encode(logits, stream)`` gives rows of exactly
``row_bytes`` bytes, ``decode(rows, stream)`` the logits. ``stream`` u64 (B,) is the row's dither key; codecs without
dither take no notice of it. Codecs are equal if their ``config`` is.
"""

from dataclasses import dataclass

import numpy as np

from cache.errors import UserError

MAX_CLASSES = 1 << 20
MAX_LOGIT = 65504.0  # the largest finite float16; every codec refuses more, so that changing codecs is always safe


@dataclass(frozen=True)
class Fp16:
    """IEEE half precision, rounded to nearest even, little-endian: the original's C values, then the augmented's."""

    classes: int

    @property
    def row_bytes(self) -> int:
        return 4 * self.classes

    @property
    def config(self) -> dict:
        """JSON-safe; `from_config` gives an equal codec."""
        return {"name": "fp16", "format": 1, "classes": self.classes}

    def encode(self, logits: np.ndarray, stream: np.ndarray) -> np.ndarray:
        """f32 (B, 2, C) -> u8 (B, row_bytes). Raises UserError for logits that are not finite or beyond ±65504."""
        _require_encodable(logits, self.classes)
        return logits.astype("<f2").reshape(len(logits), -1).view(np.uint8)

    def decode(self, rows: np.ndarray, stream: np.ndarray) -> np.ndarray:
        """u8 (B, row_bytes) -> f32 (B, 2, C)."""
        return _checked_rows(rows, self).view("<f2").astype(np.float32).reshape(-1, 2, self.classes)


@dataclass(frozen=True)
class Int8:
    """8 bits a logit, symmetric about each vector's mid-range: x ≈ offset + scale · q, q in [-127, 127].

    offset = (max + min) / 2 and scale = (max - min) / 254 are kept as float32, so the error is at most scale / 2 plus
    their rounding; a constant vector is exact. A row is scale (2), offset (2), q (2, C), original before augmented.
    """

    classes: int

    @property
    def row_bytes(self) -> int:
        return self._row.itemsize

    @property
    def config(self) -> dict:
        """JSON-safe; `from_config` gives an equal codec."""
        return {"name": "int8", "format": 1, "classes": self.classes}

    @property
    def _row(self) -> np.dtype:
        return np.dtype([("scale", "<f4", (2,)), ("offset", "<f4", (2,)), ("q", "i1", (2, self.classes))])

    def encode(self, logits: np.ndarray, stream: np.ndarray) -> np.ndarray:
        """f32 (B, 2, C) -> u8 (B, row_bytes). Raises UserError for logits that are not finite or beyond ±65504."""
        _require_encodable(logits, self.classes)
        low, high = logits.min(axis=2).astype(np.float64), logits.max(axis=2).astype(np.float64)
        rows = np.empty(len(logits), self._row)
        rows["scale"], rows["offset"] = (high - low) / 254, (high + low) / 2
        # q is taken against the float32 values that the decoder will see.
        scale, offset = rows["scale"].astype(np.float64), rows["offset"].astype(np.float64)
        q = np.rint((logits - offset[..., None]) / np.where(scale > 0, scale, 1)[..., None])
        rows["q"] = np.clip(q, -127, 127)
        return rows.view(np.uint8).reshape(len(logits), -1)

    def decode(self, rows: np.ndarray, stream: np.ndarray) -> np.ndarray:
        """u8 (B, row_bytes) -> f32 (B, 2, C), computed in float32."""
        fields = _checked_rows(rows, self).view(self._row)[:, 0]
        return fields["q"] * fields["scale"][..., None] + fields["offset"][..., None]


Codec = Fp16 | Int8

_CODECS: dict[str, type[Codec]] = {"fp16": Fp16, "int8": Int8}
_FIX = "choose one of these, or read the store with the version that wrote it"


def make(name: str, **params) -> Codec:
    """The codec `name` (fp16 or int8); its one parameter is `classes`. Raises UserError as `from_config` does."""
    return from_config({"name": name, "format": 1, **params})


def from_config(config: object, where: str = "codec") -> Codec:
    """The codec of a config from outside, every value checked. Raises UserError naming the key."""
    if not isinstance(config, dict) or config.keys() != {"name", "format", "classes"}:
        found = sorted(map(str, config)) if isinstance(config, dict) else repr(config)
        raise UserError(where, found=found, expected="a mapping of name, format, classes", fix=_FIX)
    name, version, classes = config["name"], config["format"], config["classes"]
    if not isinstance(name, str) or name not in _CODECS:
        raise UserError(f"{where}: unknown name", found=repr(name), expected=" or ".join(_CODECS), fix=_FIX)
    if type(version) is not int or version != 1:
        raise UserError(f"{where}: unknown format of {name}", found=repr(version), expected=1, fix=_FIX)
    if type(classes) is not int or not 1 <= classes <= MAX_CLASSES:
        expected = f"a whole number in [1, {MAX_CLASSES}]"
        raise UserError(f"{where}: classes", found=repr(classes), expected=expected, fix=_FIX)
    return _CODECS[name](classes)


def _require_encodable(logits: np.ndarray, classes: int) -> None:
    if logits.dtype != np.float32 or logits.ndim != 3 or logits.shape[1:] != (2, classes):
        raise ValueError(f"expected logits f32 (B, 2, {classes}), got {logits.dtype} {logits.shape}")
    bad = ~(np.abs(logits) <= MAX_LOGIT)  # NaN compares false
    if bad.any():
        value = logits[bad][0]
        what = (
            f"a teacher's logit is beyond ±{MAX_LOGIT:.0f}" if np.isfinite(value) else "a teacher's logit is not finite"
        )
        raise UserError(
            what,
            found=f"{value} ({bad.any(axis=(1, 2)).sum()} of {len(logits)} samples of the batch)",
            expected=f"numbers in ±{MAX_LOGIT:.0f}",
            fix="check the teacher's weights and its input normalisation",
        )


def _checked_rows(rows: np.ndarray, codec: Codec) -> np.ndarray:
    if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != codec.row_bytes:
        raise ValueError(f"expected rows u8 (B, {codec.row_bytes}), got {rows.dtype} {rows.shape}")
    return np.ascontiguousarray(rows)
