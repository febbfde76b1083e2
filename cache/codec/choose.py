"""Codecs: how a pair of logit vectors becomes one row of bytes and back.

A codec codes pairs (original and augmented view of one sample): ``encode(logits, stream)`` gives rows of exactly
``row_bytes`` bytes, ``decode(rows, stream)`` the logits. ``stream`` u64 (B,) is the row's dither key; codecs without
dither take no notice of it. Codecs are equal if their ``config`` is.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cache import fitting, subspace
from cache.checks import MAX_CLASSES, checked_rows, require_encodable
from cache.errors import UserError
from cache.fidelity import drift
from cache.subspace import Subspace

DEFAULT_BUDGET = 0.05
"""Nats of KL(T = 4) per vector."""


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

    def encode(self, logits: np.ndarray, stream: np.ndarray) -> np.ndarray:
        """f32 (B, 2, C) -> u8 (B, row_bytes). Raises UserError for logits that are not finite or beyond ±65504."""
        require_encodable(logits, self.classes)
        return logits.astype("<f2").view(np.uint8).reshape(len(logits), self.row_bytes)

    def decode(self, rows: np.ndarray, stream: np.ndarray) -> np.ndarray:
        """u8 (B, row_bytes) -> f32 (B, 2, C)."""
        return checked_rows(rows, self).view("<f2").astype(np.float32).reshape(-1, 2, self.classes)

    def pack(self, rows: np.ndarray, stream: np.ndarray | None = None) -> bytes:
        """The rows' own bytes: exponents and signs aside they hold noise."""
        return checked_rows(rows, self).tobytes()

    def unpack(self, data: bytes, stream: np.ndarray | None = None) -> np.ndarray:
        """What `pack` was given. Raises ValueError for bytes that are no rows."""
        return unpack_plain(data, self)


@dataclass(frozen=True)
class Int8:
    """8 bits a logit, symmetric about each vector's mid-range: x ≈ offset + scale · q, q in [-127, 127].

    offset = (max + min) / 2 and scale = (max - min) / 254 are kept as float32, so the error is at most scale / 2 plus
    their rounding; a constant vector is exact. A row is scale (2), offset (2), q (2, C), original before augmented.
    """

    classes: int

    packed = False

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
        require_encodable(logits, self.classes)
        low, high = logits.min(axis=2).astype(np.float64), logits.max(axis=2).astype(np.float64)
        rows = np.empty(len(logits), self._row)
        rows["scale"], rows["offset"] = (high - low) / 254, (high + low) / 2
        # q is taken against the float32 values that the decoder will see.
        scale, offset = rows["scale"].astype(np.float64), rows["offset"].astype(np.float64)
        q = np.rint((logits - offset[..., None]) / np.where(scale > 0, scale, 1)[..., None])
        rows["q"] = np.clip(q, -127, 127)
        return rows.view(np.uint8).reshape(len(logits), self.row_bytes)

    def decode(self, rows: np.ndarray, stream: np.ndarray) -> np.ndarray:
        """u8 (B, row_bytes) -> f32 (B, 2, C), computed in float32."""
        fields = checked_rows(rows, self).view(self._row)[:, 0]
        return fields["q"] * fields["scale"][..., None] + fields["offset"][..., None]

    def pack(self, rows: np.ndarray, stream: np.ndarray | None = None) -> bytes:
        """The rows' own bytes: lossless stages win 5 to 12 %, and cost a plane its speed."""
        return checked_rows(rows, self).tobytes()

    def unpack(self, data: bytes, stream: np.ndarray | None = None) -> np.ndarray:
        """What `pack` was given. Raises ValueError for bytes that are no rows."""
        return unpack_plain(data, self)


Codec = Fp16 | Int8 | Subspace

_PLAIN: dict[str, type[Fp16 | Int8]] = {"fp16": Fp16, "int8": Int8}
NAMES = (*_PLAIN, "subspace")
_KEYS = {"subspace": subspace.CONFIG_KEYS}
_FIX = "choose one of these, or read the store with the version that wrote it"


