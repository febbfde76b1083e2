"""The bound on unbiased codes is the closed form where there is one, and the code's bytes stay above it."""

import numpy as np
import pytest

from bench.labels import limits
from cache import codec
from cache.codec.fidelity import measure


def test_equal_directions_share_the_noise_equally():
    """Of d pairs of independent views of variance s, noise kl / (g d) each: d log2(1 + s g d / kl) bits.

    Half their sum and half their difference have half that variance, and each view has the noise of both.
    """
    d, s, g, kl = 40, 3.0, 0.02, 0.05
    moments = np.stack([np.full(d, s / 2), np.full(d, s / 2), np.zeros(d)])
    expected = d * np.log2(1 + s * g * d / kl)
    assert limits.least_bits(moments, np.full(d, g), kl) == pytest.approx(expected, rel=0.02)
    # The same view twice, or the opposite one: one number takes half the bits of two.
    for moments in ([s, 0, 0], [0, s, 0], [s / 2, s / 2, s / 2]):
        twin = limits.least_bits(np.repeat(np.array(moments)[:, None], d, axis=1), np.full(d, g), kl)
        assert twin == pytest.approx(d / 2 * np.log2(1 + s * g * d / kl), rel=0.02)


def test_a_fitted_code_takes_more_and_not_twice_as_much():
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(1024, 1, 30)) + 0.5 * rng.normal(size=(1024, 2, 30))
    logits = (signal * np.linspace(3, 0.3, 30) @ rng.normal(size=(30, 60))).astype(np.float32)
    code = codec.fit("subspace", logits, kl=0.05)
    taken = measure(code, logits, np.arange(1024, dtype=np.uint64)).bytes_per_vector
    assert 1 < taken / limits.least_bytes(logits, 0.05) < 2
