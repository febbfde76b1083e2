"""Features with a head, and codes of them."""

import numpy as np

from cache import codec as codecs
from cache.codec.features import Features

WIDTH, CLASSES = 24, 9


def head(classes: int = CLASSES, width: int = WIDTH) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    weight = 3 * rng.normal(size=(classes, width)) / np.sqrt(width)
    return {"weight": weight.astype(np.float32), "bias": rng.normal(size=classes).astype(np.float32)}


def draw(pairs: int, seed: int = 0, width: int = WIDTH) -> np.ndarray:
    """f32 (n, 2, F), never negative, of falling variance, the views of a pair alike."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(6).normal(size=(width, width)) * 0.8 ** np.arange(width)[:, None]
    own, change = rng.normal(size=(2, pairs, width))
    return np.maximum(np.stack([own, 0.8 * own + 0.6 * change], axis=1) @ mix + 1, 0).astype(np.float32)


def fitted(kl: float = 0.02, seed: int = 0) -> Features:
    code = codecs.fit("features", draw(512, seed), **head(), kl=kl)
    assert isinstance(code, Features)
    return code
