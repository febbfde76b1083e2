"""Codes that keep every logit by itself, 16 or 8 bits each."""

from dataclasses import dataclass

import numpy as np

from cache.codec.base import checked_codes, require_encodable


@dataclass(frozen=True)
class Fp16:
    """IEEE half precision, rounded to nearest even, little-endian: the original's C values, then the augmented's."""

    classes: int

    packed = False

    @property
    def row_bytes(self) -> int:
        return 4 * self.classes

    @property
    def config(self) -> dict:
        """JSON-safe; `from_config` gives an equal codec."""
        return {"name": "fp16", "format": 1, "classes": self.classes}

    def encode(self, logits: np.ndarray, dither_keys: np.ndarray) -> np.ndarray:
        """f32 (B, 2, C) -> u8 (B, row_bytes). Raises UserError for logits that are not finite or beyond ±65504."""
        require_encodable(logits, self.classes)
        return logits.astype("<f2").view(np.uint8).reshape(len(logits), self.row_bytes)

    def decode(self, codes: np.ndarray, dither_keys: np.ndarray) -> np.ndarray:
        """u8 (B, row_bytes) -> f32 (B, 2, C)."""
        return checked_codes(codes, self).view("<f2").astype(np.float32).reshape(-1, 2, self.classes)

    def pack(self, codes: np.ndarray, dither_keys: np.ndarray | None = None) -> bytes:
        """Their own bytes: exponents and signs aside they hold noise."""
        return checked_codes(codes, self).tobytes()

    def unpack(self, data: bytes, dither_keys: np.ndarray | None = None) -> np.ndarray:
        """What `pack` was given. Raises ValueError for bytes that are no codes."""
        return unpack_plain(data, self)


@dataclass(frozen=True)
class Int8:
    """8 bits a logit, symmetric about each vector's mid-range: x ≈ offset + scale · q, q in [-127, 127].

    offset = (max + min) / 2 and scale = (max - min) / 254 are kept as float32, so the error is at most scale / 2 plus
    their rounding; a constant vector is exact. A pair's codes are scale (2), offset (2), q (2, C).
    """

    classes: int

    packed = False

    @property
    def row_bytes(self) -> int:
        return self._pair.itemsize

    @property
    def config(self) -> dict:
        """JSON-safe; `from_config` gives an equal codec."""
        return {"name": "int8", "format": 1, "classes": self.classes}

    @property
    def _pair(self) -> np.dtype:
        return np.dtype([("scale", "<f4", (2,)), ("offset", "<f4", (2,)), ("q", "i1", (2, self.classes))])

    def encode(self, logits: np.ndarray, dither_keys: np.ndarray) -> np.ndarray:
        """f32 (B, 2, C) -> u8 (B, row_bytes). Raises UserError for logits that are not finite or beyond ±65504."""
        require_encodable(logits, self.classes)
        low, high = logits.min(axis=2).astype(np.float64), logits.max(axis=2).astype(np.float64)
        codes = np.empty(len(logits), self._pair)
        codes["scale"], codes["offset"] = (high - low) / 254, (high + low) / 2
        # q is taken against the float32 values that the decoder will see.
        scale, offset = codes["scale"].astype(np.float64), codes["offset"].astype(np.float64)
        q = np.rint((logits - offset[..., None]) / np.where(scale > 0, scale, 1)[..., None])
        codes["q"] = np.clip(q, -127, 127)
        return codes.view(np.uint8).reshape(len(logits), self.row_bytes)

    def decode(self, codes: np.ndarray, dither_keys: np.ndarray) -> np.ndarray:
        """u8 (B, row_bytes) -> f32 (B, 2, C), computed in float32."""
        fields = checked_codes(codes, self).view(self._pair)[:, 0]
        return fields["q"] * fields["scale"][..., None] + fields["offset"][..., None]

    def pack(self, codes: np.ndarray, dither_keys: np.ndarray | None = None) -> bytes:
        """Their own bytes: lossless stages win 5 to 12 %, and cost a plane its speed."""
        return checked_codes(codes, self).tobytes()

    def unpack(self, data: bytes, dither_keys: np.ndarray | None = None) -> np.ndarray:
        """What `pack` was given. Raises ValueError for bytes that are no codes."""
        return unpack_plain(data, self)


def unpack_plain(data: bytes, codec: Fp16 | Int8) -> np.ndarray:
    """Codes u8 (B, row_bytes) from their own bytes."""
    if len(data) % codec.row_bytes:
        raise ValueError(f"{len(data)} bytes are no codes of {codec.row_bytes}")
    return np.frombuffer(data, np.uint8).reshape(-1, codec.row_bytes)
