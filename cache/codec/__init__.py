"""Codecs: how a pair of logit vectors becomes some bytes, its codes, and back."""

from cache.codec.base import MAX_CLASSES
from cache.codec.choose import DEFAULT_BUDGET, NAMES, Codec, array_shapes, auto, fit, from_config, join, make, split
from cache.codec.dense import Fp16, Int8
from cache.codec.features import Features
from cache.codec.subspace import Subspace

__all__ = [
    "DEFAULT_BUDGET",
    "MAX_CLASSES",
    "NAMES",
    "Codec",
    "Features",
    "Fp16",
    "Int8",
    "Subspace",
    "array_shapes",
    "auto",
    "fit",
    "from_config",
    "join",
    "make",
    "split",
]
