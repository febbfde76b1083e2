"""The correction of the dither's bias does what its formula says."""

import numpy as np

from bench.labels.arms import arms
from cache import philox
from cache.codec.fidelity import divergence


def test_corrected_labels_mean_what_the_teacher_said():
    """The mean softmax of 600 codes of a pair: its KL from the truth falls to a third or less, and so does what the
    largest probability, which noise lowers, is off by."""
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(512, 2, 30)) @ rng.normal(size=(30, 50)) * 0.4).astype(np.float32)
    some, keys = logits[:8], np.arange(8, dtype=np.uint64)
    truth = softmax(some)
    bias, lowered = {}, {}
    for name in ("subspace-0.2", "subspace-0.2-corrected"):
        coder = arms(1.0)[name](logits)
        assert coder
        mean = np.zeros_like(truth)
        for draw in range(600):
            stream = philox.dither_keys(1, keys, draw)
            mean += softmax(coder.decode(coder.encode(some, stream), stream)) / 600
        bias[name] = divergence(np.log(truth), np.log(mean), 1.0)
        lowered[name] = (truth.max(-1) - mean.max(-1)).mean()
    assert bias["subspace-0.2-corrected"] < bias["subspace-0.2"] / 3
    assert lowered["subspace-0.2"] > 0.01
    assert abs(lowered["subspace-0.2-corrected"]) < lowered["subspace-0.2"] / 3


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)
