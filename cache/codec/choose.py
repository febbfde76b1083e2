"""Which code: by name, by configuration, or the smallest within a budget.

A codec codes pairs (original and augmented view of one sample): ``encode(logits, dither_keys)`` gives
codes u8 (B, row_bytes), ``decode(codes, dither_keys)`` the logits. ``dither_keys`` u64 (B,) are the pairs'; codecs
without dither take no notice of them. Codecs are equal if their ``config`` is.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from cache.codec import features, fitting, subspace
from cache.codec.base import FIX, MAX_CLASSES, require_keys
from cache.codec.dense import Fp16, Int8
from cache.codec.features import Features
from cache.codec.fidelity import TEMPERATURE, drift
from cache.codec.subspace import Subspace
from cache.errors import UserError
from cache.outside import require, whole

DEFAULT_BUDGET = 0.05
"""Nats of KL per vector, at the temperature that the code is for."""


Codec = Fp16 | Int8 | Subspace | Features

_PLAIN: dict[str, type[Fp16 | Int8]] = {"fp16": Fp16, "int8": Int8}
_FITTED = {"subspace": subspace, "features": features}
NAMES = (*_PLAIN, "subspace")
"""Of the codes of logits; `features` is the one of features."""


def make(name: str, **params) -> Codec:
    """The codec `name` from its parameters: fp16 and int8 take `classes`, subspace what its config holds.

    Raises UserError as `from_config` does.
    """
    return from_config({"name": name, "format": 1, **params})


def fit(name: str, logits: np.ndarray, **params) -> Codec:
    """The codec `name` for a teacher whose logits are f32 (n, 2, C) on pairs drawn at random from the data.

    subspace takes `kl`, the mean KL in nats that its noise may cause at `temperature` (4). features takes features f32
    (n, 2, F) in the place of logits, and the head's `weight` and `bias` with them. Raises UserError if what is given
    does not suffice.
    """
    if name == "features":
        return features.fit(logits, **params)
    return fitting.fit(logits, **params) if name == "subspace" else make(name, classes=logits.shape[2], **params)


def auto(logits: np.ndarray, kl_budget: float = DEFAULT_BUDGET, temperature: float = TEMPERATURE) -> Codec:
    """The codec of the fewest bytes on disk that is unbiased and within `kl_budget` at `temperature` on held-out pairs.

    `logits` f32 (n, 2, C) of pairs drawn at random from the data; the last quarter is held out. Raises UserError for a
    budget that is not positive.
    """
    fitting.require_budget(kl_budget)
    if not len(logits):
        raise UserError("no pairs to choose a codec by", fix="check the data set")
    held = logits[-max(len(logits) - fitting.held_out(len(logits)), 1) :]
    dither_keys = np.arange(len(held), dtype=np.uint64)
    best, fewest = None, math.inf
    for codec in _candidates(logits, kl_budget, temperature):
        codes = codec.encode(held, dither_keys)
        size = len(codec.pack(codes, dither_keys))
        good = isinstance(codec, Fp16) or not drift(codec, held, codes, dither_keys, temperature).beyond(kl_budget)
        if good and size < fewest:
            best, fewest = codec, size
    assert best is not None
    return best


def _candidates(logits: np.ndarray, kl: float, temperature: float) -> Iterator[Codec]:
    for name in _PLAIN:
        yield make(name, classes=logits.shape[2])
    if len(logits) >= fitting.MIN_PAIRS and logits.shape[2] > 1:
        with contextlib.suppress(UserError):  # it cannot keep these logits so well
            yield fitting.fit(logits, kl, temperature)


def split(config: Any) -> tuple[dict, dict[str, np.ndarray]]:
    """A config as a store keeps it: a header, which is JSON, and arrays, which fitted codecs have. Raises UserError."""
    if _name(config) not in _FITTED:
        return config, {}
    codec = from_config(config)
    if isinstance(codec, Features):
        return features.split(codec)
    assert isinstance(codec, Subspace)
    return subspace.split(codec)


def array_shapes(header: object, where: str = "codec") -> dict[str, tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """Of the arrays that go with a header from outside: name -> type, axes, shape. Raises UserError naming the key."""
    if (name := _name(header)) not in _FITTED:
        return {}
    fitted = _FITTED[name]
    found = require_keys(header, where, name, fitted.HEADER_FORMATS, fitted.HEADER_KEYS)
    return fitted.array_shapes(found, where)


def join(header: dict, arrays: dict[str, np.ndarray], where: str = "codec") -> dict:
    """The config of a header, and of arrays of the shapes that it asks for. Raises UserError as `from_config` does."""
    name = _name(header)
    return _FITTED[name].join(header, arrays, where) if name in _FITTED else header


def _name(config: object) -> str:
    name = config.get("name") if isinstance(config, dict) else None
    return name if isinstance(name, str) else ""


def from_config(config: object, where: str = "codec") -> Codec:
    """The codec of a config from outside, every value checked. Raises UserError naming the key."""
    if (name := _name(config)) in _FITTED:
        fitted = _FITTED[name]
        return fitted.from_config(require_keys(config, where, name, fitted.CONFIG_FORMATS, fitted.CONFIG_KEYS), where)
    if isinstance(config, dict) and "name" in config:
        known = " or ".join((*_PLAIN, *_FITTED))
        require(name in _PLAIN, config["name"], f"{where}: unknown name", FIX, known)
    found = require_keys(config, where, name, (1,), ("classes",))
    return _PLAIN[name](whole(found["classes"], f"{where}: classes", FIX, 1, MAX_CLASSES))