def make(name: str, **params) -> Codec:
    """The codec `name` from its parameters: fp16 and int8 take `classes`, subspace what its config holds.

    Raises UserError as `from_config` does.
    """
    return from_config({"name": name, "format": 1, **params})


def fit(name: str, logits: np.ndarray, **params) -> Codec:
    """The codec `name` for a teacher whose logits are f32 (n, 2, C) on pairs drawn at random from the data.

    subspace takes `kl`, the mean KL(T = 4) in nats that its noise may cause. Raises UserError if the logits do not
    suffice.
    """
    if name != "subspace":
        return make(name, classes=logits.shape[2], **params)
    return fitting.fit(logits, **params)


def auto(logits: np.ndarray, kl_budget: float = DEFAULT_BUDGET) -> Codec:
    """The codec of the fewest bytes on disk that is unbiased and within `kl_budget` on held-out pairs.

    `logits` f32 (n, 2, C) of pairs drawn at random from the data; the last quarter is held out. Raises UserError for a
    budget that is not positive.
    """
    fitting.require_budget(kl_budget)
    if not len(logits):
        raise UserError("no pairs to choose a codec by", fix="check the data set")
    held = logits[-max(len(logits) - fitting.held_out(len(logits)), 1) :]
    stream = np.arange(len(held), dtype=np.uint64)
    best, fewest = None, math.inf
    for codec in _candidates(logits, kl_budget):
        rows = codec.encode(held, stream)
        size = len(codec.pack(rows, stream))
        good = isinstance(codec, Fp16) or not drift(codec, held, rows, stream).beyond(kl_budget)
        if good and size < fewest:
            best, fewest = codec, size
    assert best is not None
    return best


def _candidates(logits: np.ndarray, kl: float) -> Iterator[Codec]:
    for name in _PLAIN:
        yield make(name, classes=logits.shape[2])
    if len(logits) >= fitting.MIN_PAIRS and logits.shape[2] > 1:
        with contextlib.suppress(UserError):  # it cannot keep these logits so well
            yield fitting.fit(logits, kl)


def from_config(config: object, where: str = "codec") -> Codec:
    """The codec of a config from outside, every value checked. Raises UserError naming the key."""
    name = config.get("name") if isinstance(config, dict) else None
    keys = _KEYS.get(name, ("classes",)) if isinstance(name, str) else ("classes",)
    if not isinstance(config, dict) or config.keys() != {"name", "format", *keys}:
        found = sorted(map(str, config)) if isinstance(config, dict) else repr(config)
        expected = f"a mapping of {', '.join(('name', 'format', *keys))}"
        raise UserError(where, found=f"{found!s:.200}", expected=expected, fix=_FIX)
    if not isinstance(name, str) or name not in NAMES:
        raise UserError(f"{where}: unknown name", found=f"{name!r:.80}", expected=" or ".join(NAMES), fix=_FIX)
    version, classes = config["format"], config["classes"]
    if type(version) is not int or version != 1:
        raise UserError(f"{where}: unknown format of {name}", found=f"{version!r:.80}", expected=1, fix=_FIX)
    if name == "subspace":
        return subspace.from_config(config, where)
    if type(classes) is not int or not 1 <= classes <= MAX_CLASSES:
        expected = f"a whole number in [1, {MAX_CLASSES}]"
        raise UserError(f"{where}: classes", found=f"{classes!r:.80}", expected=expected, fix=_FIX)
    return _PLAIN[name](classes)


def unpack_plain(data: bytes, codec: Fp16 | Int8) -> np.ndarray:
    """Rows u8 (B, row_bytes) from their own bytes."""
    if len(data) % codec.row_bytes:
        raise ValueError(f"{len(data)} bytes are no rows of {codec.row_bytes}")
    return np.frombuffer(data, np.uint8).reshape(-1, codec.row_bytes)
